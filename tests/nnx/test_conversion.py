"""Converted NNX models, against the same model with the unpacked kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import slidejax as sj

FLOAT = sj.Rule("6:8", qdtype=None)
NAMES = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))


def data(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


def densify(layer, w):
    """Puts the unpacked kernel into a dense layer."""
    layer.kernel[...] = sj.unpack(w).reshape(layer.kernel.shape).astype(layer.kernel.dtype)
    return layer


class Model(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            num_heads=3, in_features=24, qkv_features=24, decode=False, rngs=rngs
        )
        self.blocks = nnx.List([nnx.Linear(24, 24, rngs=rngs) for _ in range(2)])
        self.blocks.append(self.blocks[0])
        self.einsum = nnx.Einsum("btd,dhk->bthk", (24, 2, 5), (2, 5), rngs=rngs)
        self.conv = nnx.Conv(24, 24, (3,), rngs=rngs)
        self.norm = nnx.LayerNorm(24, rngs=rngs)

    def __call__(self, x):
        x = self.attention(self.norm(x)) + self.conv(x)
        for block in self.blocks:
            x = x + jnp.tanh(block(x))
        return self.einsum(x)


def test_convert_a_model():
    model, x, report = Model(nnx.Rngs(0)), data(2, 3, 24), sj.Report()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    sparse = sj.nnx.convert(model, [("attention/out", None), (".*", FLOAT)], report=report)
    assert isinstance(sparse, Model) and type(model.blocks[0]) is nnx.Linear
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    assert [line.path for line in report.converted] == [
        "attention/key/kernel", "attention/query/kernel", "attention/value/kernel", "blocks/0/kernel", "blocks/1/kernel", "einsum/kernel",
    ]  # fmt: skip
    assert report.skipped.keys() == {"attention/out/kernel", "conv/kernel"}
    assert (
        report.skipped["attention/out/kernel"] == "a rule says so"
        and "Conv is not" in report.skipped["conv/kernel"]
    )
    assert sparse.blocks[2] is sparse.blocks[0] and type(sparse.blocks[0]) is sj.nnx.SlideLinear
    assert sparse.conv.kernel[...] is model.conv.kernel[...]
    for path in (
        "attention/key",
        "attention/query",
        "attention/value",
        "blocks/0",
        "blocks/1",
        "einsum",
    ):
        dense, packed = model, sparse
        for name in path.split("/"):
            dense, packed = (
                node[int(name)] if name.isdigit() else getattr(node, name)
                for node in (dense, packed)
            )
        densify(dense, packed.kernel)
    np.testing.assert_allclose(sparse(x), model(x), atol=2e-5)
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(sparse, x), model(x), atol=2e-5)


def test_8_bit_model_splits_and_merges():
    sparse = sj.nnx.convert(Model(nnx.Rngs(0)), "6:8")
    graph, params, packed, rest = nnx.split(sparse, nnx.Param, sj.nnx.Packed, ...)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(packed)} == {"int8", "uint8", "float32"}
    x = data(2, 3, 24)
    np.testing.assert_array_equal(nnx.merge(graph, params, packed, rest)(x), sparse(x))
    grads = nnx.jit(nnx.grad(lambda model: jnp.sum(model(x))))(sparse)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_stacked_layers_and_axis_names():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), transform_metadata={nnx.PARTITION_NAME: "layers"})
    def stack(rngs):
        return nnx.Linear(64, 64, kernel_init=NAMES, rngs=rngs)

    @nnx.scan(
        in_axes=(0, nnx.Carry),
        out_axes=nnx.Carry,
        transform_metadata={nnx.PARTITION_NAME: "layers"},
    )
    def run(layer, x):
        return layer(x)

    with nnx.use_eager_sharding(False):
        dense = stack(nnx.Rngs(0))
        sparse = sj.nnx.convert(dense, FLOAT)
        assert sparse.kernel.shape == (3, 64, 64)
        assert sparse.values.get_metadata()["out_sharding"] == ("layers", "mlp", "embed", None)
        x = data(2, 64)
        np.testing.assert_allclose(run(sparse, x), run(densify(dense, sparse.kernel), x), atol=2e-5)
        layer = sj.nnx.SlideLinear(40, 8, kernel_init=NAMES, rngs=nnx.Rngs(0))
    # 40 inputs are not whole blocks.
    assert layer.zeros.get_metadata()["out_sharding"] == ("mlp", None)


def test_prepared_forms_are_placed_by_their_names():
    """Each form is a Variable of its own, so that `nnx.get_partition_spec` knows what it is."""
    with nnx.use_eager_sharding(False):
        dense = nnx.Linear(64, 64, kernel_init=NAMES, use_bias=False, rngs=nnx.Rngs(0))
        sparse = sj.nnx.convert(dense, "6:8")
        prepared = sj.nnx.map_weights(sparse, lambda tree: sj.prepare(tree, "dense"))
        specs = nnx.get_partition_spec(nnx.state(prepared))
        flat = nnx.to_pure_dict(specs)["prepared"]["dense"]
        assert tuple(flat) == ("mlp", "embed")
        graph, state = nnx.split(prepared)
        mesh = jax.make_mesh((2, 1), ("mlp", "embed"), devices=jax.devices("cpu")[:2])
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        placed = nnx.merge(graph, jax.device_put(state, shardings))
    assert len(placed.kernel.prepared["dense"].sharding.device_set) == 2
    x = data(3, 64)
    np.testing.assert_array_equal(nnx.jit(lambda layer, x: layer(x))(placed, x), sparse(x))
    dropped = sj.nnx.map_weights(placed, sj.drop_prepared)
    assert dropped.prepared is None and not dropped.kernel.prepared


def test_tied_kernels_stay_tied():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b, self.c = (nnx.Linear(16, 16, rngs=rngs) for _ in range(3))
            self.b.kernel = self.a.kernel
            self.c.kernel = self.a.kernel

        def __call__(self, x):
            return self.c(self.b(self.a(x)))

    model, x, report = Tied(nnx.Rngs(0)), data(2, 16), sj.Report()
    sparse = sj.nnx.convert(model, [("c", "2:4"), (".*", FLOAT)], report=report)
    assert sparse.b.values is sparse.a.values and sparse.b.zeros is sparse.a.zeros
    assert report.skipped == {
        "c/kernel": "it shares its kernel with a/kernel, which uses it in another way"
    }
    np.testing.assert_allclose(
        sparse(x), model.c(x @ sj.unpack(sparse.a.kernel) @ sj.unpack(sparse.b.kernel)), atol=1e-5
    )


def test_layers_that_are_skipped_say_why():
    class Own(nnx.Linear):
        def __call__(self, inputs, out_sharding=None):
            return 2 * super().__call__(inputs)

    def dot(*args, **kwargs):
        return jax.lax.dot_general(*args, **kwargs)

    rngs, report = nnx.Rngs(0), sj.Report()
    model = nnx.Dict(
        own=Own(8, 8, rngs=rngs), dot=nnx.Linear(8, 8, dot_general=dot, rngs=rngs),
        half=nnx.Linear(8, 8, param_dtype=jnp.float8_e5m2, rngs=rngs), diagonal=nnx.Einsum("bd,dd->b", (8, 8), rngs=rngs),
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"rules\[0\] \('nothing'\) decided nothing"):
        sj.nnx.convert(model, [("nothing", None), (".*", "6:8")], report=report)
    reasons = {path.removesuffix("/kernel"): reason for path, reason in report.skipped.items()}
    assert (
        not report.converted
        and "Own is not" in reasons["own"]
        and "product of its own" in reasons["dot"]
    )
    assert "float8_e5m2" in reasons["half"] and "diagonal" in reasons["diagonal"]


def test_a_layer_converts_by_itself_and_errors_are_clear():
    layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    assert type(sj.nnx.convert(layer, "6:8")) is sj.nnx.SlideLinear and type(layer) is nnx.Linear
    with pytest.raises(TypeError, match=r"model must be a flax\.nnx Module"):
        sj.nnx.convert({"kernel": 1}, "6:8")
    with pytest.raises(ValueError, match="pattern must be"):
        sj.nnx.SlideLinear(16, 8, pattern="5:8", rngs=nnx.Rngs(0))
    sparse = sj.nnx.convert(layer, "6:8")
    with pytest.raises(ValueError, match="x must be"):
        sparse(data(2, 15))
    sparse.values.set_value(sparse.values[...].astype(jnp.int16))
    with pytest.raises(ValueError, match="kernel of SlideLinear has leaves values int16"):
        sparse(data(2, 16))


def test_a_converted_einsum_refuses_another_equation():
    layer, x = nnx.Einsum("bd,df->bf", (16, 16), rngs=nnx.Rngs(0)), data(2, 16)
    sparse = sj.nnx.convert(layer, FLOAT)
    np.testing.assert_allclose(sparse(x, "ad,df->fa"), sparse(x).T)
    with pytest.raises(ValueError, match="packed for 'bd,df->bf'"):
        sparse(x, "bf,df->bd")


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(24, 40, rngs=rngs)
        self.norm = nnx.LayerNorm(40, rngs=rngs)
        self.down = nnx.Linear(40, 24, use_bias=False, rngs=rngs)
        self.again = self.up

    def __call__(self, x):
        return self.down(self.norm(jax.nn.relu(self.again(x))))


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_kernels_that_a_wrapper_computes_are_skipped(wrapper):
    model = wrapper(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    report = sj.Report()
    with pytest.warns(UserWarning, match="matched no"):
        sparse = sj.nnx.convert(model, "6:8", report=report)
    assert not report.converted and wrapper.__name__ in next(iter(report.skipped.values()))
    np.testing.assert_array_equal(sparse(data(2, 16)), model(data(2, 16)))


def test_training_keeps_the_mask():
    model, x = sj.nnx.convert(Mlp(nnx.Rngs(0)), sj.Rule("6:8", qdtype=None)), data(32, 24)
    target = jnp.sin(x)
    optimiser = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    zeros, kernel = np.asarray(model.up.kernel.zeros), np.asarray(sj.unpack(model.up.kernel))

    @nnx.jit
    def step(model, optimiser):
        loss, grads = nnx.value_and_grad(lambda m: ((m(x) - target) ** 2).mean())(model)
        optimiser.update(model, grads)
        return loss

    losses = [float(step(model, optimiser)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    np.testing.assert_array_equal(model.up.kernel.zeros, zeros)
    after = np.asarray(sj.unpack(model.up.kernel))
    assert (after != kernel).any() and not after[kernel == 0].any()

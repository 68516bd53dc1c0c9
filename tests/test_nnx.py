import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import slidejax as sj


def data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(24, 40, rngs=rngs)
        self.norm = nnx.LayerNorm(40, rngs=rngs)
        self.down = nnx.Linear(40, 24, use_bias=False, rngs=rngs)
        self.again = self.up

    def __call__(self, x):
        return self.down(self.norm(jax.nn.relu(self.again(x))))


def densified(model, sparse):
    """The dense model with what the sparse one holds."""
    twin = nnx.clone(model)
    for name in ("up", "down"):
        getattr(twin, name).kernel.set_value(sj.unpack(getattr(sparse, name).kernel))
    return twin


@pytest.mark.parametrize("qdtype", [None, "int8", "float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_is_the_dense_one_with_its_weights(qdtype, use_bias):
    layer = sj.nnx.SlideLinear(24, 8, pattern="4:6", qdtype=qdtype, use_bias=use_bias, rngs=nnx.Rngs(0))
    x = data(3, 24)
    want = x @ sj.unpack(layer.kernel).astype(jnp.float32)
    tolerance = {"int8": 0.02, "float8_e4m3fn": 0.06, "bfloat16": 0.02}.get(qdtype, 1e-5)
    np.testing.assert_allclose(layer(x), want, atol=tolerance * float(jnp.abs(want).max()))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x), layer(x), rtol=1e-6, atol=1e-6)
    trained = nnx.state(layer, nnx.Param)
    floats = qdtype in (None, "bfloat16")
    assert len(jax.tree.leaves(trained)) == floats + use_bias


def test_convert_leaves_the_input_alone_and_keeps_sharing():
    model, x = Mlp(nnx.Rngs(0)), data(5, 24)
    before = model(x)
    report = sj.Report()
    sparse = sj.nnx.convert(model, [(".*", sj.Rule("6:8", qdtype=None))], report=report)
    np.testing.assert_array_equal(model(x), before)
    assert type(model.up) is nnx.Linear and type(sparse.up) is sj.nnx.SlideLinear
    assert sparse.again is sparse.up
    np.testing.assert_allclose(sparse(x), densified(model, sparse)(x), rtol=1e-5, atol=1e-5)
    assert sorted(line.path.split("/")[-2] for line in report.converted) in (["again", "down"], ["down", "up"])


def test_rules_decide_and_the_report_says_why():
    report = sj.Report()
    with pytest.warns(UserWarning, match="matched no"):
        sparse = sj.nnx.convert(Mlp(nnx.Rngs(0)), [("down.*", None), ("nothing.*", "2:4"), (".*", "14:16")], report=report)
    assert type(sparse.down) is nnx.Linear and sparse.up.pattern == sj.Pattern.parse("14:16")
    assert "down/kernel" in report.dense


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_kernels_that_a_wrapper_computes_stay_dense(wrapper):
    model = wrapper(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    report = sj.Report()
    with pytest.warns(UserWarning, match="matched no"):
        sparse = sj.nnx.convert(model, "6:8", report=report)
    assert not report.converted and wrapper.__name__ in next(iter(report.dense.values()))
    np.testing.assert_array_equal(sparse(data(2, 16)), model(data(2, 16)))


def test_training_keeps_the_mask():
    model, x = sj.nnx.convert(Mlp(nnx.Rngs(0)), sj.Rule("6:8", qdtype=None)), data(32, 24)
    target = data(32, 24, seed=1)
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


def test_split_and_merge():
    model, x = sj.nnx.convert(Mlp(nnx.Rngs(0)), "6:8"), data(5, 24)
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), model(x))


def test_stacked_layers():
    @nnx.vmap
    def make(key):
        return nnx.Linear(16, 16, rngs=nnx.Rngs(key))

    stack, x = make(jax.random.split(jax.random.key(0), 3)), data(2, 16)

    def run(stack, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack)

    sparse = sj.nnx.convert(stack, sj.Rule("6:8", qdtype=None))
    twin = nnx.clone(stack)
    twin.kernel.set_value(sj.unpack(sparse.kernel))
    np.testing.assert_allclose(run(sparse, x), run(twin, x), rtol=1e-5, atol=1e-5)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"flax\.nnx Module"):
        sj.nnx.convert({}, "6:8")
    with pytest.raises(ValueError, match="kept:group"):
        sj.nnx.SlideLinear(8, 4, pattern="six", rngs=nnx.Rngs(0))

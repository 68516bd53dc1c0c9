"""SlideDense and converted Linen models, against the same model with the unpacked kernels."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, unflatten_dict

import slidejax as sj

KEY = jax.random.key(0)
FLOAT = sj.Rule("6:8", qdtype=None)


def densified(converted, original):
    """The converted variables with every packed kernel unpacked into the shape of the original."""
    flat, like = flatten_dict(nn.meta.unbox(converted)), flatten_dict(nn.meta.unbox(original))

    def dense(key, leaf):
        return (
            sj.unpack(leaf).reshape(like[key].shape).astype(like[key].dtype)
            if isinstance(leaf, sj.SlideWeight)
            else leaf
        )

    return unflatten_dict({key: dense(key, leaf) for key, leaf in flat.items()})


def quantized_product(x, w, bias=None):
    """What an 8-bit layer computes, by the formulas of the design."""
    codes, scale = sj.lift_quantize(x, w.pattern, dtype=w.dtype)
    return sj.sparse_matmul(codes, scale, w, bias, out_dtype=x.dtype)


def check(model, x, rules=FLOAT, atol=2e-5, count=None):
    """Converts, compares with the dense twin, eagerly and under jit; returns the converted variables and the report."""
    variables, report = model.init(KEY, x), sj.Report()
    converted = sj.linen.convert(variables, rules, model, x, report=report)
    want = model.apply(densified(converted, variables), x)
    np.testing.assert_allclose(sj.linen.apply(model, converted, x), want, atol=atol)
    np.testing.assert_allclose(
        jax.jit(lambda v, x: sj.linen.apply(model, v, x))(converted, x), want, atol=atol
    )
    if count is not None:
        assert len(report.converted) == count, str(report)
    return converted, report


def data(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


# --- SlideDense -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("dtype", "param_dtype", "x_dtype"), [
    (None, jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32, jnp.float32), (None, jnp.float32, jnp.bfloat16),
    (jnp.float32, jnp.bfloat16, jnp.float16), (None, jnp.bfloat16, jnp.bfloat16),
])  # fmt: skip
def test_slide_dense_is_dense_with_the_unpacked_kernel(use_bias, dtype, param_dtype, x_dtype):
    options = {
        "features": 24,
        "use_bias": use_bias,
        "dtype": dtype,
        "param_dtype": param_dtype,
        "bias_init": nn.initializers.normal(),
    }
    layer, x = (
        sj.linen.SlideDense(**options, pattern="6:8", qdtype=None),
        data(3, 40, dtype=x_dtype),
    )
    variables = layer.init(KEY, x)
    reference = nn.Dense(**options)
    like = reference.init(KEY, x)
    assert variables["params"]["kernel"].dtype == param_dtype
    got, want = layer.apply(variables, x), reference.apply(densified(variables, like), x)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(
        got.astype(jnp.float32),
        want.astype(jnp.float32),
        atol=0.1 if got.dtype == jnp.bfloat16 else 1e-5,
    )


@pytest.mark.parametrize(("features_in", "features", "pattern", "qdtype"), [
    (1, 3, "6:8", "int8"), (40, 9, "2:4", "int8"), (64, 5, "6:8", "float8_e4m3fn"), (70, 1, "14:16", "int8"), (40, 9, "dense", "int8"),
])  # fmt: skip
def test_8_bit_slide_dense_is_the_quantised_product(features_in, features, pattern, qdtype):
    layer, x = (
        sj.linen.SlideDense(
            features, pattern=pattern, qdtype=qdtype, bias_init=nn.initializers.normal()
        ),
        data(2, features_in),
    )
    params = layer.init(KEY, x)["params"]
    want = quantized_product(x, params["kernel"], params["bias"])
    np.testing.assert_allclose(layer.apply({"params": params}, x), want, rtol=1e-5, atol=1e-5)
    # and it is near the product that it stands for
    exact = x @ sj.unpack(params["kernel"]) + params["bias"]
    bound = {"int8": 0.01, "float8_e4m3fn": 0.07}[qdtype] * (
        jnp.abs(x).max() * jnp.abs(sj.unpack(params["kernel"])).sum(0).max() + 1e-6
    )
    assert jnp.abs(want - exact).max() <= bound


def test_slide_dense_packs_what_dense_would_hold():
    x = data(2, 40)
    w = sj.linen.SlideDense(24, qdtype=None).init(KEY, x)["params"]["kernel"]
    kernel = nn.Dense(24).init(KEY, x)["params"]["kernel"]
    np.testing.assert_array_equal(
        sj.unpack(w), jnp.where(sj.prune.magnitude(kernel, "6:8"), kernel, 0)
    )


@pytest.mark.parametrize(("pattern", "qdtype"), [("6:8", None), ("6:8", "int8"), ("dense", "int8")])
def test_slide_dense_in_scan_remat_and_vmap(pattern, qdtype):
    options = {"pattern": pattern, "qdtype": qdtype}

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.remat(sj.linen.SlideDense)(16, **options)(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, _ = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )(name="blocks")(x, None)
            experts = nn.vmap(
                sj.linen.SlideDense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=2,
            )
            return experts(8, **options, name="experts")(x)

    x = data(4, 16)
    params = Model().init(KEY, x)["params"]
    (stack,) = params["blocks"].values()
    assert stack["kernel"].shape == (3, 16, 16) and params["experts"]["kernel"].shape == (2, 16, 8)
    product = (lambda x, w: x @ sj.unpack(w)) if qdtype is None else quantized_product
    want = x
    for i in range(3):
        want = want + product(want, jax.tree.map(lambda leaf, i=i: leaf[i], stack["kernel"]))
    want = jnp.stack(
        [
            product(want, jax.tree.map(lambda leaf, i=i: leaf[i], params["experts"]["kernel"]))
            for i in range(2)
        ]
    )
    np.testing.assert_allclose(
        jax.jit(Model().apply)({"params": params}, x), want, rtol=2e-3, atol=2e-3
    )
    per_example = jax.vmap(lambda row: Model().apply({"params": params}, row))(x)
    np.testing.assert_allclose(per_example.swapaxes(0, 1), want, rtol=2e-3, atol=2e-3)


def test_float_packed_values_train():
    layer, x = sj.linen.SlideDense(8, qdtype=None), data(4, 16)
    params = layer.init(KEY, x)["params"]
    train, rest = sj.partition(params)
    grads = jax.grad(
        lambda train: jnp.sum(layer.apply({"params": sj.combine(train, rest)}, x) ** 2)
    )(train)
    dense = {"kernel": sj.unpack(params["kernel"]), "bias": params["bias"]}
    want = jax.grad(lambda dense: jnp.sum(nn.Dense(8).apply({"params": dense}, x) ** 2))(dense)
    np.testing.assert_allclose(grads["bias"], want["bias"], rtol=1e-4)
    mask = sj.unpack(params["kernel"]) != 0
    np.testing.assert_allclose(
        sj.unpack(params["kernel"].replace(values=grads["kernel"].values)),
        want["kernel"] * mask,
        rtol=1e-4,
        atol=1e-4,
    )


def test_axis_names_go_to_the_leaves():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    layer = sj.linen.SlideDense(8, kernel_init=init, pattern="6:8")
    spec = nn.get_partition_spec(jax.eval_shape(layer.init, KEY, data(2, 64)))["params"]["kernel"]
    w = sj.pack(jnp.ones((64, 8)), "6:8")
    assert (spec.values, spec.zeros, spec.scale) == (lambda s: (s.values, s.zeros, s.scale))(
        w.partition_spec(out="mlp", k="embed")
    )
    quantised = nn.get_partition_spec(
        jax.eval_shape(layer.clone(pattern="dense").init, KEY, data(2, 64))
    )["params"]["kernel"]
    assert (tuple(quantised.values), tuple(quantised.zeros)) == (
        ("mlp", "embed", None),
        ("mlp", None),
    )
    x = data(2, 40)  # not whole blocks: K keeps no name
    variables = layer.init(KEY, x)
    assert nn.get_partition_spec(variables)["params"]["kernel"].zeros == jax.sharding.PartitionSpec(
        "mlp", None
    )
    np.testing.assert_array_equal(
        layer.apply(variables, x), layer.apply(nn.meta.unbox(variables), x)
    )


def test_slide_dense_errors():
    x = data(2, 16)
    layer = sj.linen.SlideDense(8)
    with pytest.raises(
        ValueError, match=r"kernel is a dense array.*SlideDense takes a SlideWeight"
    ):
        layer.apply(nn.Dense(8).init(KEY, x), x)
    with pytest.raises(ValueError, match=r"kernel is a 4:6 weight.*expected 6:8"):
        layer.apply(sj.linen.SlideDense(8, pattern="4:6").init(KEY, x), x)
    with pytest.raises(ValueError, match="expected 6:8 of shape"):
        layer.apply(layer.init(KEY, x), data(2, 15))
    with pytest.raises(ValueError, match="pattern must be"):
        sj.linen.SlideDense(8, pattern="5:8").init(KEY, x)
    variables = layer.init(KEY, x)
    with pytest.raises(ValueError, match="ruins packed weights"):
        layer.apply(jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables), x)


# --- convert and apply ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=24)(x, x)
        return nn.Dense(5, use_bias=False)(nn.gelu(nn.Dense(32)(x)))


def test_attention_model():
    converted, report = check(Attention(), data(2, 7, 20), count=6)
    attention = converted["params"]["MultiHeadDotProductAttention_0"]
    assert attention["query"]["kernel"].shape == (20, 24) and attention["out"]["kernel"].shape == (
        24,
        20,
    )
    assert not report.skipped and not report.unmatched
    assert report.bytes_after == sum(
        w.nbytes
        for w in jax.tree.leaves(converted, is_leaf=lambda n: isinstance(n, sj.SlideWeight))
        if isinstance(w, sj.SlideWeight)
    )
    assert "6 layers converted" in str(
        report
    ) and "MultiHeadDotProductAttention_0/query/kernel" in str(report)


@pytest.mark.parametrize("layer", [
    nn.Dense(7),
    nn.DenseGeneral((3, 4)),
    nn.DenseGeneral(6, axis=(-2, -1)),
    nn.DenseGeneral(6, axis=(1, -1), use_bias=False),
    nn.DenseGeneral((2, 3), batch_dims=(0,), bias_init=nn.initializers.normal()),
    nn.Einsum((20, 3, 4), "abcd,dhk->ahbck"),
    nn.Einsum((4, 20, 3), "abcd,cdk->akbc", bias_init=nn.initializers.normal()),
    nn.Einsum((20, 3), "...d,dk->k...", bias_init=nn.initializers.normal()),
])  # fmt: skip
def test_layers_of_every_form(layer):
    check(layer, data(2, 3, 4, 20), count=1)


def test_scanned_vmapped_and_subclassed_layers():
    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.remat(nn.Dense)(12)(x) + nn.DenseGeneral((3, 4))(x).reshape(x.shape), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, _ = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )()(x, None)
            experts = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=0,
                axis_size=2,
            )
            return nn.jit(Doubled)(6)(experts(7)(x))

    converted, _ = check(Model(), data(2, 5, 12), count=4)
    shapes = sorted(
        w.shape
        for w in jax.tree.leaves(converted, is_leaf=lambda n: isinstance(n, sj.SlideWeight))
        if isinstance(w, sj.SlideWeight)
    )
    assert shapes == [(2, 12, 7), (3, 12, 12), (3, 12, 12), (7, 6)]


def test_layers_that_stay_dense_say_why():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.normal(), (x.shape[-1], 4))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3,), name="conv")(x)
            x = nn.Dense(
                16, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), name="custom"
            )(x)
            x = nn.WeightNorm(nn.Dense(16, name="normed"))(x)
            second = nn.vmap(
                nn.Dense,
                variable_axes={"params": 1},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=3,
            )
            square = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=16,
            )
            x = second(10, use_bias=False, name="second")(x)[0] + square(10, name="square")(x)[0]
            x = nn.Embed(10, 10, name="embed").attend(x)
            return nn.Dense(3, name="head")(Own(name="own")(x))

    _, report = check(Model(), data(2, 5, 16), [("head", None), ("(?!head).*", FLOAT)], count=0)
    reasons = {path.removesuffix("/kernel"): reason for path, reason in report.skipped.items()}
    assert reasons.keys() == {"conv", "custom", "normed", "second", "square", "head", "own"}
    assert "Conv is not a linear layer" in reasons["conv"] and "Own is not" in reasons["own"]
    assert "dot_general of its own" in reasons["custom"] and "WeightNorm" in reasons["normed"]
    assert "stacked along axis 1" in reasons["second"] and "cannot be told" in reasons["square"]
    assert reasons["head"] == "a rule says so"


def test_without_a_model_only_matrices_convert():
    x = data(2, 3, 20)
    model = Attention()
    report = sj.Report()
    converted = sj.linen.convert(model.init(KEY, x)["params"], FLOAT, report=report)
    assert {line.path for line in report.converted} == {"Dense_0/kernel", "Dense_1/kernel"}
    assert (
        all("need the model" in reason for reason in report.skipped.values())
        and len(report.skipped) == 4
    )
    assert sj.linen.apply(model, {"params": converted}, x).shape == (2, 3, 5)


def test_forms_of_variables_and_what_is_untouched():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(12)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    x = data(4, 16)
    variables = Model().init(KEY, x)
    converted = sj.linen.convert(freeze(variables), "6:8", Model(), x, train=True)
    assert isinstance(converted, FrozenDict) and isinstance(
        converted["params"]["Dense_0"]["kernel"], sj.SlideWeight
    )
    assert isinstance(variables["params"]["Dense_0"]["kernel"], jax.Array)
    assert converted["params"]["Dense_0"]["bias"] is variables["params"]["Dense_0"]["bias"]
    only = sj.linen.convert(variables["params"], "6:8", Model(), x)
    jax.tree.map(np.testing.assert_array_equal, only, dict(converted["params"].unfreeze()))
    y, updates = sj.linen.apply(
        Model(), converted, x, train=True, mutable=["batch_stats"], rngs={"dropout": KEY}
    )
    assert y.shape == (4, 12) and "batch_stats" in updates


def test_shared_kernels_stay_one():
    class Model(nn.Module):
        def setup(self):
            self.twice = nn.Dense(16)
            self.other = nn.Dense(16)

        def __call__(self, x):
            return self.other(self.twice(self.twice(x)))

    x = data(3, 16)
    _converted, _report = check(Model(), x, count=2)
    params = Model().init(KEY, x)["params"]
    params["other"]["kernel"] = params["twice"]["kernel"]
    tied = sj.linen.convert(params, FLOAT, Model(), x)
    assert tied["other"]["kernel"] is tied["twice"]["kernel"]


def test_a_kernel_that_other_code_reads_is_an_error():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(8, name="layer")
            return layer(x) @ layer.variables["params"]["kernel"].T

    x = data(2, 16)
    variables = Tied().init(KEY, x)
    with pytest.raises(ValueError, match=r"does not run.*must be skipped"):
        sj.linen.convert(variables, "6:8", Tied(), x)
    report = sj.Report()
    sj.linen.convert(variables, [("layer", None)], Tied(), x, report=report)
    assert report.skipped == {"layer/kernel": "a rule says so"}


def test_two_uses_of_one_kernel():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Einsum((16, 16), None, use_bias=False, name="layer")
            return layer(layer(x, "bi,io->bo"), "bo,io->bi")

    _, report = check(Twice(), data(2, 16), count=0)
    assert report.skipped == {"layer/kernel": "its kernel is used in two ways"}


def test_boxed_kernels_of_a_scan():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    step = nn.scan(
        lambda module, x, _: (nn.Dense(64, kernel_init=init, name="up")(x), None),
        variable_axes={"params": 0}, split_rngs={"params": True}, length=2, metadata_params={nn.PARTITION_NAME: "layers"},
    )  # fmt: skip

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return step(self, x, None)[0]

    converted, _ = check(Model(), data(2, 64), count=1)
    spec = nn.get_partition_spec(converted)["params"]["up"]["kernel"]
    assert tuple(spec.values) == ("layers", "mlp", "embed", None) and tuple(spec.scale) == (
        "layers",
        "mlp",
    )


def test_abstract_arguments_and_tracing():
    x = data(2, 16)
    model = nn.Dense(8)
    variables = model.init(KEY, x)
    converted = sj.linen.convert(variables, "6:8", model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    traced = jax.eval_shape(lambda v: sj.linen.convert(v, "6:8", model, x), variables)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), traced) == jax.tree.map(
        lambda a: (a.shape, a.dtype), converted
    )


def test_apply_runs_other_methods_and_converts_once_more():
    class Model(nn.Module):
        def setup(self):
            self.layer = nn.Dense(8)

        def __call__(self, x):
            return self.layer(x)

        def twice(self, x):
            return 2 * self.layer(x)

    x = data(2, 16)
    converted = sj.linen.convert(Model().init(KEY, x), FLOAT, Model(), x)
    np.testing.assert_allclose(
        sj.linen.apply(Model(), converted, x, method="twice"),
        2 * sj.linen.apply(Model(), converted, x),
    )
    report = sj.Report()
    assert (
        sj.linen.convert(converted, FLOAT, report=report)["params"]["layer"]["kernel"]
        is converted["params"]["layer"]["kernel"]
    )
    assert report.skipped == {"layer/kernel": "it is packed already"}


def test_dtypes_promote_as_in_the_layer():
    x = data(2, 16, dtype=jnp.bfloat16)
    for model, rule, want in [
        (nn.Dense(8), FLOAT, jnp.float32), (nn.Dense(8, dtype=jnp.bfloat16), FLOAT, jnp.bfloat16),
        (nn.Dense(8, use_bias=False), sj.Rule("6:8"), jnp.bfloat16), (nn.Dense(8), sj.Rule("6:8"), jnp.float32),
    ]:  # fmt: skip
        converted = sj.linen.convert(model.init(KEY, x), rule, model, x)
        assert sj.linen.apply(model, converted, x).dtype == want


def test_convert_errors():
    x = data(2, 16)
    variables = nn.Dense(8).init(KEY, x)
    with pytest.raises(ValueError, match=r"kernel has shape \(16, 8\).*\(15, 8\)"):
        sj.linen.convert(variables, "6:8", nn.Dense(8), data(2, 15))
    with pytest.raises(TypeError, match="variables must be the dict"):
        sj.linen.convert([1], "6:8")
    with pytest.raises(TypeError, match=r"model must be a flax\.linen Module"):
        sj.linen.convert(variables, "6:8", lambda x: x)
    with pytest.warns(UserWarning, match="matched no linear layer"):
        sj.linen.convert(variables, [(".*", "6:8"), ("none", None)])
    converted = sj.linen.convert(variables, "6:8")
    with pytest.raises(ValueError, match="ruins packed weights"):
        sj.linen.apply(nn.Dense(8), jax.tree.map(lambda a: a.astype(jnp.bfloat16), converted), x)


# --- one lift for q, k and v ------------------------------------------------------------------------------------------


class Projections(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, x):
        return [
            sj.linen.SlideDense(64, implementation=self.implementation, name=name)(x)
            for name in "qkv"
        ]


def test_projections_lower_to_identical_lifts():
    """What a CPU can show: lowered for CUDA, the three lifts are one function of one operand, which XLA merges."""
    x, model = data(4, 128), Projections("cusparselt")
    variables = jax.eval_shape(model.init, KEY, x)
    text = jax.jit(model.apply).trace(variables, x).lower(lowering_platforms=("cuda",)).as_text()
    lifts = re.findall(r"custom_call @slidejax_lift_quantize\((%\w+), .*?\) (\{.*)", text)
    assert len(lifts) == 3 and len(set(lifts)) == 1, text
    assert text.count("custom_call @slidejax_sparse_matmul_cusparselt") == 3


@pytest.mark.gpu
def test_projections_share_one_lift():
    x, model = data(256, 1024, dtype=jnp.bfloat16), Projections("cusparselt")
    variables = sj.prepare(jax.jit(model.init)(KEY, x), implementation="cusparselt")
    text = jax.jit(model.apply).lower(variables, x).compile().as_text()
    assert (
        sum(
            "custom-call(" in line and "slidejax_lift_quantize" in line
            for line in text.splitlines()
        )
        == 1
    ), text

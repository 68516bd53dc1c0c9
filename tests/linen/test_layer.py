"""`SlideDense`, against `nn.Dense` with the unpacked kernel."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_models import KEY, data, densified

import slidejax as sj


def quantized_product(x, w, bias=None):
    """The result of an 8-bit layer, by the formulas of the design."""
    codes, scale = sj.lift_quantize(x, w.pattern, dtype=w.dtype)
    return sj.sparse_matmul(codes, scale, w, bias, out_dtype=x.dtype)


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
        ValueError, match=r"kernel is an unpacked array.*SlideDense takes a SlideWeight"
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


# --- one lift for q, k and v ----------------------------------------------------------------------


class Projections(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, x):
        return [
            sj.linen.SlideDense(64, implementation=self.implementation, name=name)(x)
            for name in "qkv"
        ]


def test_projections_lower_to_identical_lifts():
    """Lowered for CUDA, the three lifts are one function of one operand, so XLA merges them."""
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


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_residual_is_added_before_the_result_is_rounded(dtype):
    layer, x = sj.linen.SlideDense(24, pattern="6:8", dtype=dtype), data(2, 3, 40)
    residual = data(2, 3, 24) * 100
    variables = layer.init(KEY, x, residual=residual)
    assert jax.tree.structure(variables) == jax.tree.structure(layer.init(KEY, x))
    params = variables["params"]
    y = layer.apply(variables, x, residual=residual)
    x = x.astype(y.dtype)  # the residual is not rounded to the dtype of the computation
    want = sj.linear(x, params["kernel"], params["bias"], residual=residual)
    assert y.dtype == (dtype or jnp.float32)
    np.testing.assert_array_equal(y, want)
    with pytest.raises(ValueError, match="residual must have the shape"):
        layer.apply(variables, x, residual=residual[..., :3])


@pytest.mark.parametrize("precision", [None, "highest", "bfloat16", jax.lax.Precision.DEFAULT])
def test_what_dense_accepts(precision):
    layer = sj.linen.SlideDense(
        8, pattern="6:8", precision=precision, dot_general=jax.lax.dot_general
    )
    x = jnp.ones((2, 64))
    variables = layer.init(jax.random.key(0), x)
    plain = sj.linen.SlideDense(8, pattern="6:8")
    np.testing.assert_array_equal(layer.apply(variables, x), plain.apply(variables, x))
    names = list(nn.Dense.__dataclass_fields__)
    assert list(sj.linen.SlideDense.__dataclass_fields__)[: len(names) - 2] == names[:-2]


@pytest.mark.parametrize(
    "wrong", [{"dot_general": jnp.einsum}, {"dot_general_cls": lambda: jax.lax.dot_general}]
)
def test_a_product_of_another_kind_is_refused(wrong):
    layer = sj.linen.SlideDense(8, pattern="6:8", **wrong)
    with pytest.raises(ValueError, match=r"SlideDense: .*dot_general"):
        layer.init(jax.random.key(0), jnp.ones((2, 64)))

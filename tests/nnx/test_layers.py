"""`SlideLinear`, against `nnx.Linear` with the unpacked kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import slidejax as sj

FLOAT = sj.Rule("6:8", qdtype=None)
NAMES = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))


def data(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


def densify(layer, w):
    """Puts the unpacked kernel into a dense layer."""
    layer.kernel[...] = sj.unpack(w).reshape(layer.kernel.shape).astype(layer.kernel.dtype)
    return layer


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("dtype", "param_dtype", "x_dtype"), [
    (None, jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32, jnp.float32), (None, jnp.float32, jnp.bfloat16),
])  # fmt: skip
def test_slide_linear_is_linear_with_the_unpacked_kernel(use_bias, dtype, param_dtype, x_dtype):
    options = {
        "use_bias": use_bias,
        "dtype": dtype,
        "param_dtype": param_dtype,
        "bias_init": nnx.initializers.normal(),
    }
    x = data(3, 40, dtype=x_dtype)
    layer = sj.nnx.SlideLinear(40, 24, pattern="6:8", qdtype=None, rngs=nnx.Rngs(0), **options)
    dense = nnx.Linear(40, 24, rngs=nnx.Rngs(0), **options)
    np.testing.assert_array_equal(
        sj.unpack(layer.kernel),
        jnp.where(sj.prune.magnitude(dense.kernel[...], "6:8"), dense.kernel[...], 0),
    )
    got, want = layer(x), densify(dense, layer.kernel)(x)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(
        got.astype(jnp.float32),
        want.astype(jnp.float32),
        atol=0.05 if got.dtype == jnp.bfloat16 else 1e-5,
    )


def test_8_bit_slide_linear():
    layer, x = sj.nnx.SlideLinear(40, 24, rngs=nnx.Rngs(0)), data(3, 40)
    np.testing.assert_array_equal(layer(x), sj.linear(x, layer.kernel, layer.bias[...]))
    np.testing.assert_array_equal(nnx.jit(lambda layer, x: layer(x))(layer, x), layer(x))
    assert list(nnx.state(layer, nnx.Param)) == ["bias"]
    assert sorted(nnx.state(layer, sj.nnx.Packed)) == ["scale", "values", "zeros"]


@pytest.mark.parametrize("qdtype", ["int8", None])
def test_the_pattern_dense(qdtype):
    x, dense = data(3, 40), nnx.Linear(40, 24, rngs=nnx.Rngs(0))
    layer = sj.nnx.SlideLinear(40, 24, pattern="dense", qdtype=qdtype, rngs=nnx.Rngs(0))
    assert layer.zeros[...].shape == (24, 0)
    np.testing.assert_allclose(layer(x), dense(x), atol=1e-5 if qdtype is None else 0.1)
    again = nnx.merge(*nnx.split(sj.nnx.convert(dense, sj.Rule("dense", qdtype))))
    np.testing.assert_array_equal(again(x), layer(x))


def test_float_packed_values_train():
    layer, x = sj.nnx.SlideLinear(16, 8, qdtype=None, rngs=nnx.Rngs(0)), data(4, 16)
    dense = densify(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), layer.kernel)
    zeros, before = layer.zeros[...], layer.values[...]

    def loss(layer):
        return jnp.sum((layer(x) - 1) ** 2)

    grads, want = nnx.grad(loss)(layer), nnx.grad(loss)(dense)
    mask = sj.unpack(layer.kernel) != 0
    got = sj.unpack(layer.kernel.replace(values=grads["values"].get_value()))
    np.testing.assert_allclose(got, want["kernel"].get_value() * mask, rtol=1e-4, atol=1e-4)
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
    first = loss(layer)
    optimizer.update(layer, grads)
    assert loss(layer) < first and not jnp.array_equal(layer.values[...], before)
    np.testing.assert_array_equal(layer.zeros[...], zeros)


@pytest.mark.parametrize("qdtype", [None, "int8", "float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_is_linear_with_its_unpacked_kernel(qdtype, use_bias):
    layer = sj.nnx.SlideLinear(
        24, 8, pattern="4:6", qdtype=qdtype, use_bias=use_bias, rngs=nnx.Rngs(0)
    )
    x = data(3, 24)
    want = x @ sj.unpack(layer.kernel).astype(jnp.float32)
    tolerance = {"int8": 0.02, "float8_e4m3fn": 0.06, "bfloat16": 0.02}.get(qdtype, 1e-5)
    np.testing.assert_allclose(layer(x), want, atol=tolerance * float(jnp.abs(want).max()))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x), layer(x), rtol=1e-6, atol=1e-6)
    trained = nnx.state(layer, nnx.Param)
    floats = qdtype in (None, "bfloat16")
    assert len(jax.tree.leaves(trained)) == floats + use_bias


def test_a_residual_is_added_before_the_result_is_rounded():
    x, residual = data(2, 3, 40), data(2, 3, 24) * 100
    layer = sj.nnx.SlideLinear(40, 24, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    narrow = x.astype(jnp.bfloat16)
    want = sj.linear(narrow, layer.kernel, layer.bias[...].astype(jnp.bfloat16), residual=residual)
    np.testing.assert_array_equal(layer(x, residual=residual), want)


@pytest.mark.parametrize("make", [
    lambda rngs: (nnx.LinearGeneral(40, (4, 6), rngs=rngs), (2, 3, 4, 6)),
    lambda rngs: (nnx.Einsum("btd,dnh->nbth", (40, 4, 6), (4, 6), rngs=rngs), (4, 2, 3, 6)),
])  # fmt: skip
def test_converted_layers_take_a_residual(make):
    dense, shape = make(nnx.Rngs(0))
    layer, x, residual = sj.nnx.convert(dense, FLOAT), data(2, 3, 40), data(*shape)
    got = layer(x, residual=residual)
    np.testing.assert_allclose(got, layer(x) + residual, rtol=1e-5, atol=1e-5)


def test_what_linear_accepts():
    settings = {"precision": "highest", "dot_general": jax.lax.dot_general}
    x = jnp.ones((2, 64), jnp.bfloat16)
    for preferred in (None, jnp.float32, "float16"):
        ours = sj.nnx.SlideLinear(
            64,
            8,
            pattern="6:8",
            dtype=jnp.bfloat16,
            preferred_element_type=preferred,
            use_bias=False,
            rngs=nnx.Rngs(0),
            **settings,
        )
        assert ours(x).dtype == (jnp.bfloat16 if preferred is None else preferred)
    with pytest.raises(ValueError, match=r"SlideLinear: .*dot_general"):
        sj.nnx.SlideLinear(64, 8, dot_general=jnp.dot, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"preferred_element_type .*int32"):
        sj.nnx.SlideLinear(64, 8, preferred_element_type=jnp.int32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("qdtype", [None, "int8"])
@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_wrappers_that_compute_a_kernel_are_refused_around_a_packed_one(wrapper, qdtype):
    layer = sj.nnx.SlideLinear(16, 8, qdtype=qdtype, rngs=nnx.Rngs(0))
    wrapped = wrapper(nnx.Sequential(layer, nnx.relu), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=f"SlideLinear is packed, and nnx.{wrapper.__name__}"):
        wrapped(data(2, 16))
    wrapper(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))(
        layer(data(2, 16))[:, :1].repeat(16, 1)
    )


@pytest.mark.parametrize(
    "chosen", [nnx.PathContains("bias"), nnx.PathContains("free"), nnx.Nothing()]
)
def test_a_wrapper_that_leaves_the_packed_kernel_alone_runs(chosen):
    class Model(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
            self.free = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.free(self.layer(x))

    x, report = data(2, 16), sj.Report()
    wrapped = nnx.WeightNorm(
        Model(), feature_axes=None, variable_filter=chosen, use_scale=False, rngs=nnx.Rngs(2)
    )
    rules = [(".*/layer/kernel", FLOAT)]
    converted = sj.nnx.convert(wrapped, rules, report=report)
    assert [line.path for line in report.converted] == ["layer_instance/layer/kernel"]
    kernel = sj.unpack(converted.layer_instance.layer.kernel)
    wrapped.layer_instance.layer.kernel.set_value(kernel)
    want = wrapped(x)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(converted, x), want, rtol=1e-5)
    np.testing.assert_allclose(converted(x), want, rtol=1e-5)


@pytest.mark.parametrize("chosen", [nnx.PathContains("values"), nnx.Param, ..., nnx.Not("bias")])
def test_a_wrapper_that_reaches_a_leaf_of_a_packed_kernel_is_refused(chosen):
    layer = sj.nnx.SlideLinear(16, 8, qdtype=None, rngs=nnx.Rngs(0))
    wrapped = nnx.WeightNorm(layer, variable_filter=chosen, use_scale=False, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"SlideLinear is packed, and nnx\.WeightNorm"):
        wrapped(data(2, 16))


def test_a_kernel_is_set_by_converting():
    dense = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    packed = sj.nnx.convert(dense, "6:8")
    with pytest.raises(AttributeError, match="SlideLinear is packed and cannot be set"):
        packed.kernel = dense.kernel
    with pytest.raises(AttributeError, match="SlideLinear is packed and cannot be set"):
        nnx.update(packed, nnx.state(dense))

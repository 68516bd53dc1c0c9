"""Our NNX layers take what Flax's take, and give the same: arguments, shapes, dtypes, values.

A weight of the pattern "dense" without 8-bit values computes what the layer computed before, so
Flax's own layer says what is right. `REFUSED` lists the arguments that a packed kernel cannot
honour.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import agree, data

import slidejax as sj

FLOATS = (jnp.float32, jnp.float16, jnp.bfloat16)
RULE = sj.Rule("dense", qdtype=None)
SlideLinear = functools.partial(sj.nnx.SlideLinear, pattern="dense", qdtype=None)
WIDE = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)

# Why a packed kernel cannot do what the dense layer does, and the arguments that ask for it.
REFUSED = {
    "float32, got complex64|complex64": [{"param_dtype": jnp.complex64}, {"dtype": jnp.complex64}],
    "product of its own": [{"dot_general": lambda *a, **k: jax.lax.dot_general(*a, **k)}],
    "preferred_element_type must be": [{"preferred_element_type": jnp.complex64}],
}


def check_linear(x, out_features=4, rounded_to=None, **kwargs):
    kwargs = {"bias_init": nnx.initializers.normal(), **kwargs}
    dense = nnx.Linear(x.shape[-1], out_features, rngs=nnx.Rngs(0), **kwargs)
    ours = SlideLinear(x.shape[-1], out_features, rngs=nnx.Rngs(0), **kwargs)
    want = dense(x)
    agree(ours(x), want, rounded_to)
    np.testing.assert_array_equal(sj.unpack(ours.kernel), dense.kernel.get_value())
    assert (ours.bias is None) == (dense.bias is None)
    check_converted(dense, x, want, rounded_to)


def check_converted(layer, x, want, rounded_to=None):
    report = sj.Report()
    converted = sj.nnx.convert(layer, RULE, report=report)
    assert len(report.converted) == 1, str(report)
    agree(converted(x), want, rounded_to)


@pytest.mark.parametrize("x_dtype", [*FLOATS, jnp.int32])
@pytest.mark.parametrize(
    ("param_dtype", "dtype"), [(jnp.float16, None), (jnp.float32, jnp.bfloat16)]
)
def test_dtypes_of_linear(x_dtype, param_dtype, dtype):
    check_linear(data(2, 8, dtype=x_dtype), param_dtype=param_dtype, dtype=dtype)


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (1, 1, 1, 8), (0, 8)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_shapes_of_linear(shape, use_bias):
    check_linear(data(*shape), use_bias=use_bias)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": jax.lax.Precision.HIGH},
        {"preferred_element_type": jnp.float32, "dtype": jnp.float16},
        {"preferred_element_type": jnp.float16, "use_bias": False},
        # the bias makes the result wide again
        {"preferred_element_type": jnp.float16, "rounded_to": jnp.float16},
        {"kernel_init": nnx.initializers.ones, "bias_init": nnx.initializers.ones},
        {"kernel_init": nnx.initializers.zeros},
        {"promote_dtype": lambda xs, dtype: tuple(x.astype(jnp.bfloat16) for x in xs)},
    ],
)
def test_arguments_of_linear(options):
    check_linear(data(3, 8), **options)


@pytest.mark.parametrize(
    ("shape", "args", "options"),
    [
        ((1, 8), (8, 3), {}),
        ((1, 8), (8, (3, 4)), {}),
        ((3, 4, 2), ((4, 2), 5), {"axis": (-2, -1)}),
        ((3, 4, 2), (4, (5, 6)), {"axis": 1}),
        ((2, 3, 8), (8, 4), {"batch_axis": {0: 2}}),
        ((1, 8), (8, 3), {"dtype": jnp.float16, "preferred_element_type": jnp.float32}),
        ((1, 8), (8, (3, 4)), {"param_dtype": jnp.bfloat16, "use_bias": False}),
        ((1, 8), (8, 3), {"dtype": jnp.float16, "dot_general": WIDE}),
    ],
)
def test_linear_general(shape, args, options):
    layer = nnx.LinearGeneral(
        *args, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(), **options
    )
    check_converted(layer, data(*shape), layer(data(*shape)))


@pytest.mark.parametrize(
    ("equation", "shape", "kernel", "bias", "options"),
    [
        ("defab,bcef->adefc", (8, 6, 7, 3, 4), (4, 5, 6, 7), (6, 7, 5), {}),
        ("ab,bc->ac", (3, 4), (4, 5), (5,), {"preferred_element_type": jnp.float32}),
        ("ab,bc->ac", (3, 4), (4, 5), None, {"dtype": jnp.float16}),
    ],
)
def test_einsum(equation, shape, kernel, bias, options):
    layer = nnx.Einsum(equation, kernel, bias, rngs=nnx.Rngs(0), **options)
    check_converted(layer, data(*shape), layer(data(*shape)))


def test_the_arguments_of_linear_have_their_names_and_order():
    def names(cls):
        return list(inspect.signature(cls.__init__).parameters)

    ours = [name for name in names(sj.nnx.SlideLinear) if name in names(nnx.Linear)]
    assert ours == names(nnx.Linear)
    assert {*names(sj.nnx.SlideLinear)} - {*ours} == {"pattern", "qdtype", "implementation"}


def test_layers_that_differ_in_their_values_have_one_graph():
    def made(init):
        return SlideLinear(8, 4, rngs=nnx.Rngs(0), kernel_init=init, bias_init=init)

    zeros, ones = made(nnx.initializers.zeros), made(nnx.initializers.ones)
    assert nnx.graphdef(zeros) == nnx.graphdef(ones)


def test_metadata_reaches_the_variables():
    layer = SlideLinear(
        64,
        4,
        rngs=nnx.Rngs(0),
        kernel_metadata={"out_sharding": ("inputs", "outputs"), "eager_sharding": False},
        bias_metadata={"out_sharding": ("outputs",), "eager_sharding": False},
    )
    assert layer.bias.get_metadata()["out_sharding"] == ("outputs",)
    assert "outputs" in layer.values.get_metadata()["out_sharding"]


REASONS = [(reason, options) for reason, cases in REFUSED.items() for options in cases]


@pytest.mark.parametrize(("reason", "options"), REASONS, ids=range(len(REASONS)))
def test_what_is_refused_says_why(reason, options):
    x = data(2, 8)
    nnx.Linear(8, 4, rngs=nnx.Rngs(0), **options)(x)  # Flax takes it
    with pytest.raises(ValueError, match=reason):
        SlideLinear(8, 4, rngs=nnx.Rngs(0), **options)(x)


def test_an_einsum_op_of_its_own_stays_dense():
    def op(*args, **kwargs):
        return jnp.einsum(*args, **kwargs)[None]

    layer, report = nnx.Einsum("ab,bc->ac", (3, 4), einsum_op=op, rngs=nnx.Rngs(0)), sj.Report()
    kept = sj.nnx.convert(layer, RULE, report=report)
    assert "einsum_op of its own" in report.skipped["kernel"]
    assert kept(data(2, 3)).shape == (1, 2, 4)

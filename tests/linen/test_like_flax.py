"""Our layers take what Flax's take, and give the same: arguments, shapes, dtypes, values.

A weight of the pattern "dense" without 8-bit values computes what the layer computed before, so
Flax's own layer says what is right. `REFUSED` lists the arguments that a packed kernel cannot
honour.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import each
from flax import errors
from flax_layers import agree, data

import slidejax as sj

KEY = jax.random.key(0)
FLOATS = (jnp.float32, jnp.float16, jnp.bfloat16)
RULE = sj.Rule("dense", qdtype=None)
SlideDense = functools.partial(sj.linen.SlideDense, pattern="dense", qdtype=None)
WIDE = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
NARROW = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.bfloat16)

# Why a packed kernel cannot do what the dense layer does, and the arguments that ask for it.
REFUSED = {
    "bfloat16, float16 or float32, got complex64|complex64": [
        (lambda cls: cls(4, param_dtype=jnp.complex64), jnp.ones((2, 8))),
        (lambda cls: cls(4, dtype=jnp.complex64), jnp.ones((2, 8))),
        (lambda cls: cls(4), jnp.ones((2, 8), jnp.complex64)),
    ],
    "product of its own": [
        (lambda cls: cls(4, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)), jnp.ones(8)),
        (lambda cls: cls(4, dot_general_cls=lambda: jax.lax.dot_general), jnp.ones(8)),
    ],
}


def check_dense(x, *args, rounded_to=None, **kwargs):
    """`SlideDense` against `nn.Dense`, and a converted `nn.Dense` too."""
    kwargs = {"bias_init": nn.initializers.normal(), **kwargs}
    dense = nn.Dense(*args, **kwargs)
    want, variables = dense.init_with_output(KEY, x)
    got, mine = SlideDense(*args, **kwargs).init_with_output(KEY, x)
    agree(got, want, rounded_to)
    kernel, packed = variables["params"]["kernel"], mine["params"]["kernel"]
    assert packed.dtype == kernel.dtype and mine.keys() == variables.keys()
    np.testing.assert_array_equal(sj.unpack(packed), kernel)
    check_converted(dense, variables, x, want, rounded_to)


def check_converted(model, variables, x, want, rounded_to=None):
    report = sj.Report()
    converted = sj.linen.convert(variables, RULE, model, x, report=report)
    assert len(report.converted) == 1, str(report)
    agree(sj.linen.apply(model, converted, x), want, rounded_to)


@pytest.mark.parametrize(
    ("x_dtype", "dtypes"),
    each(
        [*FLOATS, jnp.int32],
        [(jnp.float32, None), (jnp.bfloat16, None), (jnp.float32, jnp.float16)],
    ),
)
def test_dtypes_of_dense(x_dtype, dtypes):
    param_dtype, dtype = dtypes
    check_dense(data(2, 8, dtype=x_dtype), 4, param_dtype=param_dtype, dtype=dtype)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8), (1, 1, 1, 1, 8), (0, 8), (2, 0, 8)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_shapes_of_dense(shape, use_bias):
    check_dense(data(*shape), 5, use_bias=use_bias)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": jax.lax.Precision.DEFAULT},
        {"precision": "highest"},
        {"precision": (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST)},
        {"dot_general": jax.lax.dot_general},
        {"dot_general": WIDE, "dtype": jnp.float16},
        {"dot_general": NARROW, "use_bias": False},
        {"dot_general": NARROW, "rounded_to": jnp.bfloat16},  # the bias makes the result wide again
        {"kernel_init": nn.initializers.ones, "bias_init": nn.initializers.ones},
        {"kernel_init": nn.initializers.zeros},
        {"kernel_init": nn.initializers.constant(0.5), "features": 1},
        {"promote_dtype": lambda *arrays, dtype: [a.astype(jnp.bfloat16) for a in arrays]},
    ],
)
def test_arguments_of_dense(options):
    options = {"features": 4, **options}
    check_dense(data(3, 8), **options)


def test_the_fields_of_dense_have_their_names_order_and_defaults():
    of_flax, ours = nn.Dense.__dataclass_fields__, sj.linen.SlideDense.__dataclass_fields__
    names = [name for name in of_flax if name not in ("parent", "name")]
    assert list(ours)[: len(names)] == names
    layer, flax = sj.linen.SlideDense(4), nn.Dense(4)
    for name in ("use_bias", "dtype", "param_dtype", "precision", "dot_general", "dot_general_cls"):
        assert getattr(layer, name) == getattr(flax, name)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 8), {"features": 4}),
        ((3, 8), {"features": (4, 5)}),
        ((3, 8), {"features": [4, 5]}),
        ((3, 4, 2), {"features": 5, "axis": (-2, -1)}),
        ((3, 4, 2), {"features": 5, "axis": (-1, 1)}),
        ((3, 4, 2), {"features": 5, "axis": 1}),
        ((3, 4, 2), {"features": (5, 2), "axis": 0}),
        ((4, 2), {"features": 3, "axis": (0, 1)}),
        ((2, 3, 8), {"features": 4, "batch_dims": 0}),
        ((2, 3, 4, 5), {"features": (6, 7), "axis": (-2, 3), "batch_dims": (0,)}),
        ((2, 3, 4, 5), {"features": 6, "axis": (2, 3), "batch_dims": (0, 1)}),
        ((2, 3, 8), {"features": 4, "use_bias": False, "batch_dims": 0}),
        ((2, 0, 8), {"features": (4, 2)}),
        ((3, 8), {"features": (4, 5), "dtype": jnp.bfloat16, "dot_general": WIDE}),
        ((3, 8), {"features": (4, 5), "param_dtype": jnp.float16}),
    ],
)
def test_dense_general(shape, options):
    model = nn.DenseGeneral(**options, bias_init=nn.initializers.normal())
    want, variables = model.init_with_output(KEY, data(*shape))
    check_converted(model, variables, data(*shape), want)


@pytest.mark.parametrize(
    ("equation", "shape", "kernel", "options"),
    [
        ("abc,cde->abde", (3, 4, 5), (5, 6, 7), {}),
        ("abcd,cdef->abef", (3, 4, 5, 6), (5, 6, 7, 8), {}),
        ("abcd,eafc->bfed", (3, 4, 5, 6), (7, 3, 8, 5), {"use_bias": False}),
        ("abcd,cbedf->abfe", (3, 4, 5, 6), (5, 4, 7, 6, 8), {}),
        ("...c,cd->...d", (3, 4, 5), (5, 6), {"preferred_element_type": jnp.float32}),
        ("  ab c, c d->a bd ", (3, 4, 5), (5, 6), {"dtype": jnp.bfloat16}),
    ],
)
def test_einsum(equation, shape, kernel, options):
    model = nn.Einsum(kernel, equation, bias_init=nn.initializers.normal(), **options)
    want, variables = model.init_with_output(KEY, data(*shape))
    check_converted(model, variables, data(*shape), want)


REASONS = [(reason, make, x) for reason, cases in REFUSED.items() for make, x in cases]


@pytest.mark.parametrize(("reason", "make", "x"), REASONS, ids=range(len(REASONS)))
def test_what_is_refused_says_why(reason, make, x):
    make(nn.Dense).init_with_output(KEY, x)  # Flax takes it
    with pytest.raises(ValueError, match=reason):
        make(SlideDense).init_with_output(KEY, x)


@pytest.mark.parametrize("equation", ["abcd,abcd->abd", "abcd,abcd->abcd", "ab...,bc...->ac..."])
def test_an_einsum_that_is_no_product_of_matrices_stays_dense(equation):
    kernel = (4, 5, 6) if "..." in equation else (3, 4, 5, 6)
    model = nn.Einsum(kernel, equation)
    x, report = data(3, 4, 6) if "..." in equation else data(3, 4, 5, 6), sj.Report()
    want, variables = model.init_with_output(KEY, x)
    converted = sj.linen.convert(variables, RULE, model, x, report=report)
    assert not report.converted and "einsum" in report.skipped["kernel"]
    np.testing.assert_array_equal(sj.linen.apply(model, converted, x), want)


@pytest.mark.parametrize("cls", [nn.Dense, SlideDense])
def test_parameters_of_other_inputs_are_an_error(cls):
    variables = cls(4).init(KEY, data(2, 8))
    with pytest.raises((ValueError, errors.ScopeParamShapeError)):
        cls(4).apply(variables, data(2, 9))

"""The lift and quantise kernel against the formulas, bit for bit."""

import cuda_formulas as formulas
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import slidejax as sj
from slidejax.ops.cuda import calls, library

pytestmark = pytest.mark.gpu

GROUPS = (0, 4, 6, 8, 10, 12, 14, 16)
IN = (jnp.bfloat16, jnp.float16, jnp.float32)
OUT = (jnp.int8, jnp.float8_e4m3fn, jnp.bfloat16, jnp.float16, jnp.float32)


@pytest.fixture(autouse=True)
def _library():
    if reason := library.missing():
        pytest.fail(f"a GPU without the library: {reason}")


def run(x, group, dtype, absmax=None, width=None):
    columns = (
        formulas.lift(np.zeros((1, x.shape[1]), np.int8), group).shape[1]
        if width is None
        else width
    )
    absmax = jnp.zeros(0, jnp.float32) if absmax is None else jnp.asarray(absmax)

    @jax.jit
    def call(x, absmax):
        return calls.lift_quantize_call(x, absmax, group=group, lifted_columns=columns, dtype=dtype)

    return [np.asarray(part) for part in call(jnp.asarray(x), absmax)]


def check(x, group, dtype, absmax=None):
    codes, scale = run(x, group, dtype, absmax)
    expected, expected_scale = formulas.quantize(x, dtype, absmax)
    np.testing.assert_array_equal(scale, expected_scale)
    # Of unquantised rows with nan any nan will do.
    bad = ~np.isfinite(expected_scale) & (np.dtype(dtype).itemsize > 1)
    got, want = codes[~bad], formulas.lift(expected, group)[~bad]
    assert got.shape == want.shape
    if np.dtype(dtype).itemsize == 1:  # codes of +0 and -0 are equal
        got, want = got.astype(np.float32), want.astype(np.float32)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", OUT, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("x_dtype", IN, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("group", GROUPS)
def test_codes_and_scales(group, x_dtype, dtype):
    for rows, columns in ((5, 448), (3, 1001), (2, 2049)):
        check(formulas.values(rows, columns, x_dtype, seed=columns), group, dtype)


@pytest.mark.parametrize(
    "columns", [1, 2, 7, 8, 15, 33, 129, 255, 257, 1999, 3584, 5003, 18944, 65536, 70001]
)
@pytest.mark.parametrize("group", [0, 6, 8, 14])
def test_any_number_of_columns(group, columns):
    for rows in (1, 3):
        for x_dtype in (jnp.bfloat16, jnp.float32):
            check(formulas.values(rows, columns, x_dtype, seed=columns), group, jnp.int8)


@pytest.mark.parametrize("rows", [1, 2, 127, 4223, 4224, 4225, 9001])
def test_any_number_of_rows(rows):
    check(formulas.values(rows, 96, jnp.bfloat16), 8, jnp.int8)
    check(formulas.values(rows, 100, jnp.bfloat16), 8, jnp.float8_e4m3fn)


@pytest.mark.parametrize("dtype", OUT, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("columns", [512, 515])
def test_rows_with_inf_nan_zero_and_subnormals(columns, dtype):
    for x_dtype in IN:
        x = formulas.values(8, columns, x_dtype)
        x[1, 3], x[2, columns - 1], x[3, 5], x[4] = np.inf, -np.inf, np.nan, 0
        x[5] = -0.0
        # The scale of this row would be subnormal.
        x[6] = float(jnp.finfo(jnp.bfloat16).tiny) if x_dtype != jnp.float16 else 0
        codes, scale = run(x, 8, dtype)
        assert np.isnan(scale[1:4]).all() and np.isfinite(np.delete(scale, [1, 2, 3])).all()
        if np.dtype(dtype).itemsize == 1:
            assert (codes[1:7].astype(np.float32) == 0).all() and (scale[4:7] == 1).all()
        check(x, 8, dtype)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "float8_e4m3fn"])
def test_given_absmax(dtype):
    x = formulas.values(6, 700, jnp.bfloat16)
    absmax = np.abs(x.astype(np.float32)).max(1) * np.float32(3)
    absmax[1:4] = np.nan, np.inf, 0
    absmax[4] /= 7  # clips
    check(x, 8, dtype, absmax)


def test_quantise_only_pads():
    x = formulas.values(4, 1000, jnp.bfloat16)
    for width in (1000, 1003, 1024):
        codes, _ = run(x, 0, jnp.int8, width=width)
        np.testing.assert_array_equal(codes[:, :1000], formulas.quantize(x, np.int8)[0])
        assert codes.shape == (4, width) and (codes[:, 1000:] == 0).all()


def test_every_rounding_boundary_of_e4m3():
    """All midpoints between neighbouring codes, and the floats next to them."""
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middle = (codes[1:] + codes[:-1]) / 2
    row = np.concatenate(
        [codes, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))]
    )
    check(np.concatenate([row, -row])[None], 8, jnp.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("x_dtype", IN, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("pattern", ["6:8", "4:6"])
@pytest.mark.parametrize(("rows", "columns"), [(700, 3584), (5, 1001), (3, 18944)])
def test_prologues_in_the_kernel(rows, columns, pattern, x_dtype, dtype):
    """Against XLA's prologue in front of the lift: now and then a code rounds the other way."""
    rng = np.random.default_rng(0)
    x, up = (jnp.asarray(rng.standard_normal((rows, columns)) + 0.3, x_dtype) for _ in range(2))
    weight, bias = (
        jnp.asarray(1 + rng.standard_normal(columns) / 4, jnp.float32) for _ in range(2)
    )
    fused = jax.jit(lambda x, p: sj.lift_quantize(x, pattern, dtype, prologue=p))
    unfused = jax.jit(lambda x, p: sj.lift_quantize(p.apply(x), pattern, dtype))
    for prologue in (
        sj.RMSNorm(weight, 1e-5),
        sj.LayerNorm(weight, bias),
        sj.Activation("gelu"),
        sj.GLU(up),
    ):
        assert "slidejax_lift_quantize_fused" in fused.lower(x, prologue).as_text()
        (codes, scale), (expected, expected_scale) = fused(x, prologue), unfused(x, prologue)
        near = np.abs(np.asarray(scale / expected_scale) - 1)[:, 0]
        assert near.max() < 1e-2 and (near < 2e-5).mean() > 0.5
        steps = np.abs(np.asarray(codes, np.float32) - np.asarray(expected, np.float32))[
            near < 2e-5
        ]
        assert (steps > 0).mean() < 5e-3 and (dtype != jnp.int8 or steps.max() <= 1)


@pytest.mark.parametrize(("rows", "columns"), [(300, 448), (5, 1001), (700, 14336)])
def test_a_gate_and_up_side_by_side_glu(rows, columns):
    gate, up = (
        jax.random.normal(jax.random.key(i), (rows, columns), jnp.bfloat16) for i in range(2)
    )
    got = jax.jit(lambda x: sj.lift_quantize(x, "6:8", prologue=sj.GLU()))(
        jnp.concatenate([gate, up], -1)
    )
    want = jax.jit(lambda x, up: sj.lift_quantize(x, "6:8", prologue=sj.GLU(up)))(gate, up)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_calls_are_refused():
    x = jnp.ones((4, 64), jnp.bfloat16)
    for group, width in ((8, 64), (8, 97), (5, 96), (0, 63)):
        with pytest.raises(Exception, match="lift_quantize"):
            run(x, group, jnp.int8, width=width)

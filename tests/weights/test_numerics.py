import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidejax.weights import numerics

DTYPES = [("int8", 127), ("float8_e4m3fn", 448)]


def oracle(x, dtype, qmax):
    """The formulas of the module in numpy."""
    absmax = np.abs(x.astype(np.float32)).max(-1, keepdims=True)
    scale = absmax * np.float32(1 / qmax)
    scaled = x.astype(np.float32) * (np.float32(1) / scale)
    codes = np.clip(scaled, -qmax, qmax)
    return (
        np.rint(codes).astype(np.int8) if dtype == "int8" else codes.astype(ml_dtypes.float8_e4m3fn)
    ), scale


@pytest.mark.parametrize(("dtype", "qmax"), DTYPES)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 8))
def test_matches_numpy_bit_for_bit(dtype, qmax, seed, spread):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((7, 65)) * np.exp(rng.standard_normal((7, 1)) * spread)).astype(
        np.float32
    )
    codes, scale = jax.jit(lambda x: numerics.encode(x, numerics.absmax(x, -1), dtype))(x)
    expected, expected_scale = oracle(x, dtype, qmax)
    np.testing.assert_array_equal(np.asarray(scale), expected_scale)
    np.testing.assert_array_equal(np.asarray(codes).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize(("dtype", "qmax"), DTYPES)
def test_every_e4m3_tie_and_neighbour(dtype, qmax):
    """Midpoints between codes, and the floats just beside them, round as the type's own cast."""
    grid = (
        np.arange(-qmax, qmax + 1)
        if dtype == "int8"
        else np.unique(
            np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        )
    )
    grid = grid[np.isfinite(grid)].astype(np.float32)
    ties = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate(
        [grid, ties, np.nextafter(ties, np.float32(1e9)), np.nextafter(ties, np.float32(-1e9))]
    )[None]
    codes, scale = numerics.encode(x, jnp.full((1, 1), qmax, jnp.float32), dtype)
    inverse = np.float32(1) / np.asarray(scale)
    expected = np.clip(x * inverse, -qmax, qmax)
    expected = (
        np.rint(expected).astype(np.int8)
        if dtype == "int8"
        else expected.astype(ml_dtypes.float8_e4m3fn)
    )
    np.testing.assert_array_equal(np.asarray(codes).astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize(("dtype", "qmax"), DTYPES)
def test_silent_and_broken_rows(dtype, qmax):
    x = np.ones((5, 9), np.float32)
    x[0], x[1, 3], x[2, 0], x[3] = 0, np.inf, np.nan, 1e-37
    codes, scale = numerics.encode(x, numerics.absmax(x, -1), dtype)
    codes, scale = np.asarray(codes).astype(np.float32), np.asarray(scale)[:, 0]
    assert scale[0] == 1 and (codes[0] == 0).all()
    assert np.isnan(scale[1]) and np.isnan(scale[2])
    assert scale[3] == 1 and (codes[3] == 0).all(), "a subnormal scale counts as zero"
    assert scale[4] == np.float32(1 / qmax) and (codes[4] == qmax).all()


def test_dtype_check():
    assert numerics.check_dtype("bfloat16") == jnp.bfloat16
    for bad in ("int4", "float64", jnp.uint8):
        with pytest.raises(ValueError, match="int8"):
            numerics.check_dtype(bad)
    with pytest.raises(ValueError, match="what"):
        numerics.check_dtype("nonsense", "what")


@pytest.mark.parametrize("rows", [1, 3, 16, 256])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_no_maximum_hides_nan(rows, bad):
    """XLA's maximum on a CPU loses nan in all but small arrays that are arguments."""
    x = np.random.default_rng(rows).normal(size=(rows, 1024)).astype(np.float32)
    x[0, 5] = bad
    for dtype in ("float32", "bfloat16"):
        found = np.asarray(jax.jit(lambda x: numerics.absmax(x, -1))(jnp.asarray(x, dtype)))
        assert found[0] == np.inf and np.isfinite(found[1:]).all()
    whole = np.asarray(numerics.absmax(jnp.full((rows, 1024), bad), -1))
    assert (whole == np.inf).all()

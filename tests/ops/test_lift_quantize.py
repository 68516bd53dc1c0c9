import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from patterns import PATTERNS

import slidejax as sj
from slidejax.ops.lift_quantize import lift, unlift
from slidejax.weights import numerics

DTYPES = ["int8", "float8_e4m3fn", "bfloat16", "float16", "float32"]


def random_x(seed, shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_lifted_order(pattern):
    """lifted[m, g, w, l] = x[m, 2N g + 2 w + l], zero-padded: the contract, element by element."""
    p = sj.Pattern.parse(pattern)
    columns = 2 * p.block - 5
    x = np.arange(1.0, 3 * columns + 1, dtype=np.float32).reshape(3, columns)
    lifted, scale = sj.lift_quantize(x, pattern, "float32")
    assert lifted.shape == (3, p.lifted(columns)) and (scale == 1).all()
    cube = np.asarray(lifted).reshape(3, -1, p.windows, 4)
    for g, w, lane in np.ndindex(cube.shape[1:]):
        column = p.group * g + 2 * w + lane
        np.testing.assert_array_equal(cube[:, g, w, lane], x[:, column] if column < columns else 0)


@examples(6)
@given(
    st.sampled_from(PATTERNS),
    st.sampled_from(["int8", "float8_e4m3fn"]),
    st.sampled_from([1, 7, 64, 200]),
    st.integers(0, 999),
)
def test_lifting_and_quantising_commute(pattern, dtype, columns, seed):
    p = sj.Pattern.parse(pattern)
    x = random_x(seed, (4, columns))
    lifted, scale = sj.lift_quantize(x, pattern, dtype)
    codes, expected_scale = numerics.encode(x, numerics.absmax(x, -1), dtype)
    np.testing.assert_array_equal(
        np.asarray(lifted, np.float32), np.asarray(lift(codes, p), np.float32)
    )
    np.testing.assert_array_equal(scale, expected_scale)
    back = np.asarray(unlift(lifted, p), np.float32)
    np.testing.assert_array_equal(back[:, :columns], np.asarray(codes, np.float32))
    assert not back[:, columns:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
def test_broken_rows_have_scale_nan(dtype, x_dtype):
    x = random_x(0, (4, 20), x_dtype).at[1, 3].set(jnp.inf).at[2, 0].set(jnp.nan)
    lifted, scale = jax.jit(lambda x: sj.lift_quantize(x, "6:8", dtype))(x)
    assert np.isnan(scale[:, 0]).tolist() == [False, True, True, False]
    assert lifted.dtype == dtype and scale.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(0, 20), (2, 0, 20), (20,), (2, 3, 20)])
def test_leading_axes(shape):
    x = random_x(0, shape)
    lifted, scale = sj.lift_quantize(x, "6:8")
    assert lifted.shape == (*shape[:-1], 96) and scale.shape == (*shape[:-1], 1)


def test_transformations():
    x = random_x(0, (3, 4, 40))
    lifted, scale = sj.lift_quantize(x, "6:8", "int8")
    for fn in (
        jax.vmap(lambda x: sj.lift_quantize(x, "6:8")),
        jax.vmap(jax.vmap(lambda x: sj.lift_quantize(x, "6:8"))),
    ):
        for a, b in zip(fn(x), (lifted, scale), strict=True):
            np.testing.assert_array_equal(a, b)
    scanned = jax.lax.scan(lambda c, row: (c, sj.lift_quantize(row, "6:8")), 0, x)[1]
    np.testing.assert_array_equal(scanned[0], lifted)


def test_gradient_adds_up_over_windows():
    x = random_x(0, (2, 20))
    cotangent = random_x(1, (2, 96))
    grad = jax.grad(lambda x: (sj.lift_quantize(x, "6:8", "float32")[0] * cotangent).sum())(x)
    expected = jax.grad(lambda x: (lift(x, sj.Pattern.parse("6:8")) * cotangent).sum())(x)
    np.testing.assert_allclose(grad, expected, rtol=1e-6)
    # Straight-through: the same over the scale, with the cotangent in the codes' own dtype.
    rounded = cotangent.astype(jnp.float8_e4m3fn)
    codes, pullback = jax.vjp(lambda x: sj.lift_quantize(x, "6:8", "float8_e4m3fn")[0], x)
    assert codes.dtype == rounded.dtype
    scale = sj.lift_quantize(x, "6:8", "float8_e4m3fn")[1]
    expected = (
        jax.grad(lambda x: (lift(x, sj.Pattern.parse("6:8")) * rounded.astype(jnp.float32)).sum())(
            x
        )
        / scale
    )
    np.testing.assert_allclose(pullback(rounded)[0], expected, rtol=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="x must be"):
        sj.lift_quantize(jnp.float32(1), "6:8")
    with pytest.raises(ValueError, match="x must be bfloat16"):
        sj.lift_quantize(jnp.ones((2, 8), jnp.int8), "6:8")
    with pytest.raises(ValueError, match="dtype"):
        sj.lift_quantize(jnp.ones((2, 8)), "6:8", "int16")
    with pytest.raises(ValueError, match="reduce_axis"):
        sj.lift_quantize(jnp.ones((2, 8)), "6:8", reduce_axis=())
    x, w = jnp.ones((2, 2, 8)), sj.pack(jnp.ones((8, 2)), "6:8", dtype="int8")
    for op in (
        lambda x: sj.lift_quantize(x, "6:8", reduce_axis="k"),
        lambda x: sj.linear(x, w, reduce_axis="k"),
        lambda x: sj.sparse_matmul(*sj.lift_quantize(x, "6:8"), w, reduce_axis="k"),
    ):  # an axis of a vmap is none of a mesh
        with pytest.raises(ValueError, match="reduce_axis must name mesh axes of the shard_map"):
            jax.vmap(op, axis_name="k")(x)

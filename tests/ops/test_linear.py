import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads
from linear_problem import close, problem
from patterns import PATTERNS

import slidejax as sj

DTYPES = ["int8", "float8_e4m3fn", "bfloat16", "float16", "float32"]
# The largest error of one rounding of a row and of the weights, relative to the largest output.
TOLERANCE = {
    "int8": 0.03,
    "float8_e4m3fn": 0.08,
    "bfloat16": 0.01,
    "float16": 2e-3,
    "float32": 1e-5,
}


@examples(6)
@given(
    st.sampled_from(PATTERNS),
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 1, 1), (3, 100, 24), (5, 129, 7)]),
    st.booleans(),
    st.integers(0, 999),
)
def test_equals_the_dense_layer(pattern, dtype, shape, with_bias, seed):
    x, w, bias = problem(seed, *shape, pattern, dtype)
    bias = bias if with_bias else None
    desired = x @ sj.unpack(w).astype(jnp.float32) + (0 if bias is None else bias)
    for implementation in ("dense", "reference"):
        close(sj.linear(x, w, bias, implementation=implementation), desired, TOLERANCE[dtype])


@examples(6)
@given(st.sampled_from(PATTERNS), st.sampled_from(DTYPES), st.integers(0, 999))
def test_is_the_product_of_the_lifted(pattern, dtype, seed):
    x, w, bias = problem(seed, 4, 90, 12, pattern, dtype)
    whole = sj.linear(x, w, bias, implementation="reference")
    parts = sj.sparse_matmul(
        *sj.lift_quantize(x, pattern, dtype),
        w,
        bias,
        out_dtype="float32",
        implementation="reference",
    )
    np.testing.assert_array_equal(whole, parts)
    dense = sj.sparse_matmul(
        *sj.lift_quantize(x, pattern, dtype), w, bias, out_dtype="float32", implementation="dense"
    )
    if dtype == "int8":  # integers: the same sums in any order
        np.testing.assert_array_equal(whole, dense)
        np.testing.assert_array_equal(whole, sj.linear(x, w, bias, implementation="dense"))
    close(whole, dense, 1e-5)


def test_int8_accumulators_are_exact():
    """Largest codes over a K far beyond float32's 24 bits of mantissa."""
    columns = 4200
    x = jnp.ones((2, columns)).at[1, ::2].set(-1)
    kernel = jnp.where(jnp.arange(columns)[:, None] % 8 < 2, 0, jnp.ones((columns, 3)))
    w = sj.pack(kernel, "6:8", dtype="int8")
    exact = np.rint(np.asarray(x) * 127) @ np.rint(np.asarray(kernel) * 127)
    expected = exact.astype(np.float32) * np.float32(np.float32(1 / 127)) * np.float32(1 / 127)
    for implementation in ("dense", "reference"):
        np.testing.assert_allclose(
            sj.linear(x, w, implementation=implementation), expected, rtol=2e-7
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype, x_dtype):
    x, w, bias = problem(0, 3, 40, 8, "6:8", dtype, x_dtype)
    assert sj.linear(x, w, bias).dtype == x_dtype
    assert sj.linear(x, w, bias.astype(x_dtype), out_dtype="float16").dtype == jnp.float16
    desired = x.astype(jnp.float32) @ sj.unpack(w).astype(jnp.float32) + bias
    close(
        sj.linear(x, w, bias, out_dtype=jnp.float32),
        desired,
        TOLERANCE[dtype] + (0.01 if x_dtype != "float32" else 0),
    )


@pytest.mark.parametrize("shape", [(40,), (0, 40), (1, 40), (2, 3, 40), (2, 0, 40)])
def test_leading_axes(shape):
    _, w, bias = problem(0, 1, 40, 8, "6:8", "int8")
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    y = sj.linear(x, w, bias)
    assert y.shape == (*shape[:-1], 8)
    if y.size:
        np.testing.assert_array_equal(y.reshape(-1, 8), sj.linear(x.reshape(-1, 40), w, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_row_stays_alone(dtype):
    x, w, bias = problem(0, 4, 40, 8, "6:8", dtype)
    x = x.at[1, 7].set(jnp.inf).at[2, 0].set(jnp.nan)
    for implementation in ("dense", "reference"):
        y = np.asarray(sj.linear(x, w, bias, implementation=implementation))
        assert (
            np.isnan(y).all(1).tolist() == [False, True, True, False]
            and np.isfinite(y[[0, 3]]).all()
        )


def test_jit_vmap_scan():
    x, w, bias = problem(0, 12, 40, 8, "6:8", "int8")
    y = sj.linear(x, w, bias)
    np.testing.assert_array_equal(jax.jit(sj.linear)(x, w, bias), y)
    batch = x.reshape(3, 4, 40)
    np.testing.assert_array_equal(
        jax.vmap(lambda x: sj.linear(x, w, bias))(batch).reshape(12, 8), y
    )
    np.testing.assert_array_equal(
        jax.lax.map(lambda x: sj.linear(x, w, bias), batch).reshape(12, 8), y
    )
    np.testing.assert_array_equal(
        jax.vmap(lambda x, b: sj.linear(x, w, b), (0, None))(batch, bias).reshape(12, 8), y
    )
    columns = jax.vmap(sj.linear, in_axes=(1, None, None), out_axes=1)(batch, w, bias)
    np.testing.assert_array_equal(columns.reshape(12, 8), y)


@pytest.mark.parametrize(
    ("in_axes", "pattern"),
    [
        ((None, 0, None), "6:8"),
        ((0, 0, None), "6:8"),
        ((0, 0, 0), "6:8"),
        ((None, None, 0), "6:8"),
        ((0, 0, None), "dense"),
    ],
)
def test_a_batch_of_weights(in_axes, pattern):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, 40) if in_axes[0] == 0 else (5, 40)), jnp.float32)
    kernel = jnp.asarray(
        rng.standard_normal((2, 40, 8) if in_axes[1] == 0 else (40, 8)), jnp.float32
    )
    bias = jnp.asarray(rng.standard_normal((2, 8) if in_axes[2] == 0 else (8,)), jnp.float32)
    w = sj.pack(kernel, pattern, dtype="int8")
    y = jax.jit(jax.vmap(sj.linear, in_axes=in_axes))(x, w, bias)
    for i in range(2):

        def pick(a, axis, i=i):
            return a if axis is None else jax.tree.map(lambda leaf: leaf[i], a)

        one = sj.linear(pick(x, in_axes[0]), pick(w, in_axes[1]), pick(bias, in_axes[2]))
        close(
            y[i], one, 1e-6
        )  # equal but for the last bit: compiled as a loop, the bias may be added by an FMA


@pytest.mark.parametrize("pattern", ["2:4", "6:8", "14:16", "dense"])
def test_gradients_of_float_packed(pattern):
    x, w, bias = problem(0, 5, 50, 6, pattern, "float32")
    mask = sj.unpack(w) != 0

    def sparse(x, values, bias):
        return (sj.linear(x, w.replace(values=values), bias) ** 2).sum()

    def dense(x, kernel, bias):
        return ((x @ kernel + bias) ** 2).sum()

    got = jax.grad(sparse, (0, 1, 2))(x, w.values, bias)
    want = jax.grad(dense, (0, 1, 2))(x, sj.unpack(w), bias)
    close(got[0], want[0], 1e-5)
    # The gradient of kept values is the kernel's gradient at the kept places.
    close(sj.unpack(w.replace(values=got[1])), jnp.where(mask, want[1], 0), 1e-5)
    close(got[2], want[2], 1e-5)
    check_grads(sparse, (x, w.values, bias), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)
    batched = jax.vmap(jax.grad(sparse, 1), (0, None, None))(x[:, None], w.values, bias)
    close(batched.sum(0), got[1], 1e-5)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantisation_is_straight_through(dtype):
    x, w, bias = problem(0, 5, 50, 6, "6:8", dtype)
    dx, dbias = jax.grad(lambda x, b: sj.linear(x, w, b).sum(), (0, 1))(x, bias)
    close(dx, jnp.ones((5, 6)) @ sj.unpack(w).T, 1e-5)
    close(dbias, jnp.full(6, 5.0), 1e-6)


def test_remat_and_padding_do_not_leak():
    x, w, bias = problem(0, 5, 50, 6, "6:8", "float32")
    loss = lambda x: (sj.linear(x, w, bias) ** 2).sum()  # noqa: E731
    close(jax.grad(jax.checkpoint(loss))(x), jax.grad(loss)(x), 1e-6)
    assert jax.grad(loss)(x).shape == x.shape


def test_bad_arguments():
    x, w, bias = problem(0, 3, 40, 8, "6:8", "int8")
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 40\]"):
        sj.linear(x[:, :39], w)
    with pytest.raises(ValueError, match="x must be bfloat16"):
        sj.linear(x.astype(jnp.int8), w)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\)"):
        sj.linear(x, w, bias[:3])
    with pytest.raises(ValueError, match="out_dtype"):
        sj.linear(x, w, out_dtype="int8")
    with pytest.raises(ValueError, match="implementation"):
        sj.linear(x, w, implementation="magic")
    with pytest.raises(TypeError, match="SlideWeight"):
        sj.linear(x, sj.unpack(w))
    with pytest.raises(ValueError, match="vmap over the batch"):
        sj.linear(x, sj.pack(jnp.ones((2, 40, 8)), "6:8"))
    shard = w.replace(values=w.values[:, :4], zeros=w.zeros[:, :4])
    with pytest.raises(ValueError, match="name the mesh axis"):
        sj.linear(x[:, :32], shard)


def test_a_leaf_without_numbers_is_named():
    """JAX's own error would name a number among operands."""
    x, w, _ = problem(0, 3, 40, 8, "6:8", "int8")
    of_shapes = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype))
    adapted, master = sj.adapters.add({"k": w}, rank=2)["k"], sj.trainable.masters(w)
    lifted = sj.lift_quantize(x, "6:8", "int8")
    for call, name in [
        (lambda: sj.linear(x, of_shapes(w)), "w.values"),
        (lambda: sj.linear(x, w.replace(scale=of_shapes(w.scale))), "w.scale"),
        (lambda: sj.linear(x, of_shapes(adapted)), "w.base.values"),
        (lambda: sj.linear(x, of_shapes(master)), "w.values"),
        (lambda: sj.sparse_matmul(*lifted, of_shapes(w)), "w.values"),
        (lambda: sj.linear_chain(x, [sj.Stage(of_shapes(w))]), r"stages\[0\].weight.values"),
        (lambda: sj.unpack(of_shapes(w)), "w.values"),
        (lambda: sj.prepare(of_shapes(w), "dense"), "w.values"),
        (lambda: sj.trainable.masters(of_shapes(w)), "w.values"),
        (lambda: sj.trainable.deploy(of_shapes(master)), "w.values"),
    ]:
        with pytest.raises(TypeError, match=f"{name} must be an array, got ShapeDtypeStruct"):
            call()
    assert jax.eval_shape(sj.linear, x, of_shapes(w)).shape == (3, 8)


@pytest.mark.parametrize("implementation", ["dense", "reference", None])
def test_what_becomes_infinite_in_the_values_dtype_is_nan(implementation):
    """On every implementation, in its own row; a number below the bound is not touched."""
    w = sj.pack(jnp.full((64, 3), 1e-3), "6:8", dtype="float16")
    x = jnp.ones((20, 64)).at[0, 3].set(65_520.0).at[1, 3].set(-1e6).at[2, 3].set(65_504.0)
    y = np.asarray(sj.linear(x, w, implementation=implementation))
    assert np.isnan(y[:2]).all() and np.isfinite(y[2:]).all()
    wide = sj.pack(jnp.full((64, 3), 1e-3), "6:8", dtype="bfloat16")
    y = np.asarray(sj.linear(x.at[0, 3].set(3.4e38), wide, implementation=implementation))
    assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()

"""The inputs of linear layers as matrices, and as 8-bit layers read them."""

import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.contraction import Contraction
from slidejax.prune.model.inputs import as_rows, rounded


def data(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("equation", "shape", "kernel"),
    [("abcd,dhk->ahbck", (2, 3, 4, 5), (5, 2, 3)), ("abcd,cdk->abk", (2, 3, 4, 5), (4, 5, 6))],
)
def test_the_matrix_times_the_kernels_matrix_is_the_product(equation, shape, kernel):
    x, w = data(*shape), data(*kernel)
    axes = Contraction.einsum(equation, x.ndim)
    matrix = as_rows(x, axes)
    w_matrix = w.reshape(matrix.shape[1], -1)
    got = sorted(np.asarray(matrix @ w_matrix).ravel())
    np.testing.assert_allclose(got, sorted(np.einsum(equation, x, w).ravel()), rtol=1e-4, atol=1e-4)


def test_rows_are_float32():
    x = data(2, 3, 4).astype(jnp.bfloat16)
    rows = as_rows(x, Contraction.dense(3))
    assert rows.shape == (6, 4) and rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, x.astype(jnp.float32).reshape(6, 4))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_rounding_is_that_of_the_layer(dtype):
    x = data(5, 64)
    codes, scale = sj.lift_quantize(x, "dense", dtype)
    want = np.asarray(codes, np.float32)[:, :64] * np.asarray(scale)
    got = rounded(x, Contraction.dense(2), jnp.dtype(dtype))
    np.testing.assert_array_equal(got, want)
    assert (
        rounded(x.astype(jnp.bfloat16), Contraction.dense(2), jnp.dtype(dtype)).dtype == "bfloat16"
    )

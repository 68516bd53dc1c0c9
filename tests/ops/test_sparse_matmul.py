"""`sparse_matmul` by itself; tests/ops/test_linear.py compares it with `linear`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_problem import close, problem

import slidejax as sj


@pytest.mark.parametrize("pattern", ["6:8", "dense"])
def test_gradients_of_lifted_products(pattern):
    x, w, bias = problem(0, 5, 50, 6, pattern, "float32")

    def parts(x, values, bias):
        return (
            sj.sparse_matmul(
                *sj.lift_quantize(x, pattern, "float32"), w.replace(values=values), bias
            )
            ** 2
        ).sum()

    def whole(x, values, bias):
        return (sj.linear(x, w.replace(values=values), bias) ** 2).sum()

    for a, b in zip(
        jax.grad(parts, (0, 1, 2))(x, w.values, bias),
        jax.grad(whole, (0, 1, 2))(x, w.values, bias),
        strict=True,
    ):
        close(a, b, 1e-5)


def test_leading_axes_and_the_default_dtype():
    x, w, bias = problem(0, 6, 50, 8, "6:8", "int8")
    lifted, scale = sj.lift_quantize(x.reshape(2, 3, 50), "6:8")
    y = sj.sparse_matmul(lifted, scale, w, bias)
    assert y.shape == (2, 3, 8) and y.dtype == jnp.bfloat16
    flat = sj.sparse_matmul(lifted.reshape(6, -1), scale.reshape(6, 1), w, bias)
    np.testing.assert_array_equal(y.reshape(6, 8), flat)
    wide = problem(0, 6, 50, 8, "6:8", "float32")[1]
    assert sj.sparse_matmul(*sj.lift_quantize(x, "6:8", "float32"), wide).dtype == jnp.float32


def test_bad_arguments():
    x, w, _ = problem(0, 3, 40, 8, "6:8", "int8")
    with pytest.raises(ValueError, match="lifted must be"):
        sj.sparse_matmul(x.astype(jnp.int8), jnp.ones((3, 1)), w)
    lifted, scale = sj.lift_quantize(x, "6:8")
    with pytest.raises(ValueError, match="dtype of the weight's values"):
        sj.sparse_matmul(lifted.astype(jnp.float32), scale, w)
    with pytest.raises(ValueError, match="scale must be float32"):
        sj.sparse_matmul(lifted, scale[:, 0], w)
    with pytest.raises(TypeError, match="SlideWeight"):
        sj.sparse_matmul(lifted, scale, sj.unpack(w))
    with pytest.raises(ValueError, match=", ".join(sj.implementations())):
        sj.sparse_matmul(lifted, scale, w, implementation="magic")

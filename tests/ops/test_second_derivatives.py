"""Derivatives of derivatives: gradient penalties, and Hessians by reverse mode twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj

KERNEL = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
SQUARE = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32) / 8
X = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
W = sj.pack(KERNEL, "6:8")
NORM = sj.RMSNorm(np.linspace(0.5, 2, 64, dtype=np.float32))


def penalty(fn):
    """The gradient of the squared length of a gradient."""
    return jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(jnp.tanh(fn(x))))(x) ** 2))


def compiled(fn):
    """That as a program, which is quicker than operation by operation."""
    return jax.jit(penalty(fn))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_penalty_on_the_gradient_of_x_is_that_of_the_dense_product(wrap):
    dense = sj.unpack(W)
    close(penalty(wrap(lambda x: sj.linear(x, W)))(X), penalty(lambda x: x @ dense)(X))


def test_a_penalty_on_the_gradient_of_values_is_that_of_the_dense_product():
    def dense(values):
        return X @ sj.unpack(W.replace(values=values))

    ours = compiled(lambda values: sj.linear(X, W.replace(values=values)))(W.values)
    close(ours, compiled(dense)(W.values))


def test_prologue_bias_and_residual_have_second_derivatives():
    dense, bias, residual = sj.unpack(W), jnp.arange(16.0) / 16, jnp.ones((3, 16))
    ours = compiled(lambda x: sj.linear(x, W, bias, prologue=NORM, residual=residual))(X)
    close(ours, compiled(lambda x: NORM.apply(x) @ dense + bias + residual)(X))


def test_a_hessian_by_reverse_mode():
    dense = sj.unpack(W)

    def hessian(fn):
        return jax.jit(jax.jacrev(jax.jacrev(lambda x: jnp.sum(jnp.tanh(fn(x))))))(X[0] / 8)

    close(hessian(lambda x: sj.linear(x[None], W)), hessian(lambda x: x[None] @ dense))


def test_chains_have_second_derivatives():
    square = sj.pack(SQUARE, "6:8")
    stages = [sj.Stage(square), sj.Stage(W)]
    ours = compiled(lambda x: sj.linear_chain(x, stages)[-1])(X)
    close(ours, compiled(lambda x: x @ sj.unpack(square) @ sj.unpack(W))(X))


def test_the_second_derivative_of_8_bit_weights_is_straight_through():
    w = sj.quantize(W, "int8")
    dense = sj.unpack(w)

    def curved(fn):
        slope = jax.grad(lambda x: jnp.sum(fn(x**2)))
        return jax.jit(jax.grad(lambda x: jnp.sum(slope(x) ** 2)))(X)

    close(curved(lambda x: sj.linear(x, w)), curved(lambda x: x @ dense))


def test_decode_attention_has_second_derivatives():
    keys = jnp.asarray(np.random.default_rng(3).standard_normal((2, 1, 4, 8)), jnp.float32)
    q, k = keys[:, :, 0] / 2, keys[:, :, 1]
    turns, positions = (jnp.ones((2, 4)), jnp.zeros((2, 4))), jnp.full(2, 3)

    def ours(q):
        return sj.decode_attention(q, k, k, keys, keys, positions, turns).y

    def theirs(q):
        held = keys.at[:, :, 3].set(k)
        weights = jax.nn.softmax(jnp.einsum("rhd,rhsd->rhs", q, held) * 8**-0.5)
        return jnp.einsum("rhs,rhsd->rhd", weights, held)

    np.testing.assert_allclose(compiled(ours)(q), compiled(theirs)(q), atol=1e-4)

"""Wanda: magnitudes weighted by the norm of each input (Sun et al., arXiv 2306.11695).

The two columns of lowest score of every group are pruned:

    score[k, o] = |W[k, o]| * ||x[:, k]||_2
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from slidejax.prune.arguments import check_gram
from slidejax.weights.layout import check_kernel
from slidejax.weights.magnitude import keep_largest
from slidejax.weights.numerics import unit
from slidejax.weights.pattern import Pattern

__all__ = ["wanda"]


def wanda(kernel: jax.Array, pattern: str | Pattern, gram: jax.Array) -> jax.Array:
    """The mask that keeps the weights with the highest scores of every group.

    The score of a weight is its magnitude times the norm of its input (Sun et al., arXiv
    2306.11695).

    Args:
      kernel: `[in, out]`, floating.
      pattern: such as `"6:8"`. "dense" keeps all weights.
      gram: float32 `[in, in]`, `x^T x` over the calibration inputs, or its diagonal `[in]`. Only
        the diagonal is read.

    Returns:
      bool `[in, out]`, True where a weight is kept.

    Raises:
      ValueError: for shapes that do not fit each other, a bad pattern, or a gram that is not
        finite.

    >>> kernel = jnp.array([[1.], [2.], [3.], [4.]])
    >>> wanda(kernel, "2:4", jnp.array([100., 100., 1., 1.])).ravel().tolist()
    [True, True, False, False]
    """
    kernel = check_kernel(kernel)
    if kernel.ndim != 2:
        raise ValueError(f"kernel must be [in, out], got shape {kernel.shape}")
    gram = check_gram(gram, kernel, diagonal=True)
    energy = jnp.diagonal(gram) if gram.ndim == 2 else gram
    return _wanda(kernel, energy, Pattern.parse(pattern))


@functools.partial(jax.jit, static_argnums=2)
def _wanda(kernel, energy, pattern: Pattern):
    size = jnp.abs(kernel.astype(jnp.float32) * unit(kernel))
    return keep_largest(size * jnp.sqrt(energy * unit(energy[:, None])[0])[:, None], pattern)

"""Magnitude pruning: every group loses its two columns of smallest magnitude."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from slidejax.weights import numerics
from slidejax.weights.layout import check_kernel, from_groups, to_groups
from slidejax.weights.pattern import Pattern

__all__ = ["magnitude"]


def magnitude(kernel: jax.Array, pattern: str | Pattern) -> jax.Array:
    """The mask that keeps the largest magnitudes of every group of inputs.

    Args:
      kernel: `[..., in, out]`, any float or integer dtype. A nan counts as the largest magnitude,
        so that it stays visible.
      pattern: such as `"6:8"`.

    Returns:
      bool `[..., in, out]`, True where a weight is kept. Missing columns of a last partial group
      count as pruned first. Of equal magnitudes the first column is pruned.

    Raises:
      ValueError: if `kernel` has fewer than two axes, or for a bad pattern.

    >>> magnitude(jnp.array([[4.], [-3.], [2.], [1.]]), "2:4").ravel().tolist()
    [True, True, False, False]
    """
    kernel = check_kernel(kernel)
    return _magnitude(kernel, Pattern.parse(pattern))


@functools.partial(jax.jit, static_argnums=1)
def _magnitude(kernel: jax.Array, pattern: Pattern) -> jax.Array:
    return keep_largest(jnp.abs(kernel.astype(jnp.float32)), pattern)


def keep_largest(score: jax.Array, pattern: Pattern) -> jax.Array:
    """The mask that drops the two columns of lowest score of every group.

    Magnitude and Wanda pruning share it. The pattern "dense" drops nothing.

    Args:
      score: float32 `[..., in, out]`, not negative. A nan counts as infinite.
      pattern: the `Pattern`.

    Returns:
      bool `[..., in, out]`.
    """
    if not pattern.prunes:
        return jnp.ones(score.shape, bool)
    score = jnp.where(jnp.isnan(score), jnp.inf, score)
    groups = to_groups(score, pattern, fill=-1.0)  # padding is dropped first
    column = numerics.of_rank(jnp.arange(pattern.group), groups.ndim)
    first = column == jnp.argmin(groups, axis=-1, keepdims=True)
    second = column == jnp.argmin(jnp.where(first, jnp.inf, groups), axis=-1, keepdims=True)
    # If all other columns are inf, the second argmin may find the first column again. Then any
    # other column is as good, and the next one is taken.
    again = jnp.any(first & second, axis=-1, keepdims=True)
    following = jnp.roll(first, 1, axis=-1)
    return from_groups(~(first | jnp.where(again, following, second)), score.shape[-2])

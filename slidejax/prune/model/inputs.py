"""The inputs of linear layers as matrices, and as 8-bit layers read them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from slidejax.contraction import Contraction
from slidejax.weights import numerics

__all__ = ["as_rows", "rounded"]


def as_rows(x: jax.Array, axes: Contraction) -> jax.Array:
    """A layer's input as a float32 matrix `[rows, in]`."""
    rest = tuple(a for a in range(x.ndim) if a not in axes.x_in)
    size = math.prod(x.shape[a] for a in axes.x_in)
    return jnp.transpose(x, (*rest, *axes.x_in)).reshape(-1, size).astype(jnp.float32)


def rounded(x: jax.Array, axes: Contraction, dtype) -> jax.Array:
    """The input of an 8-bit layer after rounding, in x's dtype."""
    codes, scale = numerics.encode(x, numerics.absmax(x, axes.x_in), dtype)
    return (codes.astype(jnp.float32) * scale).astype(x.dtype)

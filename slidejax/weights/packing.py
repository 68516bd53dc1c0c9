"""The arithmetic of packing: from a kernel and its mask to the leaves of a packed weight."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.weights import numerics
from slidejax.weights.layout import kept_values, to_groups
from slidejax.weights.pattern import Pattern

__all__ = ["packed_arrays", "quantized_values"]


def _is_nonzero(kernel: jax.Array) -> jax.Array:
    """Whether values are not zero. XLA on a CPU takes subnormal numbers for zeros."""
    if kernel.dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        unsigned = jnp.uint32 if kernel.dtype == jnp.float32 else jnp.uint16
        sign = unsigned(1 << (8 * kernel.dtype.itemsize - 1))
        return jax.lax.bitcast_convert_type(kernel, unsigned) & ~sign != 0
    return kernel != 0


@functools.partial(jax.jit, static_argnums=(3, 4))
def packed_arrays(
    kernel, mask, given_scale, pattern: Pattern, dtype
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """The leaves of a packed weight, and what makes a row nan under tracing and an error elsewhere.

    Args:
      kernel: `[..., in, out]`.
      mask: bool in the kernel's shape, True where a weight is kept.
      given_scale: `[..., out]`, or None.
      pattern: the `Pattern`.
      dtype: of the values.

    Returns:
      `(values, zeros, scale, crowded, infinite, wrong)`: the leaves; bool `[..., out, groups]`,
      True where a group keeps too much; bool `[..., out]`, True where the cast to `dtype` makes
      infinities; and whether either is so anywhere, bool `[]`.
    """
    nonzero = to_groups(mask & _is_nonzero(kernel), pattern, fill=False)
    # Some 2:4 compressors count -0.0 as a non-zero, so a pruned weight is stored as +0.
    groups = jnp.where(nonzero, to_groups(kernel, pattern), jnp.zeros((), kernel.dtype))
    crowded = jnp.sum(nonzero, axis=-1) > pattern.kept
    zeros = _zeros_of(nonzero) if pattern.prunes else jnp.zeros((*nonzero.shape[:-2], 0), jnp.uint8)
    values = kept_values(groups, zeros)
    bad_row = jnp.any(crowded, axis=-1)
    infinite = jnp.zeros(bad_row.shape, bool)
    scale = jnp.ones(bad_row.shape, jnp.float32)
    if (
        numerics.is_quantized(dtype)
        and jnp.issubdtype(kernel.dtype, jnp.floating)
        and not numerics.is_quantized(kernel.dtype)
    ):
        values, scale = quantized_values(values, dtype, given_scale)
    elif values.dtype != dtype:
        cast = values.astype(dtype)
        if not numerics.is_quantized(dtype):
            lost = jnp.isinf(cast) & (jnp.abs(values) != jnp.inf)
            infinite = jnp.any(lost, axis=(-2, -1))
        values = cast
    bad_row |= infinite
    if numerics.is_quantized(dtype):
        scale = jnp.where(bad_row, jnp.nan, scale)
    else:
        values = jnp.where(bad_row[..., None, None], jnp.asarray(jnp.nan, dtype), values)
    return values, zeros, scale, crowded, infinite, jnp.any(bad_row)


def _zeros_of(nonzero: jax.Array) -> jax.Array:
    """The packed byte of each group of `nonzero` `[..., out, groups, group]`.

    It names the two zeros with the largest index. In a last partial group these are the missing
    columns.
    """
    column = numerics.of_rank(jnp.arange(nonzero.shape[-1]), nonzero.ndim)
    z2 = jnp.max(jnp.where(nonzero, 1, column), axis=-1)
    z1 = jnp.max(jnp.where(nonzero | (column >= z2[..., None]), 0, column), axis=-1)
    return (z1 | z2 << 4).astype(jnp.uint8)


def quantized_values(
    values: jax.Array, dtype, scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    if scale is not None:
        # A value that is code * scale gives this code back, whatever the last bit of the scale is.
        codes, _ = numerics.encode(
            values, scale[..., None, None] * numerics.QMAX[np.dtype(dtype)], dtype
        )
        good = jnp.isfinite(numerics.absmax(values, (-2, -1))[..., 0, 0])
        good &= (scale > 0) & jnp.isfinite(scale)
        return codes, jnp.where(good, scale, np.float32(np.nan))
    codes, scale = numerics.encode(values, numerics.absmax(values, (-2, -1)), dtype)
    return codes, scale[..., 0, 0]

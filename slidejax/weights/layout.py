"""The layout of a kernel in groups: reshapes, gathers and scatters.

Packing, pruning and gradients share them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.weights.numerics import of_rank
from slidejax.weights.pattern import Pattern

__all__ = [
    "as_array",
    "as_shape",
    "check_kernel",
    "check_mask",
    "from_groups",
    "kept_values",
    "scatter_values",
    "split_zeros",
    "to_groups",
]

_INFINITE_IN_FLOAT32 = 2.0**128 - 2.0**103  # from here on float64 rounds to inf


def as_array(value: Any, name: str) -> jax.Array:
    """Returns an argument as an array.

    Raises:
      TypeError: naming the argument, if it is no array of numbers.
      ValueError: if it has an integer that is too large, or a float64 that JAX without x64 would
        make infinite.
    """
    if isinstance(value, np.ndarray) and not value.dtype.isnative:  # JAX has one byte order
        value = value.astype(value.dtype.newbyteorder("="))
    if not isinstance(value, str):  # NumPy reads numbers out of texts
        try:
            array = jnp.asarray(value)
        except OverflowError as e:
            raise ValueError(f"{name} must be an array, and has a number too large: {e}") from e
        except (TypeError, ValueError):  # ValueError: None, and rows of different lengths
            pass
        else:
            if array.dtype.itemsize == 4 and not isinstance(value, jax.Array):
                _check_range(np.asarray(value), array.dtype, name)
            return array
    raise TypeError(f"{name} must be an array of numbers, got {type(value).__name__}")


def _check_range(value: np.ndarray, dtype: np.dtype, name: str) -> None:
    """Raises ValueError if the 32 bits that JAX makes of 64 hold another number.

    A finite float64 may become infinite in float32. Of an integer the last bits would remain.
    """
    if np.issubdtype(value.dtype, np.integer):
        info = np.iinfo(dtype)
        wrong = value[(value < info.min) | (value > info.max)]
        if wrong.size:
            raise ValueError(
                f"{name} has integers that {dtype} cannot hold, such as {wrong[0]}: "
                "turn jax_enable_x64 on"
            )
        return
    if value.dtype != np.float64:
        return
    largest = np.abs(value).max(initial=0, where=np.isfinite(value))
    if largest >= _INFINITE_IN_FLOAT32:
        raise ValueError(
            f"{name} has finite values that become infinite in float32, such as {largest:g}: scale "
            "them, or turn jax_enable_x64 on"
        )


def as_shape(value: Any, name: str, shape: tuple[int, ...], what: str) -> jax.Array:
    """Returns an argument as a floating array of a shape.

    Args:
      value: the argument.
      name: its name.
      shape: the shape.
      what: the shape in words, for the error.

    Raises:
      TypeError: as `as_array`.
      ValueError: if it has another shape, or is not floating.
    """
    array = as_array(value, name)
    if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating {what}, {shape}, got {array.dtype} {array.shape}"
        )
    return array


def check_kernel(kernel, name: str = "kernel") -> jax.Array:
    """Returns `kernel` as an array `[..., in, out]`.

    Raises:
      TypeError: if it is packed already, or no array of numbers.
      ValueError: if it has fewer than two axes, or no input or no output.
    """
    if hasattr(kernel, "out_features"):  # a weight, not an array
        raise TypeError(f"{name} is packed already; unpack it first")
    kernel = as_array(kernel, name)
    if kernel.ndim < 2 or 0 in kernel.shape[-2:]:
        raise ValueError(f"{name} must be [..., in, out], both 1 or more, got shape {kernel.shape}")
    return kernel


def check_mask(mask: Any, kernel: jax.Array) -> jax.Array:
    """Returns the mask of a kernel as an array.

    Raises:
      TypeError: if it is no array of numbers.
      ValueError: if it is not bool, or has another shape than the kernel.
    """
    mask = as_array(mask, "mask")
    if mask.shape != kernel.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask must be bool of the kernel's shape {kernel.shape}, got {mask.dtype} of shape "
            f"{mask.shape}"
        )
    return mask


def to_groups(kernel: jax.Array, pattern: Pattern, fill=0) -> jax.Array:
    """Turns `[..., in, out]` into `[..., out, groups, group]`; `fill` pads it to whole blocks."""
    rows = jnp.swapaxes(kernel, -1, -2)
    missing = pattern.padded(rows.shape[-1]) - rows.shape[-1]
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)], constant_values=fill)
    return rows.reshape(*rows.shape[:-1], -1, pattern.group)


def from_groups(groups: jax.Array, in_features: int) -> jax.Array:
    """Turns `[..., out, groups, group]` into `[..., in, out]` and cuts off the padding."""
    rows = groups.reshape(*groups.shape[:-2], -1)[..., :in_features]
    return jnp.swapaxes(rows, -1, -2)


def split_zeros(zeros: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The zeros `(z1, z2)` of each group, int32 `[..., out, groups, 1]`, from the packed byte."""
    zeros = zeros.astype(jnp.int32)[..., None]
    return zeros & 15, zeros >> 4


def kept_values(groups: jax.Array, zeros: jax.Array) -> jax.Array:
    """The kept columns of `[..., out, groups, group]`: `[..., out, groups, group - 2]`.

    The pattern "dense" has no zeros, `zeros` `[..., out, 0]`, and keeps all columns.
    """
    if zeros.shape[-1] < groups.shape[-2]:
        return groups
    z1, z2 = split_zeros(zeros)
    kept = groups.shape[-1] - 2
    j = of_rank(jnp.arange(kept), z1.ndim)
    return jnp.where(
        j < z1,
        groups[..., :kept],
        jnp.where(j < z2 - 1, groups[..., 1 : kept + 1], groups[..., 2:]),
    )


def scatter_values(values: jax.Array, zeros: jax.Array) -> jax.Array:
    """The inverse of `kept_values`: `[..., out, groups, kept + 2]`, zero where nothing is kept."""
    if zeros.shape[-1] < values.shape[-2]:
        return values
    z1, z2 = split_zeros(zeros)
    c = of_rank(jnp.arange(values.shape[-1] + 2), z1.ndim)

    def shifted(by):
        return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(by, 2 - by)])

    full = jnp.where(c < z1, shifted(0), jnp.where(c < z2, shifted(1), shifted(2)))
    return jnp.where((c == z1) | (c == z2), jnp.zeros((), values.dtype), full)

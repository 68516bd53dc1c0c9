"""Checks of the arguments of functions that prune or round one kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bounds import Bound
from slidejax.weights import numerics
from slidejax.weights.layout import as_array, as_shape, check_kernel

__all__ = [
    "check_codes",
    "check_damping",
    "check_finite",
    "check_gram",
    "check_layer",
    "check_numbers",
]


def check_layer(kernel: Any, gram: Any, **others: Any) -> tuple[jax.Array, ...]:
    """The arrays of one layer.

    Args:
      kernel: `[in, out]`, floating.
      gram: `[in, in]`.
      **others: arrays by their names, floating `[in, out]`.

    Returns:
      The kernel, the gram as float32, and the others in their order.

    Raises:
      TypeError: naming it, if one is no array of numbers.
      ValueError: naming it, if one has another shape or dtype, or a gram is not finite.
    """
    kernel = check_kernel(kernel)
    if kernel.ndim != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            f"kernel must be floating [in, out], got {kernel.dtype} of shape {kernel.shape}"
        )
    checked = [as_shape(other, name, kernel.shape, "as kernel") for name, other in others.items()]
    return (kernel, check_gram(gram, kernel), *checked)


def check_gram(gram: Any, kernel: jax.Array, *, diagonal: bool = False) -> jax.Array:
    """The Gram matrix of a kernel's inputs in float32; with `diagonal` it may be that alone."""
    gram = as_array(gram, "gram")
    shape = (kernel.shape[0],) * 2
    if gram.shape != shape and not (diagonal and gram.shape == shape[:1]):
        wanted = "[in, in] or [in]" if diagonal else "[in, in]"
        raise ValueError(
            f"gram must be {wanted} for a kernel [in, out], got {gram.shape} for {kernel.shape}"
        )
    if not jnp.issubdtype(gram.dtype, jnp.floating) and not jnp.issubdtype(gram.dtype, jnp.integer):
        raise ValueError(f"gram must be real, got {gram.dtype}")
    gram = gram.astype(jnp.float32)
    if numerics.known(numerics.all_finite, gram) is False:
        raise ValueError("gram holds inf or nan: the calibration inputs are not finite")
    if numerics.known(lambda gram: (_diagonal(gram) < 0).any(), gram):
        with jax.ensure_compile_time_eval():
            least = float(_diagonal(gram).min())
        raise ValueError(f"gram must be x^T x, and has {least:g} on its diagonal")
    return gram


def _diagonal(gram: jax.Array) -> jax.Array:
    return jnp.diagonal(gram) if gram.ndim == 2 else gram


def check_numbers(**arrays: jax.Array) -> None:
    """Raises a ValueError that names the first array with inf or nan; traced ones are not known."""
    for name, array in arrays.items():
        if numerics.known(numerics.all_finite, array) is False:
            raise ValueError(f"{name} holds inf or nan")


def check_finite(new: jax.Array) -> jax.Array:
    """A kernel that a method has made of finite numbers, if it is finite or traced.

    Raises:
      ValueError: if it is not.
    """
    if numerics.known(numerics.all_finite, new) is not False:
        return new
    raise ValueError(
        "gram has numbers too large or too small for float32: with it the kernel becomes inf or "
        "nan. Divide the calibration inputs by a number"
    )


def check_damping(damping: Any) -> Any:
    """A share of the mean of a Gram matrix' diagonal, which may be traced."""
    return damping if isinstance(damping, jax.core.Tracer) else Bound(0).check(damping, "damping")


def check_codes(dtype: Any) -> np.dtype:
    """A dtype of 8-bit codes.

    Raises:
      ValueError: for another dtype.
    """
    found = numerics.check_dtype(dtype)
    if not numerics.is_quantized(found):
        raise ValueError(f"dtype must be int8 or float8_e4m3fn, got {found.name}")
    return found

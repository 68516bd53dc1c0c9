"""Checks of packed weights and kernels, without which products would be wrong."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.weights import numerics
from slidejax.weights.pattern import Pattern

__all__ = ["check_content", "check_one_process", "check_sums", "check_values"]


def check_one_process(tree: Any, name: str, *, copies: bool = True) -> None:
    """Raises a ValueError that names the first array that was deleted, or is only partly here.

    Args:
      tree: a tree of arrays; other leaves are of this process.
      name: of the tree, for the error.
      copies: accept arrays of several processes of which each has a whole copy.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        here = not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer)
        if not here and leaf.is_deleted():
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} was deleted, as a program deletes the arrays "
                "that are donated to it"
            )
        if here or leaf.is_fully_addressable or (copies and leaf.is_fully_replicated):
            continue
        raise ValueError(
            f"{name}{jax.tree_util.keystr(path)} is spread over {jax.process_count()} processes: "
            "gather it first (jax.experimental.multihost_utils.process_allgather with tiled=True)"
        )


def check_sums(in_features: int, pattern: Pattern, name: str, largest: int = 127) -> None:
    """Raises a ValueError if a sum of int8 products over K may not fit into an int32.

    Args:
      in_features: the inputs of the whole kernel.
      pattern: the `Pattern`.
      name: of the kernel or weight, for the error.
      largest: the largest magnitude of the weight's codes: 127, or 128 for codes of others. Codes
        of x are at most 127.
    """
    most = (2**31 - 1) // (127 * largest)
    whole, rest = divmod(in_features, pattern.group)
    kept = whole * pattern.kept + min(rest, pattern.kept)
    if kept > most:
        raise ValueError(
            f"{name} keeps {kept} of {in_features} inputs at {pattern}: sums of int8 products over "
            f"more than {most} columns may not fit into int32. Use another dtype, such as "
            "float8_e4m3fn, or several kernels"
        )


def check_values(kernel: jax.Array, dtype: np.dtype) -> None:
    """Raises a ValueError if values of the kernel's dtype cannot become values of `dtype`."""
    is_codes = kernel.dtype in (jnp.int8, jnp.float8_e4m3fn)
    if not is_codes and not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            f"kernel must be floating, or int8 codes, got {kernel.dtype.name}: cast it first, such "
            "as with kernel.astype('float32')"
        )
    if is_codes and numerics.is_quantized(dtype) and dtype != kernel.dtype:
        raise ValueError(f"kernel holds {kernel.dtype.name} codes, which dtype {dtype.name} rounds")


def check_content(values: Any, zeros: Any, scale: Any, pattern: Pattern, name: str = "w") -> None:
    """Raises a ValueError that names the leaf of a packed weight and its first bad value.

    A scale of nan is refused, although `pack` makes it for a kernel with nan or inf.

    Args:
      values, zeros, scale: the leaves, concrete, of the shapes and dtypes that `pack` makes.
      pattern: the `Pattern`.
      name: of the weight, for the error.
    """
    zeros, scale = np.asarray(zeros), np.asarray(scale)
    z1, z2 = zeros & 15, zeros >> 4
    _check_all(
        (z1 < z2) & (z2 < pattern.group),
        zeros,
        f"{name}.zeros",
        f"z1 | z2 << 4 with z1 < z2 < {pattern.group} (pattern {pattern})",
    )
    if numerics.is_quantized(values.dtype):
        _check_all(np.isfinite(scale) & (scale > 0), scale, f"{name}.scale", "positive and finite")
    else:
        _check_all(scale == 1, scale, f"{name}.scale", f"1 for {values.dtype.name} values")


def _check_all(good: np.ndarray, array: np.ndarray, name: str, expected: str) -> None:
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        raise ValueError(f"{name}{list(at)} is {array[at]}: it must be {expected}")

"""Custom calls of the compiled CUDA library: any by its name, and those of the lift. Implementations of products keep their own.

Lowering a call needs its name only: a program can be lowered for CUDA on a machine that has neither a GPU nor the library.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops.cuda.library import register
from slidejax.ops.cuda.prologues import operands_of
from slidejax.ops.prologue import Prologue

__all__ = [
    "ALIGN",
    "accumulator",
    "call",
    "lift_quantize_call",
    "lift_quantize_fused_call",
    "memcpy_call",
]

ALIGN = 256  # of the parts of a workspace


def accumulator(dtype) -> np.dtype:
    """What the sparse products add up 8-bit operands in, and give as raw results: int32 or float32. cuSPARSELt has no float32 results for
    16-bit operands, which keep their dtype."""
    wide = {np.dtype(np.int8): np.int32, np.dtype(jnp.float8_e4m3fn): np.float32}
    return np.dtype(wide.get(np.dtype(dtype), dtype))


def call(target: str, out_types, *operands: jax.Array, **attributes):
    """The results of a custom call; attributes are numpy scalars."""
    register()
    return jax.ffi.ffi_call(target, out_types)(*operands, **attributes)


def lift_quantize_call(
    x: jax.Array, absmax: jax.Array, *, group: int, lifted_columns: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """`x` `[M, K]`, `absmax` float32 `[M]` or `[0]` -> `(lifted [M, lifted_columns], scale float32 [M])`.

    `group` 0 quantises without lifting.
    """
    rows = x.shape[0]
    out_types = (
        jax.ShapeDtypeStruct((rows, lifted_columns), dtype),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    return call("slidejax_lift_quantize", out_types, x, absmax, group=np.int32(group))


def lift_quantize_fused_call(
    x: jax.Array, prologue: Prologue, *, group: int, lifted_columns: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """`lift_quantize_call` of `prologue.apply(x)` for 8-bit `dtype`, in one pass over x."""
    rows = x.shape[0]
    out_types = (
        jax.ShapeDtypeStruct((rows, lifted_columns), dtype),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    operands, attributes = operands_of(x, prologue)
    return call(
        "slidejax_lift_quantize_fused", out_types, x, *operands, group=np.int32(group), **attributes
    )


def memcpy_call(x: jax.Array) -> jax.Array:
    """A copy of x by the driver, the yardstick of `slidejax bench`."""
    return call("slidejax_memcpy", jax.ShapeDtypeStruct(x.shape, x.dtype), x)

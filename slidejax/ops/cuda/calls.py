"""Custom calls of the compiled CUDA library: `call` by name, and the calls of the lift.

The call of a product is in the file of its implementation.

Only the name of a call is needed to lower it. A program can therefore be lowered for CUDA on a
machine that has neither a GPU nor the library.
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
    "call_in_place",
    "lift_quantize_call",
    "lift_quantize_fused_call",
    "memcpy_call",
]

ALIGN = 256  # alignment of the parts of a workspace, in bytes


def accumulator(dtype) -> np.dtype:
    """The dtype of raw results: int32 for int8, float32 for float8_e4m3fn.

    16-bit operands keep their dtype, since cuSPARSELt has no float32 results for them.
    """
    wide = {np.dtype(np.int8): np.int32, np.dtype(jnp.float8_e4m3fn): np.float32}
    return np.dtype(wide.get(np.dtype(dtype), dtype))


def call(target: str, out_types, *operands: jax.Array, **attributes):
    """The results of the custom call `target`. Attributes are numpy scalars."""
    register()
    return jax.ffi.ffi_call(target, out_types)(*operands, **attributes)


def call_in_place(
    target: str, out_types, aliases: dict[int, int], *operands: jax.Array, **attributes
):
    """`call` that writes some operands: `aliases` has the number of the result by the operand's."""
    register()
    run = jax.ffi.ffi_call(target, out_types, input_output_aliases=aliases)
    return run(*operands, **attributes)


def lift_quantize_call(
    x: jax.Array, absmax: jax.Array, *, group: int, lifted_columns: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """Lifts and quantises rows.

    Args:
      x: `[M, K]`.
      absmax: float32 `[M]`, the largest magnitudes of the rows; `[0]` to compute them.
      group: columns of a group; 0 quantises without lifting.
      lifted_columns: columns of the result.
      dtype: of the codes.

    Returns:
      `(lifted, scale)`: `[M, lifted_columns]` and float32 `[M]`.
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
    """`lift_quantize_call` of `prologue.apply(x)`, for an 8-bit `dtype`, in one pass over x."""
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
    """A copy of x by the driver. `slidejax bench` compares the lift with it."""
    return call("slidejax_memcpy", jax.ShapeDtypeStruct(x.shape, x.dtype), x)

"""The custom calls of the compiled CUDA library, one thin function for each.

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
    "cusparselt_compress_call",
    "cusparselt_matmul_call",
    "hopper_linear_call",
    "hopper_matmul_call",
    "hopper_metadata_call",
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


def _call(target: str, out_types, *operands: jax.Array, **attributes):
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
    return _call("slidejax_lift_quantize", out_types, x, absmax, group=np.int32(group))


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
    return _call(
        "slidejax_lift_quantize_fused", out_types, x, *operands, group=np.int32(group), **attributes
    )


def memcpy_call(x: jax.Array) -> jax.Array:
    """A copy of x by the driver, the yardstick of `slidejax bench`."""
    return _call("slidejax_memcpy", jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def cusparselt_compress_call(
    values: jax.Array, zeros: jax.Array, *, compressed_bytes: int
) -> jax.Array:
    """`values` `[out, groups, kept]`, `zeros` uint8 `[out, groups]` -> uint8 `[compressed_bytes]`."""
    return _call(
        "slidejax_cusparselt_compress",
        jax.ShapeDtypeStruct((compressed_bytes,), jnp.uint8),
        values,
        zeros,
    )


def cusparselt_matmul_call(
    lifted: jax.Array,
    scale_x: jax.Array,
    compressed: jax.Array,
    scale_w: jax.Array,
    bias: jax.Array,
    *,
    dtype,
    workspace_bytes: int,
    raw: bool = False,
    alpha_vector: bool = False,
    algorithm: int = -1,
    split_k: int = 1,
    split_k_mode: int = 0,
) -> jax.Array:
    """`lifted` `[M, K']`, `scale_x` `[M]`, `compressed` uint8, `scale_w` `[out]`, `bias` `[out]` or `[0]` -> `[M, out]`.

    `raw` gives the accumulators (int32 or float32); `alpha_vector` applies `scale_w` inside the product (int8 to
    bfloat16: a second rounding, less memory moved); algorithm and split are those of `cusparselt_search`.
    """
    out_types = (
        jax.ShapeDtypeStruct((lifted.shape[0], scale_w.shape[0]), dtype),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    y, _ = _call(
        "slidejax_sparse_matmul_cusparselt", out_types, lifted, scale_x, compressed, scale_w, bias,
        raw=np.bool_(raw), alpha_vector=np.bool_(alpha_vector),
        algorithm=np.int32(algorithm), split_k=np.int32(split_k), split_k_mode=np.int32(split_k_mode),
    )  # fmt: skip
    return y


def hopper_metadata_call(zeros: jax.Array, *, group: int, metadata_bytes: int) -> jax.Array:
    """`zeros` uint8 `[out, groups]` -> the 2:4 metadata in the kernel's order, uint8 `[metadata_bytes]`."""
    out_type = jax.ShapeDtypeStruct((metadata_bytes,), jnp.uint8)
    return _call("slidejax_hopper_metadata", out_type, zeros, group=np.int32(group))


def hopper_matmul_call(
    lifted: jax.Array,
    scale_x: jax.Array,
    values: jax.Array,
    zeros: jax.Array,
    scale_w: jax.Array,
    bias: jax.Array,
    metadata: jax.Array,
    *,
    dtype,
    workspace_bytes: int,
    config: int = -1,
    token_group: int = 0,
    split: int = -1,
) -> jax.Array:
    """`lifted` `[M, K']`, `scale_x` `[M]`, the packed weight, `bias` `[out]` or `[0]`, `metadata` or `[0]` -> `[M, out]`.

    A dense weight has `values` `[out, K']`, and neither zeros nor metadata: both `[0]`. `config`, `token_group` and `split` choose the tile and the schedule; the defaults leave it to the cost model.
    """
    out_types = (
        jax.ShapeDtypeStruct((lifted.shape[0], values.shape[0]), dtype),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    y, _ = _call(
        "slidejax_sparse_matmul_hopper", out_types, lifted, scale_x, values, zeros, scale_w, bias, metadata,
        config=np.int32(config), token_group=np.int32(token_group), split=np.int32(split),
    )  # fmt: skip
    return y


def hopper_linear_call(
    x: jax.Array,
    prologue: Prologue | None,
    values: jax.Array,
    zeros: jax.Array,
    scale_w: jax.Array,
    bias: jax.Array,
    metadata: jax.Array,
    *,
    group: int,
    lifted_columns: int,
    dtype,
    workspace_bytes: int,
) -> jax.Array:
    """`hopper_matmul_call` of what `lift_quantize_fused_call` (prologue None: `lift_quantize_call`) gives, in one call: the kernels
    overlap. `group` 0 for a dense weight."""
    rows = x.shape[0]
    out_types = (
        jax.ShapeDtypeStruct((rows, values.shape[0]), dtype),
        jax.ShapeDtypeStruct((rows, lifted_columns), values.dtype),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    operands, attributes = operands_of(x, prologue)
    y, *_ = _call(
        "slidejax_linear_hopper",
        out_types,
        x,
        *operands,
        values,
        zeros,
        scale_w,
        bias,
        metadata,
        group=np.int32(group),
        **attributes,
    )
    return y

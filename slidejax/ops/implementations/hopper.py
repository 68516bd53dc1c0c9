"""Linear layers and products through the Hopper kernel, of packed weights and of dense 8-bit ones: its prepared metadata, and how much
workspace it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops.cuda import calls, library

if TYPE_CHECKING:
    from slidejax.ops.prologue import Prologue
    from slidejax.weights.packed import SlideWeight

__all__ = ["dense_linear", "dense_matmul", "linear", "matmul", "metadata"]

_AHEAD_OF_TIME_MULTIPROCESSORS = 132  # a program lowered without a GPU is taken to run on an H100


def _metadata_bytes(w: SlideWeight) -> int:
    module, _ = library.load()
    if module is not None and module.build_info()["hopper"]:
        return module.hopper_metadata_bytes(w.out_features, w.groups, w.pattern.group)
    # ahead of time: 1 KB for 64 outputs and 128 lifted columns, whole pairs of the latter; the call checks it
    return -(-w.out_features // 64) * 2 * -(-w.lifted_columns // 256) * 1024


def metadata(w: SlideWeight) -> jax.Array:
    """The 2:4 metadata of a weight in the order in which the kernel's lanes read it, uint8; `sj.prepare` keeps it."""
    return calls.hopper_metadata_call(
        w.zeros, group=w.pattern.group, metadata_bytes=_metadata_bytes(w)
    )


def _workspace(rows: int, out: int, groups: int, group: int, dtype, metadata_bytes: int) -> int:
    """Of a weight with so many groups, or with `groups` columns if `group` is 0; `metadata_bytes`: of what is not prepared."""
    module, _ = library.load()
    if (
        module is None or not module.build_info()["hopper"]
    ):  # ahead of time: enough for the metadata, K is not split
        return calls.ALIGN + metadata_bytes
    multiprocessors = (
        jax.devices()[0].core_count if library.on_gpu() else _AHEAD_OF_TIME_MULTIPROCESSORS
    )
    return calls.ALIGN + module.hopper_workspace_bytes(
        rows, out, groups, group, np.dtype(dtype).name, metadata_bytes == 0, multiprocessors
    )


def _weight(w: SlideWeight, bias: jax.Array | None, raw: bool = False) -> tuple[jax.Array, ...]:
    """The operands of a packed weight, as both calls take them; `raw`: without scales and bias."""
    form = w.prepared.get("hopper")
    return (
        w.values,
        w.zeros,
        jnp.ones(w.out_features, jnp.float32) if raw else w.scale,
        jnp.zeros(0, jnp.float32) if bias is None or raw else bias.astype(jnp.float32),
        jnp.zeros(0, jnp.uint8) if form is None else form,
    )


def _weight_workspace(rows: int, w: SlideWeight) -> int:
    expanded = 0 if "hopper" in w.prepared else _metadata_bytes(w)
    return _workspace(rows, w.out_features, w.groups, w.pattern.group, w.dtype, expanded)


def _dense_weight(
    kernel: jax.Array, scale: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, ...]:
    none = jnp.zeros(0, jnp.uint8)
    return (
        kernel,
        none,
        scale,
        jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32),
        none,
    )


def matmul(
    lifted: jax.Array, scale_x: jax.Array, w: SlideWeight, bias: jax.Array | None, out_dtype
) -> jax.Array:
    """`sparse_matmul` through the Hopper kernel: `lifted` `[M, K']`, `scale_x` `[M, 1]`; `out_dtype` None: raw accumulators,
    int32 of int8 values and float32 of e4m3."""
    raw = out_dtype is None
    rows = lifted.shape[0]
    return calls.hopper_matmul_call(
        lifted, jnp.ones(rows, jnp.float32) if raw else scale_x[:, 0], *_weight(w, bias, raw),
        dtype=calls.accumulator(w.dtype) if raw else out_dtype, workspace_bytes=_weight_workspace(rows, w),
    )  # fmt: skip


def dense_matmul(
    codes: jax.Array,
    scale_x: jax.Array,
    kernel: jax.Array,
    scale_w: jax.Array,
    bias: jax.Array | None,
    out_dtype,
) -> jax.Array:
    """The product of 8-bit codes `[M, K]` and a dense kernel `[out, K]` with the scales `[M, 1]` and `[out]`, through the same kernel;
    K is a multiple of 16."""
    (rows, k), out = codes.shape, kernel.shape[0]
    return calls.hopper_matmul_call(
        codes,
        scale_x[:, 0],
        *_dense_weight(kernel, scale_w, bias),
        dtype=out_dtype,
        workspace_bytes=_workspace(rows, out, k, 0, kernel.dtype, 0),
    )


def linear(
    x: jax.Array, prologue: Prologue | None, w: SlideWeight, bias: jax.Array | None, out_dtype
) -> jax.Array:
    """`linear` of x `[M, K]` as it is, in one call: the product's kernel begins while the lift's still runs. `prologue`: one that
    the lift computes itself (`prologues.fused`)."""
    return calls.hopper_linear_call(
        x, prologue, *_weight(w, bias), group=w.pattern.group, lifted_columns=w.lifted_columns, dtype=out_dtype,
        workspace_bytes=_weight_workspace(x.shape[0], w),
    )  # fmt: skip


def dense_linear(
    x: jax.Array,
    prologue: Prologue | None,
    kernel: jax.Array,
    scale_w: jax.Array,
    bias: jax.Array | None,
    out_dtype,
) -> jax.Array:
    """The same with a dense kernel `[out, K']` of 8-bit codes, K' at least K and a multiple of 16."""
    out, columns = kernel.shape
    return calls.hopper_linear_call(
        x, prologue, *_dense_weight(kernel, scale_w, bias), group=0, lifted_columns=columns, dtype=out_dtype,
        workspace_bytes=_workspace(x.shape[0], out, columns, 0, kernel.dtype, 0),
    )  # fmt: skip

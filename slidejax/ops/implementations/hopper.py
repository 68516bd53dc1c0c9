"""The implementation "hopper": products of 8-bit values in slidejax's own kernel for Hopper GPUs.

The kernel also multiplies dense 8-bit weights, which the implementation "dense" uses.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops.cuda import calls, library, prologues
from slidejax.ops.implementations.base import (
    Form,
    Implementation,
    cuda_refusal,
    lift_input,
    nothing_to_skip,
    with_residual,
)
from slidejax.ops.problem import Problem, device_kind
from slidejax.ops.prologue import Prologue
from slidejax.weights.numerics import is_quantized
from slidejax.weights.packed import SlideWeight

__all__ = [
    "FEW_ROWS",
    "HOPPER",
    "RESIDUAL_ROWS",
    "HopperWeight",
    "chained_rows",
    "linear_call",
    "matmul_call",
    "may_chain",
    "refuses_chained",
    "refuses_device",
]

# Up to this number of rows, lift and product are one custom call, so that the product's kernel can
# begin while the lift's still runs. With more rows two calls are better, since XLA merges the lifts
# of layers that share an input, such as q, k and v.
FEW_ROWS = 64
# Up to this number of rows the kernel adds a residual. With more it is added to float32 results.
# tests/cuda/test_limits.py compares these two with the source.
RESIDUAL_ROWS = 256
DENSE_RESIDUAL_ROWS = 64  # the same for a weight that prunes nothing

_DEVICES = ("H100", "H200", "H800", "H20", "GH200")
_AHEAD_OF_TIME_MULTIPROCESSORS = 132  # those of an H100, for programs lowered without a GPU


# --- where it runs --------------------------------------------------------------------------------


@functools.cache
def _missing() -> str | None:
    """The reason why the kernel cannot be used on this machine, or None."""
    if reason := library.missing():
        return reason
    if _module() is None:
        return "the CUDA library was built without architecture 90a"
    return None


def _module():
    """The compiled module, or None if it does not hold the kernel."""
    module, _ = library.load()
    return module if module is not None and module.build_info()["hopper"] else None


def refuses_device(device: str, dtype: np.dtype) -> str | None:
    """The reason why the kernel does not run on a kind of CUDA device with a dtype, or None."""
    if library.on_gpu() and (reason := _missing()):
        return reason
    if not any(name in device for name in _DEVICES):
        return f"needs a Hopper GPU (compute capability 9.0), not {device}"
    if not is_quantized(dtype):
        return f"values must be int8 or float8_e4m3fn, not {dtype.name}"
    return None


# --- the weight -----------------------------------------------------------------------------------


# Outputs that share a tile of metadata. All columns of a tile lie together, and tiles in order.
_TILE = 64


def _metadata_bytes(out: int, columns: int) -> int:
    """Bytes of metadata: 1 KB for 64 outputs and 128 lifted columns, in whole pairs of 128 columns.

    The call checks this, and tests/cuda/test_plans.py compares it with the kernel's own size.
    """
    return -(-out // _TILE) * 2 * -(-columns // 256) * 1024


def _metadata(w: SlideWeight) -> jax.Array:
    """The 2:4 metadata of a weight, uint8, in the order in which the kernel's lanes read it."""
    size = _metadata_bytes(w.out_features, w.lifted_columns)
    out_type, group = jax.ShapeDtypeStruct((size,), jnp.uint8), np.int32(w.pattern.group)
    return calls.call("slidejax_metadata_hopper", out_type, w.zeros, group=group)


@dataclasses.dataclass(frozen=True)
class HopperWeight:
    """A packed or a dense weight as the operands of the kernel.

    Attributes:
      values: `[out, groups, kept]`. For a dense weight the codes `[out, K]`, K a multiple of 16.
      zeros: `[out, groups]`. For a dense weight `[0]`.
      scale: float32 `[out]`.
      metadata: the prepared metadata. `[0]` if there is none: the call then makes it in its
        workspace. A dense weight needs none.
      group: columns of a group. For a dense weight 0.
    """

    values: jax.Array
    zeros: jax.Array
    scale: jax.Array
    metadata: jax.Array
    group: int

    @classmethod
    def packed(cls, w: SlideWeight) -> HopperWeight:
        metadata = w.prepared["hopper"] if "hopper" in w.prepared else jnp.zeros(0, jnp.uint8)
        return cls(w.values, w.zeros, w.scale, metadata, w.pattern.group)

    @classmethod
    def dense(cls, kernel: jax.Array, scale: jax.Array) -> HopperWeight:
        none = jnp.zeros(0, jnp.uint8)
        return cls(kernel, none, scale, none, 0)

    @classmethod
    def of(cls, w: SlideWeight) -> HopperWeight:
        """The packed form as it is, of a weight that may prune nothing."""
        if w.pattern.prunes:
            return cls.packed(w)
        return cls.dense(w.values.reshape(w.out_features, -1), w.scale)

    @property
    def lifted_columns(self) -> int:
        """Columns of the lifted rows that it is multiplied with."""
        columns = self.values.shape[1]
        return columns * 2 * (self.group - 2) if self.group else columns

    def raw(self) -> HopperWeight:
        """The same with scales of one."""
        return dataclasses.replace(self, scale=jnp.ones(self.scale.shape, jnp.float32))

    def operands(self, bias: jax.Array | None) -> tuple[jax.Array, ...]:
        given = jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32)
        return self.values, self.zeros, self.scale, given, self.metadata

    def workspace_bytes(self, rows: int) -> int:
        """Bytes of workspace for a product of `rows` rows."""
        out, columns = self.values.shape[0], self.lifted_columns
        has_metadata = not self.group or self.metadata.size > 0
        made = 0 if has_metadata else _metadata_bytes(out, columns)
        module = _module()
        if module is None:  # Ahead of time: enough for the metadata. K is then not split.
            return calls.ALIGN + made
        multiprocessors = (
            jax.devices()[0].core_count if library.on_gpu() else _AHEAD_OF_TIME_MULTIPROCESSORS
        )
        return calls.ALIGN + module.hopper_workspace_bytes(
            rows, out, columns, self.group, has_metadata, multiprocessors
        )


# --- the calls ------------------------------------------------------------------------------------


def matmul_call(
    lifted: jax.Array,
    scale_x: jax.Array,
    w: HopperWeight,
    bias: jax.Array | None,
    dtype,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Multiplies `lifted` `[M, K']` with scales `scale_x` `[M]`. The result is `[M, out]`.

    For a dense weight `lifted` is un-lifted codes `[M, K]`. A residual `[M, out]` is added to at
    most RESIDUAL_ROWS rows, or DENSE_RESIDUAL_ROWS of a dense weight.
    """
    rows = lifted.shape[0]
    out_types = (
        jax.ShapeDtypeStruct((rows, w.values.shape[0]), dtype),
        jax.ShapeDtypeStruct((w.workspace_bytes(rows),), jnp.uint8),
    )
    operands = (lifted, scale_x, *w.operands(bias), _residual(residual))
    y, _ = calls.call("slidejax_sparse_matmul_hopper", out_types, *operands)
    return y


def linear_call(
    x: jax.Array,
    prologue: Prologue | None,
    w: HopperWeight,
    bias: jax.Array | None,
    lifted_columns: int,
    dtype,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Lifts and multiplies x `[M, in]` in one call.

    The product's kernel begins while the lift's still runs.

    Args:
      x: `[M, in]`.
      prologue: is applied to x first. XLA computes it if the lift's kernel does not.
      w: the weight.
      bias: `[out]`, or None.
      lifted_columns: K'. For a dense weight K, which is at least `in`.
      dtype: of the result.
      residual: as in `matmul_call`.

    Returns:
      `[M, out]`.
    """
    if prologue is not None and not prologues.fused(x, w.values.dtype, prologue):
        x, prologue = prologue.apply(x), None
    rows = x.shape[0]
    out_types = (
        jax.ShapeDtypeStruct((rows, w.values.shape[0]), dtype),
        jax.ShapeDtypeStruct((rows, lifted_columns), w.values.dtype),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((w.workspace_bytes(rows),), jnp.uint8),
    )
    arrays, attributes = prologues.operands_of(x, prologue)
    operands = (x, *arrays, *w.operands(bias), _residual(residual))
    y, *_ = calls.call(
        "slidejax_linear_hopper", out_types, *operands, group=np.int32(w.group), **attributes
    )
    return y


def _residual(residual: jax.Array | None) -> jax.Array:
    return jnp.zeros(0, jnp.float32) if residual is None else residual


# --- the implementation ---------------------------------------------------------------------------


class Hopper(Implementation):
    """8-bit values of all patterns but "dense", on GPUs of compute capability 9.0."""

    name = "hopper"
    form = Form(
        "hopper",
        _metadata,
        outputs=_TILE,
        shape=lambda w: (_metadata_bytes(w.out_features, w.lifted_columns),),
    )
    cuda_only = True
    reads_packed = True  # it makes the metadata in its workspace, within the call
    takes_residual = True

    def refuses(self, problem):
        if reason := nothing_to_skip(problem) or cuda_refusal(problem):
            return reason
        return refuses_device(problem.device, problem.dtype)

    def matmul(self, lifted, scale_x, w, bias, out_dtype, platform="default", residual=None):
        weight = HopperWeight.packed(w)
        if out_dtype is None:
            ones = jnp.ones(lifted.shape[0], jnp.float32)
            return matmul_call(lifted, ones, weight.raw(), None, calls.accumulator(w.dtype))
        operands = (lifted, scale_x[:, 0], weight, bias)
        if lifted.shape[0] > RESIDUAL_ROWS:
            return with_residual(lambda dtype: matmul_call(*operands, dtype), out_dtype, residual)
        return matmul_call(*operands, out_dtype, residual)

    def linear(self, x, prologue, w, bias, out_dtype, platform="default", residual=None):
        if x.shape[0] > FEW_ROWS:
            lifted, scale_x = lift_input(x, prologue, w)
            return self.matmul(lifted, scale_x, w, bias, out_dtype, platform, residual)
        operands = (x, prologue, HopperWeight.packed(w), bias, w.lifted_columns)
        return linear_call(*operands, out_dtype, residual)

    def available(self):
        return _missing()


HOPPER = Hopper()


def refuses_chained(problem: Problem) -> str | None:
    """Why a product cannot be in a chain of the Hopper kernel, or None.

    In a chain, as in `dense`, the kernel also multiplies weights that prune nothing.
    """
    if problem.pattern.prunes:
        return HOPPER.refusal(problem)
    return refuses_device(problem.device, problem.dtype)


def chained_rows(w: SlideWeight) -> int:
    """The most rows of a product in a chain of the Hopper kernel."""
    return RESIDUAL_ROWS if w.pattern.prunes else DENSE_RESIDUAL_ROWS


def may_chain(w: SlideWeight, rows: int) -> bool:
    """Whether a chain of the Hopper kernel may multiply a weight by this number of rows.

    It speaks for the GPU of this machine, and without one for that which programs are lowered for.
    """
    if w.prepared and HOPPER.name not in w.prepared:
        return False
    return rows <= chained_rows(w) and refuses_device(device_kind("cuda"), w.dtype) is None

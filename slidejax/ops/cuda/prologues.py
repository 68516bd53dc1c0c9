"""Prologues in the lift kernel: when the kernel computes them, and how a call describes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops.cuda.library import on_gpu
from slidejax.ops.prologue import GLU, Activation, LayerNorm, Prologue, RMSNorm
from slidejax.weights.numerics import is_quantized

__all__ = ["NAMES", "fused", "longest_row", "operands_of"]

# The names of prologues in the lift kernel. Activations have the same names in Python and there.
# tests/cuda/test_limits.py compares both with the source.
NAMES: dict[type[Prologue], str] = {
    RMSNorm: "rms_norm",
    LayerNorm: "layer_norm",
    Activation: "activation",
    GLU: "glu",
}
# Bytes of a row of x, and of `up`, that fit beside the codes in the shared memory of a thread
# block, by the GPU's compute capability. tests/cuda/test_lift_emulated.py holds the kernel to them.
_LONGEST_ROW = {"8.0": 130 << 10, "9.0": 190 << 10, "10.0": 190 << 10, "10.3": 190 << 10}
_LONGEST_ROW_ELSEWHERE = 64 << 10


def longest_row(capability: str) -> int:
    """Bytes of the longest row of x, or of x and `up`, on which the kernel computes a prologue.

    Args:
      capability: the GPU's compute capability.

    >>> longest_row("9.0") // 1024, longest_row("8.6") // 1024
    (190, 64)
    """
    return _LONGEST_ROW.get(capability, _LONGEST_ROW_ELSEWHERE)


def fused(x: jax.Array, dtype, prologue: Prologue | None) -> bool:
    """Whether the lift kernel computes this prologue itself.

    It does for 8-bit results, if the rows fit in shared memory.
    """
    if prologue is None or type(prologue) not in NAMES or not is_quantized(dtype):
        return False
    capability = jax.devices()[0].compute_capability if on_gpu() else "9.0"
    row = x.shape[1] * x.dtype.itemsize * (2 if prologue.ROWS and not prologue.halves else 1)
    return row <= longest_row(capability)


def operands_of(
    x: jax.Array, prologue: Prologue | None
) -> tuple[tuple[jax.Array, ...], dict[str, np.generic | str]]:
    """The operands that follow x, and the attributes of a call.

    The operands are `up`, `weight` and `bias`; `[0]` stands for a missing array. With the prologue
    "glu", x without `up` holds both.
    """
    none = jnp.zeros(0, jnp.float32)

    def parameter(name: str) -> jax.Array:
        value = getattr(prologue, name, None)
        return none if value is None else value.astype(jnp.float32)

    up = getattr(prologue, "up", None)
    operands = (
        jnp.zeros(0, x.dtype) if up is None else up,
        parameter("weight"),
        parameter("bias"),
    )
    return operands, {
        "prologue": "none" if prologue is None else NAMES[type(prologue)],
        "activation": getattr(prologue, "activation", "silu"),
        "eps": np.float32(getattr(prologue, "eps", 0)),
    }

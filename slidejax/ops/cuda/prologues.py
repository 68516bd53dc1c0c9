"""Prologues in the lift kernel: when it computes them, and as which operands and attributes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops.cuda.library import on_gpu
from slidejax.ops.prologue import Prologue
from slidejax.weights.numerics import is_quantized

__all__ = ["fused", "operands_of"]

# The names of slidejax/ops/prologue.py, with their numbers in cuda/lift/lift.h
_PROLOGUES = {"RMSNorm": 1, "LayerNorm": 2, "Activation": 3, "GLU": 4}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
# Bytes of a row of x (and of up) that fit beside the codes in a block's shared memory, by the GPU's
# compute capability (cuda/lift/ring.cuh). 64 KB fit everywhere.
_FUSED_ROW = {"8.0": 130 << 10, "9.0": 190 << 10, "10.0": 190 << 10, "10.3": 190 << 10}


def fused(x: jax.Array, dtype, prologue: Prologue | None) -> bool:
    """Whether the lift kernel computes this prologue itself.

    It does for 8-bit results, if the rows fit in shared memory.
    """
    if prologue is None or not is_quantized(dtype):
        return False
    capability = jax.devices()[0].compute_capability if on_gpu() else "9.0"
    row = x.shape[1] * x.dtype.itemsize * (2 if prologue.ROWS else 1)
    return row <= _FUSED_ROW.get(capability, 64 << 10)


def operands_of(
    x: jax.Array, prologue: Prologue | None
) -> tuple[tuple[jax.Array, ...], dict[str, np.generic]]:
    """The operands that follow x, and the attributes of a call.

    The operands are `up`, `weight` and `bias`; `[0]` stands for an array that there is not.
    """
    none = jnp.zeros(0, jnp.float32)

    def parameter(name: str) -> jax.Array:
        value = getattr(prologue, name, None)
        return none if value is None else value.astype(jnp.float32)

    operands = (
        getattr(prologue, "up", jnp.zeros(0, x.dtype)),
        parameter("weight"),
        parameter("bias"),
    )
    kind = 0 if prologue is None else _PROLOGUES[type(prologue).__name__]
    activation = _ACTIVATIONS[getattr(prologue, "activation", "silu")]
    return operands, {
        "prologue": np.int32(kind),
        "activation": np.int32(activation),
        "eps": np.float32(getattr(prologue, "eps", 0)),
    }

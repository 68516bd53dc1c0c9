"""The implementation "dense": the weight with its zeros, each column multiplied once instead of once for every window that reads it.

It runs everywhere, and is what runs where nothing is known to be faster. On a Hopper GPU 8-bit products run in the Hopper kernel,
scales and bias included, where XLA would write the accumulators to memory and read them again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops.implementations import hopper
from slidejax.ops.implementations.base import Form, Implementation
from slidejax.ops.implementations.reference import accumulate, finish
from slidejax.ops.lift_quantize import lift_rows, unlift
from slidejax.ops.problem import device_kind
from slidejax.ops.prologue import inputs_of
from slidejax.weights.layout import scatter_values
from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import UNPRUNED

__all__ = ["DENSE", "dense_codes"]

# Bytes from which on the Hopper kernel multiplies a dense one with one row: 3584 x 3584 took as long either way; SmolLM2-135M, whose kernels have
# a megabyte at most, wrote 857 tokens a second with XLA's products and 590 with the kernel's.
_SMALL_KERNEL = 8 << 20


def dense_codes(w: SlideWeight, padded: bool = False) -> jax.Array:
    """The dense kernel `[out, in]` in the values' dtype, unscaled; with `padded`, padding columns included."""
    codes = w.prepared.get("dense")
    if codes is None:
        codes = scatter_values(w.values, w.zeros)
        codes = codes.reshape(*codes.shape[:-2], -1)
        if not padded:
            codes = codes[..., : w.in_features]
    elif padded:
        codes = jnp.pad(codes, ((0, 0), (0, w.groups * w.pattern.group - codes.shape[1])))
    return codes


def _in_hopper_kernel(x: jax.Array, kernel: jax.Array, platform: str) -> bool:
    """Whether a dense 8-bit product `[M, K] @ [out, K]^T` runs in the Hopper kernel. Its bulk copies want rows of the kernel of whole
    16 bytes; and one row times a small kernel is faster as XLA has it, without tensor cores."""
    if platform != "cuda" or hopper.refuses_device(device_kind(platform), np.dtype(kernel.dtype)):
        return False
    if x.shape[0] == 1 and kernel.shape[0] * kernel.shape[1] < _SMALL_KERNEL:
        return False
    return min(*x.shape, *kernel.shape) > 0 and kernel.shape[1] % 16 == 0


def _product(codes, kernel, scale_x, scale_w, bias, out_dtype, platform: str) -> jax.Array:
    """`codes [M, K] @ kernel [out, K]^T` with scales `[M, 1]`, `[out]` and bias; `out_dtype` None gives the raw accumulators."""
    if out_dtype is not None and _in_hopper_kernel(codes, kernel, platform):
        weight = hopper.HopperWeight.dense(kernel, scale_w)
        return hopper.matmul_call(codes, scale_x[:, 0], weight, bias, out_dtype)
    acc = accumulate(codes, kernel, platform)
    return acc if out_dtype is None else finish(acc, scale_x, scale_w, bias, out_dtype)


class Dense(Implementation):
    """Multiplies the dense codes. It refuses nothing."""

    name = "dense"
    # as large as the weight itself, where other forms are a fifth of it
    form = Form("dense", jax.jit(dense_codes), must_gain=1.05)

    def refuses(self, problem):
        return None

    def matmul(self, lifted, scale_x, w, bias, out_dtype, platform="default"):
        codes, kernel = unlift(lifted, w.pattern), dense_codes(w, padded=True)
        return _product(codes, kernel, scale_x, w.scale, bias, out_dtype, platform)

    def linear(self, x, prologue, w, bias, out_dtype, platform="default"):
        kernel = dense_codes(w, padded=not w.pattern.prunes)
        if x.shape[0] <= hopper.FEW_ROWS and _in_hopper_kernel(x, kernel, platform):
            weight = hopper.HopperWeight.dense(kernel, w.scale)
            return hopper.linear_call(x, prologue, weight, bias, kernel.shape[1], out_dtype)
        inputs, xs = inputs_of(x, prologue)
        codes, scale_x = lift_rows(xs, UNPRUNED, w.dtype, inputs, pads=False)
        kernel = kernel[:, : codes.shape[1]]  # without padding
        return _product(codes, kernel, scale_x, w.scale, bias, out_dtype, platform)


DENSE = Dense()

"""The implementation "dense": the product of un-lifted rows and the weight with its zeros.

It multiplies each column once, and not once for every window that reads it. It runs everywhere, and
is chosen where nothing is known to be faster. On a Hopper GPU 8-bit products run in the Hopper
kernel, scales and bias included. XLA would write the accumulators to memory and read them again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops import estimates
from slidejax.ops.implementations import hopper
from slidejax.ops.implementations.base import Form, Implementation, with_residual
from slidejax.ops.implementations.reference import accumulate, finish
from slidejax.ops.lift_quantize import lift_rows, unlift
from slidejax.ops.problem import device_kind
from slidejax.ops.prologue import inputs_of
from slidejax.ops.rates import rates_of
from slidejax.weights.layout import scatter_values
from slidejax.weights.numerics import is_quantized
from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import UNPRUNED

__all__ = ["DENSE", "dense_codes"]

# The smallest dense kernel, in bytes, for which one row uses the Hopper kernel instead of XLA. A
# kernel of 3584 x 3584 took as long either way. SmolLM2-135M, whose kernels have a megabyte at
# most, wrote text much faster with XLA's products.
_SMALL_KERNEL = 8 << 20


def dense_codes(w: SlideWeight, padded: bool = False) -> jax.Array:
    """The weight's values with its zeros, `[out, in]`, unscaled.

    With `padded` they keep the padding of K.
    """
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
    """Whether a dense 8-bit product `[M, K] @ [out, K]^T` runs in the Hopper kernel.

    The kernel's bulk copies need rows of whole 16 bytes. One row times a small kernel is faster in
    XLA, which uses no tensor cores for it.
    """
    if not isinstance(x.shape[0], int):  # an export for any number of rows
        return False
    if platform != "cuda" or hopper.refuses_device(device_kind(platform), np.dtype(kernel.dtype)):
        return False
    if x.shape[0] == 1 and kernel.shape[0] * kernel.shape[1] < _SMALL_KERNEL:
        return False
    return min(*x.shape, *kernel.shape) > 0 and kernel.shape[1] % 16 == 0


def _product(
    codes, kernel, scale_x, scale_w, bias, out_dtype, platform: str, residual
) -> jax.Array:
    """`codes [M, K] @ kernel [out, K]^T` with scales `[M, 1]` and `[out]`, and bias `[out]`.

    The residual is `[M, out]` or None. `out_dtype` None gives the raw accumulators.
    """
    if out_dtype is not None and _in_hopper_kernel(codes, kernel, platform):
        weight = hopper.HopperWeight.dense(kernel, scale_w)
        return with_residual(
            lambda dtype: hopper.matmul_call(codes, scale_x[:, 0], weight, bias, dtype),
            out_dtype,
            residual,
        )
    acc = accumulate(codes, kernel, platform)
    return acc if out_dtype is None else finish(acc, scale_x, scale_w, bias, out_dtype, residual)


class Dense(Implementation):
    """Multiplies with the dense codes. It refuses nothing."""

    name = "dense"
    # The form is as large as the weight itself. Other forms have a fifth of its size.
    form = Form(
        "dense",
        jax.jit(dense_codes),
        must_gain=1.05,
        outputs=1,
        inputs=True,
        shape=lambda w: (w.out_features, w.held_features),
    )

    takes_residual = True

    def refuses(self, problem):
        return None

    def estimate(self, problem):
        rates = rates_of(problem.device)
        if rates is None or problem.platform != "cuda":
            return None
        columns, weight = problem.in_features, estimates.dense_bytes(problem)
        if is_quantized(problem.dtype):  # XLA writes the sums, and scales them afterwards
            seconds = estimates.lift(rates, problem, columns)
            seconds += estimates.multiply(rates, problem, columns, weight, 4)
            seconds += estimates.finish(rates, problem, 4) if problem.out_dtype is not None else 0.0
        else:
            seconds = estimates.multiply(rates, problem, columns, weight, problem.dtype.itemsize)
        if problem.op != "linear":
            lifted = problem.pattern.lifted(columns)
            seconds += estimates.move(
                rates, problem.rows * (lifted + columns) * problem.dtype.itemsize
            )
        if "dense" not in problem.prepared:
            seconds += estimates.move(rates, estimates.packed_bytes(problem) + weight)
        return seconds

    def note(self, problem):
        if problem.platform != "cuda" or not problem.pattern.prunes or "dense" in problem.prepared:
            return None
        return "the weight is unpacked in each call: sj.prepare"

    def matmul(self, lifted, scale_x, w, bias, out_dtype, platform="default", residual=None):
        codes, kernel = unlift(lifted, w.pattern), dense_codes(w, padded=True)
        return _product(codes, kernel, scale_x, w.scale, bias, out_dtype, platform, residual)

    def linear(self, x, prologue, w, bias, out_dtype, platform="default", residual=None):
        kernel = dense_codes(w, padded=not w.pattern.prunes)
        if _in_hopper_kernel(x, kernel, platform) and x.shape[0] <= hopper.FEW_ROWS:
            weight = hopper.HopperWeight.dense(kernel, w.scale)
            return with_residual(
                lambda dtype: hopper.linear_call(x, prologue, weight, bias, kernel.shape[1], dtype),
                out_dtype,
                residual,
            )
        inputs, xs = inputs_of(x, prologue)
        codes, scale_x = lift_rows(xs, UNPRUNED, w.dtype, inputs, pads=False)
        kernel = kernel[:, : codes.shape[1]]  # cuts off padding
        return _product(codes, kernel, scale_x, w.scale, bias, out_dtype, platform, residual)


DENSE = Dense()

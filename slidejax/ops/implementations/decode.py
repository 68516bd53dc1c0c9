"""The implementation "decode": few rows times a packed weight as it lies, in one custom call.

The kernels read the packed form once, at about the rate of the memory (cuda/decode,
docs/decode-kernel.md). One or two rows are multiplied with 8-bit values without tensor cores. For
others the kernels make the 2:4 metadata on the way. They quantise x themselves where they can, or
round it to the weight's 16-bit type. Where they cannot, a small kernel of the same call does that
first. Bias and residual are added before the one rounding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops import estimates
from slidejax.ops.cuda import calls, library
from slidejax.ops.implementations import hopper
from slidejax.ops.implementations.base import Implementation, cuda_refusal
from slidejax.ops.problem import Problem
from slidejax.ops.rates import rates_of
from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import BLOCK_GROUPS, Pattern

__all__ = ["ALIGN", "DECODE", "GEMV_ROWS", "ROWS", "is_small", "operands", "workspace_bytes"]

# Limits of the kernels. tests/cuda/test_limits.py compares them with the sources.
ROWS = 16  # the most rows of x
GEMV_ROWS = 2  # the most rows without tensor cores
_ROWS_AT_ONCE = 8  # with more rows a weight of 8 bits is read twice
_STEP_BLOCKS = 4  # blocks of K in a step
ALIGN = 16  # of the parts of a workspace


def is_small(rows: int, in_features: int, pattern: Pattern, dtype: np.dtype) -> bool:
    """Whether every thread block converts x sooner than another kernel would have done it ahead.

    Rows times inputs decide. The limits were measured on an H100 against the Hopper kernel, which
    makes the metadata of large groups fast and multiplies few rows of a dense weight slowly
    (docs/journal/2026-11-28-small-models.md).
    """
    group = pattern.group if pattern.prunes else 0
    most = 80 if group <= 6 else 40 if group == 8 else 20
    return dtype.itemsize == 1 and rows <= ROWS and rows * in_features <= most * 1024


def _is_small(problem: Problem) -> bool:
    return is_small(problem.rows, problem.in_features, problem.pattern, problem.dtype)


def operands(w: SlideWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values, zeros and scales as the calls take them. A dense weight is `[out, K']` to them."""
    if w.pattern.prunes:
        return w.values, w.zeros, w.scale
    return w.values.reshape(w.out_features, -1), w.zeros.reshape(-1), w.scale


def workspace_bytes(w: SlideWeight, rows: int) -> int:
    """The codes of all rows, up to a whole step of K, and their scales. The call checks this."""
    group = w.pattern.group
    blocks = w.groups // BLOCK_GROUPS
    lifted = w.lifted_columns // blocks if w.pattern.prunes else BLOCK_GROUPS * group
    steps = -(-blocks // _STEP_BLOCKS)
    codes = rows * steps * _STEP_BLOCKS * lifted * w.dtype.itemsize
    return codes + -(-4 * rows // ALIGN) * ALIGN


def _refuses_float8(problem: Problem) -> str | None:
    name = problem.dtype.name
    code = library.architecture()
    if code is not None and code < (8, 9):
        return f"{name} needs code for compute capability 8.9 or later, not {code[0]}.{code[1]}"
    hoppers = hopper.refuses_device(problem.device, problem.dtype) is None
    if hoppers and problem.rows > GEMV_ROWS and not _is_small(problem):
        # On compute capability 9.0 mma converts float8 to float16 first. It then takes twice the
        # time of int8. One or two rows have no use for mma.
        return (
            f"more than {GEMV_ROWS} rows of {name} with {problem.in_features} inputs run in the "
            f"Hopper kernel on {problem.device}"
        )
    return None


class Decode(Implementation):
    """All patterns, "dense" included, times at most 16 rows, or 8 where x is large and values have
    8 bits."""

    name = "decode"
    cuda_only = True
    reads_packed = True
    takes_residual = True

    def refuses(self, problem):
        if reason := cuda_refusal(problem):
            return reason
        if problem.op != "linear":
            return "lifts the rows itself: it computes linear alone"
        if problem.dtype == jnp.float32:
            return "values must be int8, float8_e4m3fn, bfloat16 or float16, not float32"
        if problem.rows > ROWS:
            return f"takes at most {ROWS} rows, not {problem.rows}"
        twice = problem.rows > _ROWS_AT_ONCE and problem.dtype.itemsize == 1
        if twice and not _is_small(problem):
            return (
                f"takes at most {_ROWS_AT_ONCE} rows of {problem.dtype.name} with "
                f"{problem.in_features} inputs, not {problem.rows}"
            )
        return _refuses_float8(problem) if problem.dtype == jnp.float8_e4m3fn else None

    def estimate(self, problem):
        rates = rates_of(problem.device)
        if rates is None:
            return None
        result = problem.out_features * np.dtype(problem.out_dtype).itemsize
        rows = problem.rows * (problem.in_features * problem.x_dtype.itemsize + result)
        # A small kernel quantises the rows first where it must.
        return estimates.move(rates, 0) + estimates.move(
            rates, estimates.packed_bytes(problem) + rows
        )

    def linear(self, x, prologue, w, bias, out_dtype, platform="default", residual=None):
        if prologue is not None:
            x = prologue.apply(x)
        out_types = (
            jax.ShapeDtypeStruct((x.shape[0], w.out_features), out_dtype),
            jax.ShapeDtypeStruct((workspace_bytes(w, x.shape[0]) + ALIGN,), jnp.uint8),
        )
        none = jnp.zeros(0, jnp.float32)
        bias = none if bias is None else bias.astype(jnp.float32)
        residual = none if residual is None else residual
        y, _ = calls.call("slidejax_linear_decode", out_types, x, *operands(w), bias, residual)
        return y

    def available(self):
        return library.missing()


DECODE = Decode()

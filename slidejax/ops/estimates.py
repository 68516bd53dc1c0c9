"""Estimates of times, for devices and shapes where nothing was measured.

An estimate is made of published rates of the device (`slidejax.ops.rates`), and of the bytes and
multiplications of this library's kernels. It orders implementations. It is no prediction.
"""

from __future__ import annotations

from slidejax.ops.problem import Problem
from slidejax.ops.rates import Rates

__all__ = ["dense_bytes", "finish", "lift", "move", "multiply", "packed_bytes"]

# Seconds that a kernel takes beside its bytes, and the shares of the published rates that kernels
# reach. On an H100 (2026-11-26, docs/performance.md) a copy moves 0.90 of the memory's rate, and
# the best dense 8-bit products reach 0.73 of the tensor cores' rate. Sparse products are taken to
# reach the same share of theirs.
_LAUNCH = 3e-6
_MEMORY_SHARE = 0.9
_TENSOR_SHARE = 0.7


def packed_bytes(problem: Problem) -> float:
    """Bytes of a packed weight."""
    weights = problem.pattern.padded(problem.in_features) * problem.out_features
    zeros = 1 / problem.pattern.group if problem.pattern.prunes else 0.0
    return weights * (problem.pattern.density * problem.dtype.itemsize + zeros)


def dense_bytes(problem: Problem) -> float:
    """Bytes of a weight with its zeros."""
    return problem.in_features * problem.out_features * problem.dtype.itemsize


def move(rates: Rates, count: float) -> float:
    """Seconds of a kernel that moves bytes, and does nothing else that takes time."""
    return _LAUNCH + count / (_MEMORY_SHARE * rates.bytes())


def lift(rates: Rates, problem: Problem, columns: int) -> float:
    """Seconds to read x and write codes of `columns` columns. 0 where x is lifted already."""
    if problem.op != "linear":
        return 0.0
    read = problem.in_features * problem.x_dtype.itemsize
    return move(rates, problem.rows * (read + columns * problem.dtype.itemsize))


def multiply(
    rates: Rates,
    problem: Problem,
    columns: int,
    weight_bytes: float,
    sum_bytes: int,
    *,
    sparse: bool = False,
) -> float:
    """Seconds to multiply codes of `columns` columns with a weight, and write sums."""
    # Without an instruction for the dtype the operands are converted to 16 bits.
    rate = (rates.operations(problem.dtype) or rates.bfloat16 * 1e12) * (2 if sparse else 1)
    operations = 2.0 * problem.rows * columns * problem.out_features
    codes = columns * problem.dtype.itemsize
    moved = weight_bytes + problem.rows * (codes + problem.out_features * sum_bytes)
    return max(_LAUNCH + operations / (_TENSOR_SHARE * rate), move(rates, moved))


def finish(rates: Rates, problem: Problem, sum_bytes: int) -> float:
    """Seconds to read sums, and a residual, and write results."""
    result = sum_bytes if problem.out_dtype is None else problem.out_dtype.itemsize
    result += result if problem.has_residual else 0
    return move(rates, problem.rows * problem.out_features * (sum_bytes + result))

"""The implementation "reference": the formula of `sparse_matmul` in plain JAX.

It is the specification of all other implementations:

    y[m, o] = float32(sum over K' of lifted[m, k'] * W'[o, k']) * scale_x[m] * scale_w[o] + bias[o]
              + residual[m, o]

`W'` is the weight in lifted order, `expand_lifted`.
"""

from __future__ import annotations

import functools
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.ops.implementations.base import Implementation, add_residual, lift_input
from slidejax.weights import numerics
from slidejax.weights.layout import split_zeros
from slidejax.weights.packed import SlideWeight

__all__ = ["REFERENCE", "accumulate", "exact_int8_dot", "expand_lifted", "finish"]

# 127 * 128 * 1024 < 2**24: a float32 sum of 1024 products of int8 codes is exact. A code of x is at
# most 127, one of an int8 kernel -128 at least.
_EXACT_K = 1024
# The most columns of a product that a GPU computes in bfloat16. XLA's int8 products of few columns
# can be twice the right ones there, and those of any number where it tries no kernels (decision
# 058).
_NARROW_K = 128
# With so few rows the products are summed as integers. With more rows a float32 product is faster.
_FEW_ROWS = 4


def expand_lifted(w: SlideWeight) -> jax.Array:
    """The weight in lifted order with its zeros, `[out, K']`, unscaled.

    Each row is 2:4, unless the pattern prunes nothing.
    """
    if not w.pattern.prunes:
        return w.values.reshape(w.out_features, -1)
    z1, z2 = split_zeros(w.zeros)
    j = numerics.of_rank(jnp.arange(w.pattern.kept, dtype=jnp.int32), z1.ndim)
    # The column that kept value j comes from; no dtype is promoted, for those who forbid it.
    column = j + (j >= z1).astype(j.dtype) + (j >= z2 - 1).astype(j.dtype)
    lane = (column - 2 * (j // 2)).reshape(*column.shape[:-1], w.pattern.windows, 2)
    values = w.values.reshape(lane.shape)
    place = numerics.of_rank(jnp.arange(4, dtype=jnp.int32), lane.ndim + 1)
    chosen = lane[..., None] == place  # [..., windows, 2, 4]
    windows = jnp.where(chosen, values[..., None], jnp.zeros((), values.dtype))
    first, second = windows[..., 0, :], windows[..., 1, :]
    merged = jnp.where(chosen[..., 0, :], first, second)
    return merged.reshape(*merged.shape[:-3], -1)


def accumulate(codes: jax.Array, kernel: jax.Array, platform: str = "default") -> jax.Array:
    """`codes [M, K] @ kernel [out, K]^T`: int32 for int8, float32 for all other dtypes."""
    if codes.dtype == jnp.int8:
        if platform == "default":
            return exact_int8_dot(codes, kernel)
        if codes.shape[1] <= _NARROW_K or not _is_autotuned():
            return _exact_float_dot(codes, kernel, jnp.bfloat16)
        return jax.lax.dot_general(
            codes, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )
    if platform == "default":  # XLA's CPU dot of narrow floats may accumulate in the narrow type
        if kernel.dtype.itemsize == 1:
            codes, kernel = _converted_here(codes, kernel)
        codes, kernel = codes.astype(jnp.float32), kernel.astype(jnp.float32)
    return jax.lax.dot_general(
        codes,
        kernel,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
    )


def exact_int8_dot(codes: jax.Array, kernel: jax.Array) -> jax.Array:
    """`int8 [M, K] @ int8 [out, K]^T` in int32, on a CPU many times faster than XLA's own.

    The result is exact. A few rows are summed as integers, which reads the kernel as it lies. More
    rows go through float32 products of at most 1024 columns, for which the kernel is converted.
    """
    rows = codes.shape[0]
    if isinstance(rows, int) and rows <= _FEW_ROWS:  # an export may leave their number open
        return _int8_sums(codes, kernel)
    return _exact_float_dot(*_converted_here(codes, kernel), jnp.float32)


def _is_autotuned() -> bool:
    """Whether XLA tries its kernels on a GPU before it chooses one, by XLA_FLAGS."""
    levels = re.findall(r"--xla_gpu_autotune_level=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return not levels or int(levels[-1]) > 0


def _exact_float_dot(codes: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """`int8 [M, K] @ int8 [out, K]^T` in int32, by products in float32 or bfloat16.

    It is exact: both hold every code, and float32 every sum of at most _EXACT_K products.
    """
    sums = [
        jax.lax.dot_general(
            codes[:, start : start + _EXACT_K].astype(dtype),
            kernel[:, start : start + _EXACT_K].astype(dtype),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        ).astype(jnp.int32)
        for start in range(0, max(1, codes.shape[1]), _EXACT_K)
    ]
    return functools.reduce(jnp.add, sums)


def _converted_here(codes: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """8-bit codes and kernel, such that XLA's CPU converts the kernel just before their product.

    The conversion needs nothing but the parameters. So XLA would put it before a loop, or at the
    beginning of the program, and hold the kernels of all layers in float32 at once. Taking the
    memory for them costs several times what the products of a short prompt do.

    The barrier keeps the conversion inside a loop. XLA drops it before it orders a program, so the
    values of the kernel depend on the codes, too: they get a bit that is always 0 without XLA
    knowing it, the second one of a square.
    """
    if 0 in codes.shape:
        return codes, kernel
    codes, kernel = jax.lax.optimization_barrier((codes, kernel))
    some = jax.lax.bitcast_convert_type(codes[0, 0], jnp.uint8)
    nothing = some * some & jnp.uint8(2)
    bits = jax.lax.bitcast_convert_type(kernel, jnp.uint8) ^ nothing
    return codes, jax.lax.bitcast_convert_type(bits, kernel.dtype)


def _int8_sums(codes: jax.Array, kernel: jax.Array) -> jax.Array:
    """`exact_int8_dot` as sums of products that XLA's CPU fuses with the reading of the kernel.

    Eight columns are summed side by side, in vector registers. XLA would cut a sum over an axis of
    more than 32 numbers into a tree and keep the products in memory, so no axis is longer. Out of a
    loop it would move the conversion of the kernel, which would then be kept as integers of 32 bits
    and made anew in each call. The barrier makes the kernel depend on the codes, so it cannot.
    """
    codes, kernel = jax.lax.optimization_barrier((codes, kernel))
    total = jnp.zeros((codes.shape[0], kernel.shape[0]), jnp.int32)
    for start, shape in _cut(codes.shape[1]):
        part = slice(start, start + math.prod(shape))
        x = codes[:, part].reshape(-1, 1, *shape).astype(jnp.int32)
        w = kernel[:, part].reshape(1, -1, *shape).astype(jnp.int32)
        sides = (x * w).sum(tuple(range(2, 1 + len(shape))))
        total += sides.sum(-1)
    return total


def _cut(columns: int) -> list[tuple[int, tuple[int, ...]]]:
    """Where parts of the columns begin, and as what shape each part is summed.

    >>> _cut(576)
    [(0, (3, 24, 8))]
    >>> _cut(1000)
    [(0, (5, 25, 8))]
    >>> _cut(8205)
    [(0, (32, 32, 8)), (8192, (1, 1, 8)), (8200, (1, 1, 5))]
    """
    parts: list[tuple[int, tuple[int, ...]]] = []
    start = 0
    while start < columns:
        left = columns - start
        eights = min(left // 8, 32 * 32)
        inner = max((d for d in range(1, 33) if eights % d == 0), default=1)
        if eights > 32 * inner:  # it has no two factors up to 32: leave a part for later
            inner = 32
        shape = (eights // inner, inner, 8) if eights else (1, 1, left)
        parts.append((start, shape))
        start += math.prod(shape)
    return parts


def finish(
    acc: jax.Array,
    scale_x: jax.Array,
    scale_w: jax.Array,
    bias: jax.Array | None,
    out_dtype,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Scales, adds and rounds once: `float32(acc) * scale_x * scale_w + bias + residual`."""
    y = acc.astype(jnp.float32) * scale_x * numerics.of_rank(scale_w, acc.ndim)
    if bias is not None:
        y = y + numerics.of_rank(bias.astype(jnp.float32), y.ndim)
    return y.astype(out_dtype) if residual is None else add_residual(y, residual, out_dtype)


class Reference(Implementation):
    """Lifts x, expands the weight and multiplies. It is slow, and refuses nothing."""

    name = "reference"
    competes = False
    takes_residual = True

    def refuses(self, problem):
        return None

    def matmul(self, lifted, scale_x, w, bias, out_dtype, platform="default", residual=None):
        acc = accumulate(lifted, expand_lifted(w), platform)
        if out_dtype is None:
            return acc
        return finish(acc, scale_x, w.scale, bias, out_dtype, residual)

    def linear(self, x, prologue, w, bias, out_dtype, platform="default", residual=None):
        lifted, scale_x = lift_input(x, prologue, w)
        return self.matmul(lifted, scale_x, w, bias, out_dtype, platform, residual)


REFERENCE = Reference()

"""Symmetric 8-bit quantisation with one scale for each row.

Every kernel of slidejax follows these formulas bit for bit:

    scale = absmax * float32(1 / qmax)          qmax = 127 (int8), 448 (float8_e4m3fn)
    code  = clip(round_half_even(x * (1 / scale)), -qmax, qmax)

Reciprocals are written out on purpose. XLA turns a division by a constant into a multiplication
by its reciprocal, and a CUDA compiler does not. Written this way, both compute the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "QMAX",
    "absmax",
    "all_finite",
    "check_dtype",
    "dtype_of",
    "encode",
    "holds_floats",
    "is_quantized",
    "known",
    "of_rank",
    "scale_from_absmax",
    "unit",
]

# The largest code of each 8-bit type.
QMAX = {np.dtype(jnp.int8): 127.0, np.dtype(jnp.float8_e4m3fn): 448.0}
_VALUE_DTYPES = (*QMAX, np.dtype(jnp.bfloat16), np.dtype(jnp.float16), np.dtype(jnp.float32))
_TINY = np.finfo(np.float32).tiny  # the smallest normal number


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether a tree of arrays holds neither inf nor nan, bool `[]`.

    It is one program, which keeps no mask.

    >>> bool(all_finite(jnp.array([1.0, jnp.inf])))
    False
    """
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def known(predicate: Callable[..., jax.Array], *arrays: Any) -> bool | None:
    """The truth of `predicate(*arrays)`, or None where an array is traced.

    Arrays that are known are computed with at once, also inside a program that is being traced.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays)):
        return None
    with jax.ensure_compile_time_eval():
        return bool(predicate(*arrays))


def of_rank(x: jax.Array, ndim: int) -> jax.Array:
    """An array with axes of size 1 before its own, so that it has `ndim` of them.

    JAX adds such axes by itself, unless users forbid it (`jax_numpy_rank_promotion="raise"`).

    >>> of_rank(jnp.ones(3), 2).shape
    (1, 3)
    """
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def dtype_of(dtype) -> np.dtype | None:
    """The dtype that a caller gave, or None if it is none.

    >>> dtype_of("bfloat16").name, dtype_of("6:8"), dtype_of(1.5)
    ('bfloat16', None, None)
    """
    if dtype is None:  # NumPy takes it for float64
        return None
    try:
        return np.dtype(jnp.dtype(dtype))
    except (TypeError, ValueError, SyntaxError):  # NumPy reads lists of dtypes, too
        return None


def holds_floats(dtype) -> bool:
    """Whether JAX takes arrays of a dtype as floats that can be packed.

    It takes NumPy's float64 as float32, unless it has 64 bits.
    """
    return jax.dtypes.canonicalize_dtype(dtype) in (jnp.bfloat16, jnp.float16, jnp.float32)


def check_dtype(dtype, name: str = "dtype") -> np.dtype:
    """Returns the dtype of packed values or lifted activations as a `numpy.dtype`.

    Raises:
      ValueError: if it is not int8, float8_e4m3fn, bfloat16, float16 or float32.
    """
    expected = f"{name} must be one of {', '.join(d.name for d in _VALUE_DTYPES)}"
    resolved = dtype_of(dtype)
    if resolved is None:
        raise ValueError(f"{expected}, got {dtype!r:.60}")
    if resolved not in _VALUE_DTYPES:
        raise ValueError(f"{expected}, got {dtype if isinstance(dtype, str) else resolved.name}")
    return resolved


def is_quantized(dtype) -> bool:
    """Whether values of this dtype are 8-bit codes, which need a scale."""
    return np.dtype(dtype) in QMAX


def absmax(x: jax.Array, axis) -> jax.Array:
    """The largest magnitude along `axis` in float32, inf if there is a nan. The axis is kept.

    A maximum must not be trusted with nan: that of XLA on a CPU and that of NCCL lose it. Infinity
    is lost by neither, and makes the same scale.

    >>> absmax(jnp.array([[1.0, -3.0], [jnp.nan, 2.0]]), -1).ravel().tolist()
    [3.0, inf]
    """
    x = jnp.abs(x.astype(jnp.float32))
    largest = jnp.where(jnp.isnan(x), np.float32(np.inf), x)
    return jnp.max(largest, axis=axis, keepdims=True, initial=0.0)


@jax.jit
def unit(*kernels: jax.Array) -> jax.Array:
    """The power of four for each output, float32 `[1, out]`, that brings its largest weight near 1.

    Multiplying by it changes no digit, also of roots. Squares and inverses then stay in the range
    of float32. It is 1 for an output of zeros, and for one with inf or nan.

    >>> unit(jnp.array([[-30.0, 0.0], [2.0, 0.25]])).tolist()
    [[0.0625, 4.0]]
    """
    largest = functools.reduce(jnp.maximum, [absmax(kernel, 0) for kernel in kernels])
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 0))
    even = jnp.clip(exponent, -126, 126) // 2 * 2
    bits = (127 - even).astype(jnp.int32) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def scale_from_absmax(absmax: jax.Array, dtype) -> jax.Array:
    """The scale of a row with this largest magnitude, float32.

    A zero row, or one whose scale would be subnormal, has scale 1, and `encode` gives it codes 0.
    A row with inf or nan has scale nan, which makes the outputs of this row nan, and no others.
    """
    scale = absmax * np.float32(1.0 / QMAX[np.dtype(dtype)])
    scale = jnp.where(scale < _TINY, np.float32(1), scale)
    return jnp.where(jnp.isfinite(absmax), scale, np.float32(np.nan))


def encode(x: jax.Array, absmax: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Quantises `x` with the scale of `absmax`, which broadcasts against `x`.

    Returns:
      `(codes, scale)`: codes of `dtype` in the shape of `x`, and scales, float32 in the shape of
      `absmax`.
    """
    dtype = np.dtype(dtype)
    qmax = np.float32(QMAX[dtype])
    scale = scale_from_absmax(absmax, dtype)
    inverse = 1.0 / scale
    without_scale = ~(absmax * np.float32(1.0 / QMAX[dtype]) >= _TINY) | ~jnp.isfinite(absmax)
    scaled = jnp.where(without_scale, np.float32(0), x.astype(jnp.float32) * inverse)
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(scaled), -qmax, qmax).astype(dtype), scale
    return _round_e4m3(jnp.clip(scaled, -qmax, qmax)).astype(dtype), scale


def _round_e4m3(x: jax.Array) -> jax.Array:
    """Rounds float32 within ±448 to the nearest e4m3 number, ties to even. The result is float32.

    XLA's cast alone is not enough: on some platforms it goes through float16 and rounds twice.
    """
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
    # Below 2**-6 the spacing is 2**-9.
    subnormal = jnp.round(x * np.float32(512)) * np.float32(1 / 512)
    return jnp.where(jnp.abs(x) < np.float32(2**-6), subnormal, normal)

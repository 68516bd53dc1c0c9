"""Lifting and quantisation of activations, in one pass.

The GEMM runs over lifted columns. Window `w` of group `g` reads its four columns of x
(SlideSparse, arXiv 2603.05232):

    lifted[m, g, w, l] = code(x[m, 2N g + 2 w + l])        flattened, K' = groups * (N - 1) * 4

Each row is quantised with its own scale (`slidejax.weights.numerics`). 16- and 32-bit values are
not quantised. Their scale is 1, or nan for a row that holds inf or nan, or a number that becomes
inf in the dtype of the values. Then the row's outputs are nan on every implementation. The norm or
activation before the layer can be part of the op (`slidejax.ops.prologue`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule
from jax.sharding import PartitionSpec as P

from slidejax.ops.cuda import calls, library, prologues
from slidejax.ops.primitive import check_input, make_primitive, map_batched, with_rules
from slidejax.ops.prologue import PLAIN, InputLayout, Prologue, check_halves, inputs_of
from slidejax.ops.sharding import (
    axis_names,
    cut_of,
    partitioned,
    row_factors,
    vary,
    varying_axes,
    with_automatic_axes,
)
from slidejax.weights import numerics
from slidejax.weights.pattern import Pattern

__all__ = [
    "lift",
    "lift_quantize",
    "lift_quantize_p",
    "lift_rows",
    "lift_shard",
    "quantize_rows",
    "row_absmax",
    "unlift",
]


# --- reference ------------------------------------------------------------------------------------


def lift(x: jax.Array, pattern: Pattern) -> jax.Array:
    """Lifts the columns of `x` `[..., K]` to `[..., K']`, zero-padded to whole blocks.

    Nothing is quantised.
    """
    missing = pattern.padded(x.shape[-1]) - x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // pattern.group, pattern.group)
    windows = [groups[..., 2 * w : 2 * w + 4] for w in range(pattern.windows)]
    return jnp.concatenate(windows, axis=-1).reshape(*x.shape[:-1], pattern.lifted(x.shape[-1]))


def unlift(lifted: jax.Array, pattern: Pattern) -> jax.Array:
    """The columns `[..., padded K]` that were lifted, each from the first window that holds it."""
    if pattern.windows == 1:  # 2:4 and "dense" have one window, which overlaps no other
        return lifted
    groups = lifted.shape[-1] // (4 * pattern.windows)
    windows = lifted.reshape(*lifted.shape[:-1], groups, pattern.windows, 4)
    head = windows[..., :2].reshape(*windows.shape[:-2], 2 * pattern.windows)
    return jnp.concatenate([head, windows[..., -1, 2:]], axis=-1).reshape(
        *lifted.shape[:-1], groups * pattern.group
    )


def row_absmax(x: jax.Array) -> jax.Array:
    """The largest magnitude of each row, float32 `[..., 1]`."""
    return numerics.absmax(x, -1)


def quantize_rows(
    x: jax.Array, dtype, absmax: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Quantises each row of `x` in plain JAX, without lifting.

    Args:
      x: `[..., K]`.
      dtype: of the codes. For 16- and 32-bit dtypes the codes are x itself, and the scale is 1, or
        nan for a row with inf or nan, or with a number that becomes inf in that dtype.
      absmax: float32 `[..., 1]`, the largest magnitude of each row; None to compute it.

    Returns:
      `(codes, scale)`: `[..., K]` and float32 `[..., 1]`.
    """
    if absmax is None:
        absmax = row_absmax(x)
    if numerics.is_quantized(dtype):
        return numerics.encode(x, absmax, dtype)
    return x.astype(dtype), row_scale(absmax, dtype)


def row_scale(absmax: jax.Array, dtype) -> jax.Array:
    """The scale of each row from its largest magnitude, in float32 and the same shape."""
    if numerics.is_quantized(dtype):
        return numerics.scale_from_absmax(absmax, dtype)
    # Float16 has numbers below 65,520 only. A larger one must not become inf in one implementation
    # and nan in another.
    finite = jnp.isfinite(absmax.astype(dtype))
    return jnp.where(finite, np.float32(1), np.float32(np.nan))


def _reference(x, absmax, pattern, dtype):
    codes, scale = quantize_rows(x, dtype, absmax)
    return lift(codes, pattern), scale


# --- primitive ------------------------------------------------------------------------------------


def _columns(x, pattern: Pattern, inputs: InputLayout, pads: bool) -> int:
    """The number of columns of the result: K', or K without padding."""
    return pattern.lifted(inputs.columns(x)) if pads else inputs.columns(x)


def _shapes(x, *rest, pattern, dtype, inputs, pads):
    columns = _columns(x, pattern, inputs, pads)
    return [((x.shape[0], columns), dtype), ((x.shape[0], 1), np.float32)]


def _lowering(*operands, platform, pattern, dtype, inputs, pads):
    xs, given = operands[: inputs.count], operands[inputs.count :]
    x, absmax = xs[0], given[0] if given else None
    known = all(isinstance(size, int) for size in x.shape)  # not so in an export for any batch
    if platform == "cuda" and library.unusable() is None and known and math.prod(x.shape):
        columns = _columns(x, pattern, inputs, pads)
        group = pattern.group if pads else 0  # the call only quantises if the group is 0
        prologue = inputs.prologue(xs)
        if absmax is None and prologues.fused(x, dtype, prologue):
            codes, scale = calls.lift_quantize_fused_call(
                x, prologue, group=group, lifted_columns=columns, dtype=dtype
            )
        else:
            largest = jnp.zeros(0, jnp.float32) if absmax is None else absmax[:, 0]
            codes, scale = calls.lift_quantize_call(
                inputs.apply(xs), largest, group=group, lifted_columns=columns, dtype=dtype
            )
        return codes, scale[:, None]
    x = inputs.apply(xs)
    if not pads:
        return quantize_rows(x, dtype, absmax)
    return _reference(x, absmax, pattern, dtype)


lift_quantize_p = make_primitive("slidejax_lift_quantize", _shapes, _lowering)


def lift_rows(
    xs: Sequence[jax.Array],
    pattern: Pattern,
    dtype,
    inputs: InputLayout = PLAIN,
    absmax: jax.Array | None = None,
    pads: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Binds the primitive; the leading axes of x become one.

    Args:
      xs: x `[..., K]`, or `[..., 2 K]`, and its prologue's arrays, as `inputs` says.
      pattern: of the lift; "dense" lifts nothing.
      dtype: of the codes.
      inputs: the layout of `xs`.
      absmax: `[..., 1]`, in place of the rows' own if K is split over a mesh.
      pads: whether to pad the result to whole blocks. Only the pattern "dense" can do without.

    Returns:
      `(codes, scale)`: `[..., K']`, or `[..., K]` without padding, and float32 `[..., 1]`.
    """
    leading, columns = xs[0].shape[:-1], inputs.columns(xs[0])
    pads = pattern.prunes or (pads and pattern.padded(columns) != columns)
    rows = math.prod(leading)
    operands = [*inputs.flat(xs), *(() if absmax is None else (absmax.reshape(rows, 1),))]
    operands = vary(varying_axes(*operands), *operands)
    codes, scale = lift_quantize_p.bind(
        *operands, pattern=pattern, dtype=np.dtype(dtype), inputs=inputs, pads=pads
    )
    return codes.reshape(*leading, codes.shape[-1]), scale.reshape(*leading, 1)


def lift_shard(
    xs: Sequence[jax.Array], pattern: Pattern, dtype, inputs: InputLayout, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Lifts one shard of rows whose columns are split over the mesh axes `axes`.

    The shards of a row share one scale, from the largest magnitude of them all.
    """
    # Rows are flattened first, as on one device. XLA does not round to bfloat16 between operations
    # that no reshape parts, so the bits would depend on the cut otherwise.
    leading = xs[0].shape[:-1]
    x = inputs.apply(inputs.flat(xs), axes)
    absmax = jax.lax.pmax(row_absmax(x), axes)
    codes, _ = lift_rows([x], pattern, dtype, absmax=absmax)
    # The scale is computed from the reduced absmax, so that JAX knows that it is the same on every
    # shard.
    scale = row_scale(absmax, dtype)
    return codes.reshape(*leading, codes.shape[-1]), scale.reshape(*leading, 1)


# --- sharding -------------------------------------------------------------------------------------


def _partitioned(pattern: Pattern, dtype, inputs: InputLayout):
    def op(*xs):
        return lift_rows(xs, pattern, dtype, inputs)

    def rule(mesh, operands, results):
        *leading, columns = operands[0].shape
        rank = len(leading) + 1
        rows = row_factors(rank)
        scale = ArrayMapping(*rows, "one")
        if columns == pattern.padded(columns) and not inputs.halves:
            # Groups stay whole: x and the result are both cut between groups.
            per_group = pattern.windows * 4
            return SdyShardingRule(
                inputs.mappings(CompoundFactor("g", "c"), rank),
                (ArrayMapping(*rows, CompoundFactor("g", "d")), scale),
                g=columns // pattern.group,
                c=pattern.group,
                d=per_group,
            )
        return SdyShardingRule(inputs.mappings("k", rank), (ArrayMapping(*rows, "l"), scale))

    def partition(mesh, operands, results):
        x = operands[0]
        cut = cut_of(
            *("lift_quantize", mesh, x, None, results[0], pattern, x.shape[-1]),
            whole_k=inputs.halves,
        )

        def local(*xs):
            return (
                lift_shard(xs, pattern, dtype, inputs, cut.k)
                if cut.k
                else lift_rows(xs, pattern, dtype, inputs)
            )

        return (
            mesh,
            local,
            (cut.sharding("rows", "k"), cut.sharding("rows", None)),
            inputs.shardings(cut),
        )

    return partitioned(op, rule, partition)


# --- batching, derivative -------------------------------------------------------------------------


@functools.cache
def _op(pattern: Pattern, dtype, inputs: InputLayout, reduce_axis: tuple[str, ...]):
    automatic = _partitioned(pattern, dtype, inputs)

    def primal(*xs):
        return (
            lift_shard(xs, pattern, dtype, inputs, reduce_axis) if reduce_axis else automatic(*xs)
        )

    def vmap_rule(op, axis_size, in_batched, *xs):
        return map_batched(op, axis_size, in_batched, range(inputs.rows), xs)

    def residuals(xs, results):
        _, scale = results
        # Without a prologue only the shape and the dtype of x are needed.
        return scale, xs if inputs.has_prologue else [jnp.zeros((0, xs[0].shape[-1]), xs[0].dtype)]

    def backward(residuals, cotangents):
        scale, xs = residuals
        d_lifted, _ = cotangents
        if not jnp.issubdtype(d_lifted.dtype, jnp.floating):
            return (
                jnp.zeros((*scale.shape[:-1], xs[0].shape[-1]), xs[0].dtype),
                *map(jnp.zeros_like, xs[1:]),
            )
        # Straight-through: code ~ x / scale. A column of x feeds every window that holds it.
        columns = inputs.columns(xs[0])
        d_columns = _lift_transpose(d_lifted.astype(jnp.float32) / scale, pattern, columns)
        return inputs.pull_back(xs, d_columns, reduce_axis)

    return with_rules(primal, vmap_rule, backward, residuals)


def _lift_transpose(d_lifted: jax.Array, pattern: Pattern, columns: int) -> jax.Array:
    x = jnp.zeros((*d_lifted.shape[:-1], columns), d_lifted.dtype)
    like = vary(varying_axes(d_lifted), x)
    (d_x,) = jax.linear_transpose(functools.partial(lift, pattern=pattern), *like)(d_lifted)
    return d_x


# --- public ---------------------------------------------------------------------------------------


def lift_quantize(
    x: jax.Array,
    pattern: str | Pattern,
    dtype=jnp.int8,
    reduce_axis: str | tuple[str, ...] | None = None,
    prologue: Prologue | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Lifts and quantises activations for `sparse_matmul`.

    Args:
      x: `[..., in]`, bfloat16, float16 or float32; leading axes are rows.
      pattern: of the weight, such as `"6:8"`.
      dtype: of the weight's values. int8 and float8_e4m3fn quantise each row with its own scale;
        bfloat16, float16 and float32 only lift.
      reduce_axis: inside `shard_map`, the mesh axes over which K is split.
      prologue: an `RMSNorm`, `LayerNorm`, `Activation` or `GLU` of slidejax to apply to x first.

    Returns:
      `(lifted, scale)`: `[..., K']` of `dtype` with `K' = pattern.lifted(in)`, and float32
      `[..., 1]`.

    Raises:
      ValueError: for a bad shape, dtype or pattern.
      TypeError: if `prologue` is none of these.

    >>> xl, s = lift_quantize(jnp.arange(8.)[None], "6:8", "int8")
    >>> xl[0, :12].tolist()
    [0, 18, 36, 54, 36, 54, 73, 91, 73, 91, 109, 127]
    >>> xl.shape, s.shape
    ((1, 96), (1, 1))
    """
    pattern = Pattern.parse(pattern)
    dtype = numerics.check_dtype(dtype)
    x = check_input(x)
    inputs, xs = inputs_of(x, prologue)
    check_halves("lift_quantize", inputs, reduce_axis)
    return with_automatic_axes(
        _op(pattern, dtype, inputs, axis_names(reduce_axis)),
        vary(varying_axes(*xs), *xs),
        lambda x, *_: (
            P(*x[:-1], None if inputs.halves else x[-1]),
            P(*x[:-1], None),
        ),
    )

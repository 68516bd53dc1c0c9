"""`linear`, the op that layers call: `sparse_matmul(*lift_quantize(x), w, bias)` of un-lifted x.

The primitive takes x as it is. Rows of x, outputs of W, and K by whole blocks can then each be
split over a mesh without gathering x or W, and every shard runs the same custom call. If K is
split, the rows' largest magnitudes are max-reduced and the raw accumulators are summed; the scales
follow, and bias and residual are added once. The implementation is chosen when the op is lowered
for a platform (`slidejax.ops.choice`). A prologue (`slidejax.ops.prologue`) is applied where the
rows are quantised.

The derivative treats quantisation as straight-through. 8-bit values have no gradient, and the mask
stays.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule

from slidejax.ops import sparse_matmul
from slidejax.ops.choice import implementation_for, on_right_platform
from slidejax.ops.lift_quantize import lift_shard
from slidejax.ops.parameters import (
    LinearParams,
    fixed,
    forms_in,
    given,
    product_settings,
    take_residual,
    weight_factors,
    weight_shardings,
    with_forms,
)
from slidejax.ops.primitive import check_input, make_primitive, map_batched, with_rules
from slidejax.ops.problem import Problem
from slidejax.ops.prologue import Prologue, check_halves, inputs_of
from slidejax.ops.sharding import (
    MeshPartition,
    cut_of,
    partitioned,
    product_spec,
    row_factors,
    vary,
    varying_axes,
    with_automatic_axes,
)
from slidejax.ops.shards import partitions, product_key
from slidejax.weights import numerics
from slidejax.weights.layout import scatter_values
from slidejax.weights.packed import (
    LinearWeight,
    SlideWeight,
    WrappedWeight,
    check_held,
    check_weight,
)

__all__ = ["linear", "linear_p"]


# --- primitive ------------------------------------------------------------------------------------


def _shapes(*operands, settings):
    w, _ = settings.weight(operands)
    return [((operands[0].shape[0], w.out_features), settings.out_dtype)]


def _split(
    operands, settings: LinearParams
) -> tuple[tuple, jax.Array | None, SlideWeight, jax.Array | None]:
    """Returns x with its prologue's arrays, the residual, the weight and the bias."""
    xs = operands[: settings.inputs.count]
    return xs, settings.residual(operands), *settings.weight(operands)


def _lowering(*operands, platform, settings):
    xs, residual, w, bias = _split(operands, settings)
    prologue = settings.inputs.prologue(xs)
    runs = implementation_for(Problem.of("linear", xs[0], w, settings, platform))
    return [runs.run_linear(xs[0], prologue, w, bias, residual, settings.out_dtype, platform)]


linear_p = make_primitive("slidejax_linear", _shapes, _lowering)


def _bind(xs, residual, w: SlideWeight, bias, settings: LinearParams) -> jax.Array:
    """Binds the primitive; the leading axes of x become one."""
    leading = xs[0].shape[:-1]
    rows = [r.reshape(math.prod(leading), w.out_features) for r in given(residual)]
    operands = (*settings.inputs.flat(xs), *rows, *settings.operands(w, bias))
    (y,) = linear_p.bind(*vary(varying_axes(*operands), *operands), settings=settings)
    return y.reshape(*leading, w.out_features)


# --- sharding -------------------------------------------------------------------------------------


def _split_k(
    xs, residual, w: SlideWeight, bias, settings: LinearParams, cut: MeshPartition
) -> jax.Array:
    """One shard of a product whose K is split."""
    codes, scale_x = lift_shard(xs, w.pattern, w.dtype, settings.inputs, cut.k)
    return sparse_matmul.split_k(codes, scale_x, residual, w, bias, settings, cut)


def _partitioned(settings: LinearParams):
    def op(*operands):
        return _bind(*_split(operands, settings), settings)

    def rule(mesh, operands, results):
        rank = len(operands[0].shape)
        weight = weight_factors(settings, operands, rank)
        y = ArrayMapping(*row_factors(rank), "o")
        whole_blocks = settings.in_features == settings.pattern.padded(settings.in_features)
        if whole_blocks and not settings.inputs.halves:
            xs = settings.inputs.mappings(CompoundFactor("g", "c"), rank)
            return SdyShardingRule(
                (*xs, *weight), (y,), c=settings.pattern.group, reduction_factors=("g",)
            )
        # K of x and the groups of W do not line up, and neither is ever cut.
        return SdyShardingRule((*settings.inputs.mappings("k", rank), *weight), (y,))

    def partition(mesh, operands, result):
        values = settings.weight(operands)[0].values
        partitions(product_key(settings, operands[0].shape, values.shape))
        cut = cut_of(
            *("linear", mesh, operands[0], values, result, settings.pattern, settings.in_features),
            whole_k=settings.inputs.halves,
        )
        kept = forms_in("linear", cut, settings, operands)

        def local(*operands):
            xs, residual, w, bias = _split(operands, settings)
            w = with_forms(w, kept)
            if cut.k:
                return _split_k(xs, residual, w, bias, settings, cut)
            here = dataclasses.replace(settings, prepared=tuple(w.prepared))
            return _bind(xs, residual, w, bias, here)

        shardings = (
            *settings.inputs.shardings(cut),
            *weight_shardings(cut, settings, operands, kept),
        )
        return mesh, local, cut.sharding("y_rows", "y_out"), shardings

    return partitioned(op, rule, partition)


# --- batching, derivative -------------------------------------------------------------------------


@functools.cache
def _op(settings: LinearParams):
    automatic = _partitioned(settings)

    def primal(x, *rest):
        operands = (on_right_platform(x, "linear", settings.implementation), *rest)
        if not settings.reduce_axis:
            return automatic(*operands)
        cut = MeshPartition(None, k=settings.reduce_axis)
        xs, residual, w, bias = _split(operands, settings)
        w = with_forms(w, forms_in("linear", cut, settings, operands))
        return _split_k(xs, residual, w, bias, settings, cut)

    def vmap_rule(op, axis_size, in_batched, *operands):
        rows = {*range(settings.inputs.rows)}
        if settings.has_residual:
            rows.add(settings.residual_at(operands))
        return map_batched(op, axis_size, in_batched, rows, operands)

    def backward(operands, dy):
        xs, _, w, bias = _split(operands, settings)
        dy = dy.astype(jnp.float32)
        codes = scatter_values(w.values, w.zeros)  # a shard may have no prepared forms
        codes = codes.reshape(codes.shape[0], -1).astype(jnp.float32)
        dx = ((dy * numerics.of_rank(w.scale, dy.ndim)) @ codes)[
            ..., : settings.inputs.columns(xs[0])
        ]
        d_values = None
        if not numerics.is_quantized(w.dtype):
            x = settings.inputs.apply(xs, settings.reduce_axis)
            missing = codes.shape[1] - x.shape[-1]
            columns = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, missing)])
            d_values = sparse_matmul.values_gradient(sparse_matmul.outer(dy, columns), w)
        d_bias = () if bias is None else (sparse_matmul.sum_of_rows(dy).astype(bias.dtype),)
        return (
            *settings.inputs.pull_back(xs, dx, settings.reduce_axis),
            *sparse_matmul.residual_gradient(settings, operands, dy),
            d_values,
            None,
            None,
            *d_bias,
            *([None] * len(settings.prepared)),
        )

    saved = functools.partial(sparse_matmul.saved, settings)
    return with_rules(primal, vmap_rule, backward, saved)


# --- public ---------------------------------------------------------------------------------------


def linear(
    x: jax.Array,
    w: LinearWeight,
    bias: jax.Array | None = None,
    implementation: str | None = None,
    out_dtype=None,
    reduce_axis: str | tuple[str, ...] | None = None,
    prologue: Prologue | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Computes `x @ kernel + bias + residual` for a packed kernel.

    With an 8-bit weight each row of x is quantised dynamically.

    Args:
      x: `[..., in]`, bfloat16, float16 or float32; leading axes are rows.
        With a `GLU` without up it is `[..., 2 * in]`.
      w: a `SlideWeight`, or another `LinearWeight` such as `slidejax.trainable.MasterWeight` and
        `slidejax.adapters.AdaptedWeight`.
      bias: floating `[out]`, added in float32.
      implementation: one of `slidejax.implementations()`. None takes the fastest by the measured
        table; `slidejax.explain` says which one and why.
      out_dtype: bfloat16, float16 or float32. None takes the dtype of x.
      reduce_axis: inside `shard_map`, the mesh axes over which K is split. x then has the columns
        of its shard, and no others.
      prologue: an `RMSNorm`, `LayerNorm`, `Activation` or `GLU` of slidejax to apply to x first.
      residual: bfloat16, float16 or float32 `[..., out]`, such as the stream of a transformer. It
        is added in float32 after the bias, and the sum is rounded once. Kernels add it themselves
        where they can. Elsewhere XLA adds it to float32 results, which moves more bytes for many
        rows than adding it to rounded results.

    Returns:
      `[..., out]`.

    Raises:
      ValueError: for shapes or dtypes that do not fit each other.
      TypeError: if `w` is no `LinearWeight`, `prologue` is none of these, or another argument is no
        array.
      NotImplementedError: if the implementation refuses, with the reason.

    >>> from slidejax import pack
    >>> w = pack(jnp.arange(1., 9.)[:, None], "6:8")
    >>> linear(jnp.ones((2, 8)), w, bias=jnp.ones(1))
    Array([[34.],
           [34.]], dtype=float32)
    >>> linear(jnp.ones((2, 8)), w, residual=jnp.array([[1.], [2.]]))
    Array([[34.],
           [35.]], dtype=float32)
    """
    if isinstance(w, WrappedWeight):
        check_held(w)
        inputs, xs = inputs_of(check_input(x), prologue)
        x = inputs.apply(xs)
        return w.linear(
            x,
            bias,
            implementation=implementation,
            out_dtype=out_dtype,
            reduce_axis=reduce_axis,
            residual=residual,
        )
    w = fixed(check_weight(w))
    x = check_input(x)
    expected = w.groups * w.pattern.group if w.is_k_shard else w.in_features
    if isinstance(prologue, Prologue) and prologue.halves:
        expected *= 2
    if x.shape[-1] != expected:
        what = (
            f"a shard of K with {w.groups} groups"
            if w.is_k_shard
            else f"a weight with in_features {w.in_features}"
        )
        raise ValueError(f"x must be [..., {expected}] for {what}, got shape {x.shape}")
    inputs, xs = inputs_of(x, prologue)
    check_halves("linear", inputs, reduce_axis)
    settings, bias = product_settings(
        w, bias, x.dtype if out_dtype is None else out_dtype, implementation, reduce_axis
    )
    settings = dataclasses.replace(settings, inputs=inputs)
    settings, residual = take_residual(settings, residual, x.shape[:-1], w.out_features)
    operands = sparse_matmul.align(xs, [], residual, w, bias, settings)
    values_at = len(operands) - len(settings.operands(w, bias))
    return with_automatic_axes(
        _op(settings), operands, lambda *specs: product_spec(specs[0], specs[values_at][0])
    )

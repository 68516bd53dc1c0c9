"""The product of lifted activations and a packed weight.

    y[m, o] = float32(sum over K' of lifted[m, k'] * W'[o, k']) * scale_x[m] * scale_w[o] + bias[o]
              + residual[m, o]

`W'` is the weight in lifted order, which is 2:4: window `w` of a group holds kept values `2w` and
`2w + 1`. int8 accumulates in int32, everything else in float32. The implementation "reference"
computes this formula in plain JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule

from slidejax.ops.choice import implementation_for, on_right_platform
from slidejax.ops.implementations.reference import expand_lifted, finish
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
from slidejax.ops.primitive import make_primitive, map_batched, with_rules
from slidejax.ops.problem import Problem
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
from slidejax.weights.layout import as_array, kept_values
from slidejax.weights.packed import SlideWeight, check_weight

__all__ = [
    "expand_lifted",
    "sparse_matmul",
    "sparse_matmul_p",
]


# --- primitive ------------------------------------------------------------------------------------


def _shapes(lifted, *operands, settings):
    w, _ = settings.weight(operands)
    dtype = settings.out_dtype
    if dtype is None:
        dtype = np.dtype(np.int32 if w.dtype == jnp.int8 else np.float32)
    return [((lifted.shape[0], w.out_features), dtype)]


def _lowering(lifted, scale_x, *operands, platform, settings):
    w, bias = settings.weight(operands)
    problem = Problem.of("sparse_matmul", lifted, w, settings, platform)
    runs = implementation_for(problem)
    residual = settings.residual(operands)
    return [
        runs.run_sparse_matmul(lifted, scale_x, w, bias, residual, settings.out_dtype, platform)
    ]


sparse_matmul_p = make_primitive("slidejax_sparse_matmul", _shapes, _lowering)


def bind(lifted, scale_x, residual, w: SlideWeight, bias, settings: LinearParams) -> jax.Array:
    """Binds the primitive; the leading axes of the lifted rows become one."""
    leading = lifted.shape[:-1]
    flat = [a.reshape(math.prod(leading), a.shape[-1]) for a in (lifted, scale_x, *given(residual))]
    operands = (*flat, *settings.operands(w, bias))
    (y,) = sparse_matmul_p.bind(*vary(varying_axes(*operands), *operands), settings=settings)
    return y.reshape(*leading, w.out_features)


# --- sharding -------------------------------------------------------------------------------------


def _partitioned(settings: LinearParams):
    def op(lifted, scale_x, *operands):
        return bind(
            lifted, scale_x, settings.residual(operands), *settings.weight(operands), settings
        )

    def rule(mesh, operands, results):
        rank = len(operands[0].shape)
        rows = row_factors(rank)
        return SdyShardingRule(
            (
                ArrayMapping(*rows, CompoundFactor("g", "l")),
                ArrayMapping(*rows, "one"),
                *weight_factors(settings, operands, rank),
            ),
            (ArrayMapping(*rows, "o"),),
            l=settings.pattern.windows * 4,
            reduction_factors=("g",),
        )

    def partition(mesh, operands, result):
        values = settings.weight(operands)[0].values
        partitions(product_key(settings, operands[0].shape, values.shape))
        cut = cut_of(
            "sparse_matmul",
            mesh,
            operands[0],
            values,
            result,
            settings.pattern,
            settings.in_features,
        )
        kept = forms_in("sparse_matmul", cut, settings, operands)

        def local(lifted, scale_x, *operands):
            residual, (w, bias) = settings.residual(operands), settings.weight(operands)
            w = with_forms(w, kept)
            if cut.k:
                return split_k(lifted, scale_x, residual, w, bias, settings, cut)
            here = dataclasses.replace(settings, prepared=tuple(w.prepared))
            return bind(lifted, scale_x, residual, w, bias, here)

        shardings = (
            cut.sharding("rows", "k"),
            cut.sharding("rows", None),
            *weight_shardings(cut, settings, operands, kept),
        )
        return mesh, local, cut.sharding("y_rows", "y_out"), shardings

    return partitioned(op, rule, partition)


def split_k(
    lifted, scale_x, residual, w: SlideWeight, bias, settings: LinearParams, cut: MeshPartition
) -> jax.Array:
    """One shard of a product whose K is split.

    Raw accumulators are summed over the axes of the cut that split K; scales follow, and bias and
    residual are added once. The scales of W, the bias and the residual are those of this shard of
    y, and its prepared forms can be cut with K.
    """
    scale_w = w.scale
    # The scales have the outputs of y, which may be a part of those of the values.
    (ones,) = vary(varying_axes(w.values), jnp.ones(w.values.shape[0], jnp.float32))
    w = w.replace(scale=ones, prepared=w.prepared, in_features=w.held_features)
    raw = settings.raw(w.in_features, tuple(w.prepared))
    acc = cut.sum_over_k(bind(lifted, scale_x, None, w, None, raw))
    # Rows are flattened here as on one device: XLA does not round to bfloat16 between two
    # operations that no reshape parts, and the bits would then depend on the cut.
    *leading, out = acc.shape
    acc, scale_x, *residuals = (
        a.reshape(math.prod(leading), a.shape[-1])
        for a in (acc, cut.scatter_rows(scale_x), *given(residual))
    )
    y = finish(acc, scale_x, scale_w, bias, settings.out_dtype, *residuals)
    return y.reshape(*leading, out)


# --- batching, derivative -------------------------------------------------------------------------


def values_gradient(d_kernel: jax.Array, w: SlideWeight) -> jax.Array:
    """The gradient of the kept values, from that of the whole kernel `[out, padded in]`."""
    groups = d_kernel.reshape(*w.values.shape[:-1], w.pattern.group)
    return kept_values(groups, w.zeros).astype(w.values.dtype)


@functools.cache
def _op(settings: LinearParams):
    partitioned = _partitioned(settings)

    def primal(lifted, scale_x, *operands):
        lifted = on_right_platform(lifted, "sparse_matmul", settings.implementation)
        if settings.reduce_axis:
            residual, (w, bias) = settings.residual(operands), settings.weight(operands)
            cut = MeshPartition(None, k=settings.reduce_axis)
            w = with_forms(w, forms_in("sparse_matmul", cut, settings, operands))
            return split_k(lifted, scale_x, residual, w, bias, settings, cut)
        return partitioned(lifted, scale_x, *operands)

    def vmap_rule(op, axis_size, in_batched, *operands):
        # lifted rows, their scales and the residual
        rows = range(2 + settings.has_residual)
        return map_batched(op, axis_size, in_batched, rows, operands)

    def backward(operands, dy):
        lifted, scale_x, *rest = operands
        w, bias = settings.weight(rest)
        kernel = expand_lifted(w).astype(jnp.float32)
        scaled = dy.astype(jnp.float32) * scale_x * numerics.of_rank(w.scale, dy.ndim)
        d_lifted = (
            (scaled @ kernel).astype(lifted.dtype)
            if jnp.issubdtype(lifted.dtype, jnp.floating)
            else None
        )
        d_scale_x = None
        d_values = None
        if not numerics.is_quantized(w.dtype):
            scaled_rows = dy.astype(jnp.float32) * scale_x
            d_lifted_kernel = outer(scaled_rows, lifted.astype(jnp.float32))
            d_values = _kept_lifted(d_lifted_kernel, w).astype(w.dtype)
        d_bias = () if bias is None else (sum_of_rows(dy.astype(jnp.float32)).astype(bias.dtype),)
        return (
            d_lifted,
            d_scale_x,
            *residual_gradient(settings, operands, dy),
            d_values,
            None,
            None,
            *d_bias,
            *([None] * len(settings.prepared)),
        )

    return with_rules(primal, vmap_rule, backward, functools.partial(saved, settings))


def outer(a: jax.Array, b: jax.Array, **kwargs) -> jax.Array:
    """`a^T @ b` of arrays with the same leading axes, which are rows: `[columns a, columns b]`."""
    rows = tuple(range(a.ndim - 1))
    return jax.lax.dot_general(a, b, ((rows, rows), ((), ())), **kwargs)


def sum_of_rows(a: jax.Array) -> jax.Array:
    """The sum over all axes but the last."""
    return a.sum(tuple(range(a.ndim - 1)))


def saved(settings: LinearParams, operands: tuple, results) -> tuple:
    """The operands that the derivative needs: all, but of the residual only its dtype."""
    if not settings.has_residual:
        return operands
    at = settings.residual_at(operands)
    return (*operands[:at], jnp.zeros(0, operands[at].dtype), *operands[at + 1 :])


def residual_gradient(settings: LinearParams, operands, dy: jax.Array) -> tuple[jax.Array, ...]:
    """The gradient of the residual as operands: none or one."""
    residual = settings.residual(operands)
    return () if residual is None else (dy.astype(residual.dtype),)


def _kept_lifted(lifted_kernel: jax.Array, w: SlideWeight) -> jax.Array:
    """The entries of `[out, K']` at the kept lanes, `[out, groups, kept]`.

    This is the transpose of `expand_lifted`.
    """

    def expanded(values):
        return expand_lifted(w.replace(values=values))

    like = vary(varying_axes(lifted_kernel), jnp.zeros(w.values.shape, jnp.float32))
    (values,) = jax.linear_transpose(expanded, *like)(lifted_kernel)
    return values


# --- public ---------------------------------------------------------------------------------------


def sparse_matmul(
    lifted: jax.Array,
    scale: jax.Array,
    w: SlideWeight,
    bias: jax.Array | None = None,
    out_dtype=None,
    implementation: str | None = None,
    reduce_axis: str | tuple[str, ...] | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Multiplies lifted activations with a packed weight.

    Args:
      lifted: `[..., K']` in the dtype of `w.values`, from `lift_quantize`.
      scale: float32 `[..., 1]`, the scale of each row.
      w: the packed weight.
      bias: `[out]`, added in float32.
      out_dtype: bfloat16, float16 or float32. None takes the dtype of 16- and 32-bit values, and
        bfloat16 for 8-bit ones.
      implementation: one of `slidejax.implementations()`. None takes the fastest.
      reduce_axis: inside `shard_map`, the mesh axes over which K is split.
      residual: bfloat16, float16 or float32 `[..., out]`, added in float32 after the bias, before
        the one rounding.

    Returns:
      `[..., out]`.

    Raises:
      ValueError: for shapes or dtypes that do not fit each other.
      TypeError: if `w` is no `SlideWeight`, or another argument is no array.
      NotImplementedError: if the implementation refuses, with the reason.

    >>> from slidejax import lift_quantize, pack
    >>> w = pack(jnp.ones((8, 2)), "6:8", dtype="int8")
    >>> sparse_matmul(*lift_quantize(jnp.ones((1, 8)), "6:8"), w, out_dtype="float32")
    Array([[6., 6.]], dtype=float32)
    """
    w = fixed(check_weight(w))
    lifted, scale = as_array(lifted, "lifted"), as_array(scale, "scale")
    columns = w.lifted_columns
    if lifted.ndim < 1 or lifted.shape[-1] != columns:
        raise ValueError(
            f"lifted must be [..., {columns}] for a weight with {w.in_features} inputs and pattern "
            f"{w.pattern}, "
            f"got shape {lifted.shape}"
        )
    if lifted.dtype != w.dtype:
        raise ValueError(
            f"lifted must have the dtype of the weight's values, {w.dtype.name}, got "
            f"{lifted.dtype.name}"
        )
    if scale.shape != (*lifted.shape[:-1], 1) or scale.dtype != jnp.float32:
        raise ValueError(
            f"scale must be float32 {(*lifted.shape[:-1], 1)}, got {scale.dtype} {scale.shape}"
        )
    if out_dtype is None:
        out_dtype = jnp.bfloat16 if numerics.is_quantized(w.dtype) else w.dtype
    settings, bias = product_settings(w, bias, out_dtype, implementation, reduce_axis)
    settings, residual = take_residual(settings, residual, lifted.shape[:-1], w.out_features)
    operands = align([lifted], [scale], residual, w, bias, settings)
    values_at = len(operands) - len(settings.operands(w, bias))
    return with_automatic_axes(
        _op(settings), operands, lambda *specs: product_spec(specs[0], specs[values_at][0])
    )


def align(
    lifted: list, scales: list, residual, w: SlideWeight, bias, settings: LinearParams
) -> list:
    """The operands of a product, made to vary over the same manual mesh axes.

    Each gradient then has its operand's type. Operands with a K axis vary over all axes. Scales,
    residual and bias vary over all but the axes that split K, since their gradients must not be
    summed over these.
    """
    before = [*lifted, *scales, *given(residual)]
    operands = [*before, *settings.operands(w, bias)]
    axes = varying_axes(*operands)
    whole = axes - set(settings.reduce_axis)
    lifted_end, values_at = len(lifted), len(before)
    return [
        vary(axes if i < lifted_end or values_at <= i < values_at + 2 else whole, operand)[0]
        for i, operand in enumerate(operands)
    ]

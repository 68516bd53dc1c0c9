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
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)

from slidejax.ops import registry
from slidejax.ops.choice import implementation_for
from slidejax.ops.implementations.reference import expand_lifted, finish
from slidejax.ops.primitive import as_array, make_primitive, map_batched, with_rules
from slidejax.ops.problem import Problem
from slidejax.ops.prologue import PLAIN, InputLayout
from slidejax.ops.sharding import (
    MeshPartition,
    axis_names,
    first_axes,
    spec_of,
    vary,
    varying_axes,
    without,
)
from slidejax.weights import numerics
from slidejax.weights.layout import kept_values
from slidejax.weights.packed import SlideWeight, check_weight
from slidejax.weights.pattern import Pattern

__all__ = [
    "expand_lifted",
    "sparse_matmul",
    "sparse_matmul_p",
]


@dataclasses.dataclass(frozen=True)
class LinearParams:
    """The static part of one product, a parameter of the primitives.

    Attributes:
      pattern: the weight's `Pattern`.
      in_features: inputs of the kernel, or of the shard of K, without padding.
      out_dtype: of the result. None gives the raw accumulators, int32 or float32, without scales
        and bias.
      implementation: the name that the caller asked for, or None.
      has_bias: whether a bias follows the weight's leaves among the operands.
      prepared: names of the prepared forms, which follow the bias.
      reduce_axis: inside `shard_map`, the mesh axes over which K is split.
      inputs: the layout of x and its prologue, the first operands of `linear`.
      has_residual: whether a residual precedes the weight's leaves among the operands.
    """

    pattern: Pattern
    in_features: int
    out_dtype: np.dtype | None
    implementation: str | None = None
    has_bias: bool = False
    prepared: tuple[str, ...] = ()
    reduce_axis: tuple[str, ...] = ()
    inputs: InputLayout = PLAIN
    has_residual: bool = False

    def operands(self, w: SlideWeight, bias: jax.Array | None) -> tuple:
        """The weight's operands, an op's last ones, in the order that `weight` reads them."""
        rest = () if bias is None else (bias,)
        return (w.values, w.zeros, w.scale, *rest, *(w.prepared[name] for name in self.prepared))

    def weight(self, operands) -> tuple[SlideWeight, jax.Array | None]:
        """The weight and the bias, from all operands of an op or from the last of them."""
        values, zeros, scale, *rest = operands[-self._weight_operands :]
        bias = rest.pop(0) if self.has_bias else None
        prepared = dict(zip(self.prepared, rest, strict=True))
        return SlideWeight(values, zeros, scale, self.pattern, self.in_features, prepared), bias

    @property
    def _weight_operands(self) -> int:
        return 3 + self.has_bias + len(self.prepared)

    def residual(self, operands) -> jax.Array | None:
        """The residual, from all operands of an op; None if there is none."""
        return operands[self.residual_at(operands)] if self.has_residual else None

    def residual_at(self, operands) -> int:
        """Where the residual is among all operands of an op that has one."""
        return len(operands) - self._weight_operands - 1

    def prepared_of(self, operands) -> tuple:
        """The prepared forms, the last of an op's operands."""
        return tuple(operands[len(operands) - len(self.prepared) :])

    def raw(self, in_features: int) -> LinearParams:
        """The raw accumulators of a shard of K with `in_features` inputs."""
        return dataclasses.replace(
            self,
            in_features=in_features,
            out_dtype=None,
            has_bias=False,
            prepared=(),
            reduce_axis=(),
            inputs=PLAIN,
            has_residual=False,
        )


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
    operands = (lifted, scale_x, *given(residual), *settings.operands(w, bias))
    (y,) = sparse_matmul_p.bind(*vary(varying_axes(*operands), *operands), settings=settings)
    return y


def given(residual: jax.Array | None) -> tuple[jax.Array, ...]:
    """The residual as operands: none or one."""
    return () if residual is None else (residual,)


# --- sharding -------------------------------------------------------------------------------------


def weight_factors(settings: LinearParams, operands) -> tuple:
    """The Shardy factors of the residual and of the weight's operands, which are an op's last ones.

    Outputs "o" and groups "g" can be cut. The zeros of the pattern "dense", which has none, are cut
    with the outputs.
    """
    prepared = (
        ArrayMapping(*(f"p{i}_{axis}" for axis in range(len(form.shape))))
        for i, form in enumerate(settings.prepared_of(operands))
    )
    bias = (ArrayMapping("o"),) if settings.has_bias else ()
    residual = (ArrayMapping("m", "o"),) if settings.has_residual else ()
    zeros = ArrayMapping("o", "g" if settings.pattern.prunes else "none")
    return (*residual, ArrayMapping("o", "g", "v"), zeros, ArrayMapping("o"), *bias, *prepared)


def weight_shardings(cut: MeshPartition, settings: LinearParams, operands) -> tuple:
    """The shardings of the residual and of the weight's operands in a cut.

    The residual is cut as y is. Prepared forms are whole on each device.
    """
    prepared = (cut.sharding(*([None] * len(f.shape))) for f in settings.prepared_of(operands))
    bias = (cut.sharding("out"),) if settings.has_bias else ()
    residual = (cut.sharding("rows", "out"),) if settings.has_residual else ()
    zeros = cut.sharding("out", "k" if settings.pattern.prunes else None)
    return (*residual, cut.sharding("out", "k", None), zeros, cut.sharding("out"), *bias, *prepared)


def partition_of(op: str, mesh, operands, result, settings: LinearParams) -> MeshPartition:
    """How the partitioner wants to cut a product, from the shardings of x, values and y.

    x is the first operand. Operands may want one mesh axis for two things, such as x for its rows
    and the residual for the outputs. It then goes to the result's axis, else to rows, outputs and K
    in this order, and the partitioner moves the other operand.
    """
    w, _ = settings.weight(operands)
    (x_rows, x_k), (w_out, w_k, _), (y_rows, y_out) = (
        spec_of(operands[0]),
        spec_of(w.values),
        spec_of(result),
    )
    rows = first_axes(y_rows, without(x_rows, y_out))
    out = first_axes(y_out, without(w_out, rows))
    k = first_axes(without(x_k, (*rows, *out)), without(w_k, (*rows, *out)))
    cut = MeshPartition(mesh, rows=rows, out=out, k=k)
    return cut.check_k(op, settings.pattern, settings.in_features) if cut.k else cut


def _partitioned(settings: LinearParams):
    @custom_partitioning
    def op(lifted, scale_x, *operands):
        return bind(
            lifted, scale_x, settings.residual(operands), *settings.weight(operands), settings
        )

    def rule(mesh, operands, results):
        lifted = ArrayMapping("m", CompoundFactor("g", "l"))
        return SdyShardingRule(
            (lifted, ArrayMapping("m", "one"), *weight_factors(settings, operands)),
            (ArrayMapping("m", "o"),),
            l=settings.pattern.windows * 4,
            reduction_factors=("g",),
        )

    def partition(mesh, operands, result):
        cut = partition_of("sparse_matmul", mesh, operands, result, settings)

        def local(lifted, scale_x, *operands):
            residual, (w, bias) = settings.residual(operands), settings.weight(operands)
            if cut.k or cut.out:
                w = w.replace(prepared={})
            if cut.k:
                return split_k(lifted, scale_x, residual, w, bias, settings, cut.k)
            here = dataclasses.replace(settings, prepared=tuple(w.prepared))
            return bind(lifted, scale_x, residual, w, bias, here)

        shardings = (
            cut.sharding("rows", "k"),
            cut.sharding("rows", None),
            *weight_shardings(cut, settings, operands),
        )
        return mesh, local, cut.sharding("rows", "out"), shardings

    op.def_partition(partition, sharding_rule=rule)
    return op


def split_k(
    lifted, scale_x, residual, w: SlideWeight, bias, settings: LinearParams, axes: tuple[str, ...]
) -> jax.Array:
    """One shard of a product whose K is split.

    Raw accumulators are summed over `axes`; scales follow, and bias and residual are added once.
    """
    w = w.replace(prepared={}, in_features=w.groups * w.pattern.group)
    acc = jax.lax.psum(bind(lifted, scale_x, None, w, None, settings.raw(w.in_features)), axes)
    return finish(acc, scale_x, w.scale, bias, settings.out_dtype, residual)


# --- batching, derivative -------------------------------------------------------------------------


def values_gradient(d_kernel: jax.Array, w: SlideWeight) -> jax.Array:
    """The gradient of the kept values, from that of the whole kernel `[out, padded in]`."""
    groups = d_kernel.reshape(*w.values.shape[:-1], w.pattern.group)
    return kept_values(groups, w.zeros).astype(w.values.dtype)


@functools.cache
def _op(settings: LinearParams):
    partitioned = _partitioned(settings)

    def primal(lifted, scale_x, *operands):
        if settings.reduce_axis:
            residual, (w, bias) = settings.residual(operands), settings.weight(operands)
            return split_k(lifted, scale_x, residual, w, bias, settings, settings.reduce_axis)
        return partitioned(lifted, scale_x, *operands)

    def vmap_rule(op, axis_size, in_batched, *operands):
        # lifted rows, their scales and the residual
        rows = range(2 + settings.has_residual)
        return map_batched(op, axis_size, in_batched, rows, operands)

    def backward(operands, dy):
        lifted, scale_x, *rest = operands
        w, bias = settings.weight(rest)
        kernel = expand_lifted(w).astype(jnp.float32)
        scaled = dy.astype(jnp.float32) * scale_x * w.scale
        d_lifted = (
            (scaled @ kernel).astype(lifted.dtype)
            if jnp.issubdtype(lifted.dtype, jnp.floating)
            else None
        )
        d_scale_x = None
        d_values = None
        if not numerics.is_quantized(w.dtype):
            d_lifted_kernel = (dy.astype(jnp.float32) * scale_x).T @ lifted.astype(jnp.float32)
            d_values = _kept_lifted(d_lifted_kernel, w).astype(w.dtype)
        d_bias = (dy.astype(jnp.float32).sum(0).astype(bias.dtype),) if bias is not None else ()
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


def saved(settings: LinearParams, operands: tuple, results) -> tuple:
    """What the derivative needs of the operands: all, but of the residual only its dtype."""
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
    check_weight(w)
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
    rows = math.prod(lifted.shape[:-1])
    settings, residual = take_residual(settings, residual, lifted.shape[:-1], w.out_features)
    operands = align(
        [lifted.reshape(rows, columns)], [scale.reshape(rows, 1)], residual, w, bias, settings
    )
    y = _op(settings)(*operands)
    return y.reshape(*lifted.shape[:-1], w.out_features)


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


def check_result(out_features: int, bias, out_dtype) -> tuple[jax.Array | None, np.dtype]:
    """Returns the bias as an array, and the dtype of a product's result.

    Raises:
      ValueError: if one of them is not possible.
    """
    try:
        resolved = np.dtype(jnp.dtype(out_dtype))
    except TypeError:
        resolved = None
    if resolved not in (jnp.bfloat16, jnp.float16, jnp.float32):
        got = repr(out_dtype) if resolved is None else resolved.name
        raise ValueError(f"out_dtype must be bfloat16, float16 or float32, got {got}")
    if bias is None:
        return None, resolved
    bias = as_array(bias, "bias")
    if bias.shape != (out_features,):
        raise ValueError(f"bias must have shape ({out_features},), got {bias.shape}")
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"bias must be floating, got {bias.dtype}")
    return bias, resolved


def check_residual(residual, shape: tuple[int, ...]) -> jax.Array | None:
    """Returns the residual of a result of this shape as an array `[rows, out]`, or None.

    Raises:
      ValueError: if it has another shape, or is not bfloat16, float16 or float32.
    """
    if residual is None:
        return None
    residual = as_array(residual, "residual")
    if residual.shape != shape:
        raise ValueError(
            f"residual must have the shape of the result, {shape}, got {residual.shape}"
        )
    if residual.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"residual must be bfloat16, float16 or float32, got {residual.dtype}")
    return residual.reshape(math.prod(shape[:-1]), shape[-1])


def take_residual(
    settings: LinearParams, residual, leading: tuple[int, ...], out_features: int
) -> tuple[LinearParams, jax.Array | None]:
    """Checks the residual of a product of x with these leading axes; returns settings with it."""
    residual = check_residual(residual, (*leading, out_features))
    return dataclasses.replace(settings, has_residual=residual is not None), residual


def product_settings(
    w: SlideWeight, bias, out_dtype, implementation, reduce_axis
) -> tuple[LinearParams, jax.Array | None]:
    """Checks the arguments that `sparse_matmul` and `linear` share; returns settings and bias."""
    if w.values.ndim != 3:
        raise ValueError(
            f"w must be one weight [out, groups, kept], got values of shape {w.values.shape}: vmap "
            "over the batch"
        )
    bias, out_dtype = check_result(w.out_features, bias, out_dtype)
    registry.check_name(implementation)
    reduce_axes = axis_names(reduce_axis)
    if w.is_k_shard and not reduce_axes:
        raise ValueError(
            f"w holds {w.groups} of {w.pattern.groups(w.in_features)} groups, a shard of K: name "
            "the mesh axis over which K "
            f"is split with reduce_axis="
        )
    prepared = tuple(sorted(w.prepared))
    settings = LinearParams(
        w.pattern, w.in_features, out_dtype, implementation, bias is not None, prepared, reduce_axes
    )
    return settings, bias

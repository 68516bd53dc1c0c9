"""The static part of a product, its operands in their order, and the checks of its arguments.

`slidejax.ops.linear` and `slidejax.ops.sparse_matmul` share them.
"""

from __future__ import annotations

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping

from slidejax.ops import registry
from slidejax.ops.prologue import PLAIN, InputLayout
from slidejax.ops.sharding import MeshPartition, axis_names, row_factors
from slidejax.weights.layout import as_array
from slidejax.weights.numerics import dtype_of, is_quantized
from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import BLOCK_GROUPS, Pattern

__all__ = [
    "LinearParams",
    "check_residual",
    "check_result",
    "fixed",
    "forms_in",
    "given",
    "product_settings",
    "take_residual",
    "weight_factors",
    "weight_shardings",
    "with_forms",
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

    def raw(self, in_features: int, prepared: tuple[str, ...]) -> LinearParams:
        """The raw accumulators of a shard of K with `in_features` inputs and these forms."""
        return dataclasses.replace(
            self,
            in_features=in_features,
            out_dtype=None,
            has_bias=False,
            prepared=prepared,
            reduce_axis=(),
            inputs=PLAIN,
            has_residual=False,
        )


def given(residual: jax.Array | None) -> tuple[jax.Array, ...]:
    """The residual as operands: none or one."""
    return () if residual is None else (residual,)


# --- values beside their forms --------------------------------------------------------------------


@jax.custom_jvp
def _fixed(values: jax.Array) -> jax.Array:
    return values


@_fixed.defjvp
def _refuse(primals, tangents):
    raise ValueError(
        "the values of a weight with prepared forms have no gradient: a step would change the values "
        "and leave the forms, which products read. Drop the forms before training: "
        "slidejax.drop_prepared(params), for NNX slidejax.nnx.map_weights(model, "
        "slidejax.drop_prepared)"
    )


def fixed(w: SlideWeight) -> SlideWeight:
    """The weight, whose values refuse to be differentiated if it has prepared forms."""
    if not w.prepared or is_quantized(w.dtype):
        return w
    return w.replace(values=_fixed(w.values), prepared=w.prepared)


# --- sharding -------------------------------------------------------------------------------------


def weight_factors(settings: LinearParams, operands, rank: int) -> tuple:
    """The Shardy factors of the residual and of the weight's operands, which are an op's last ones.

    Outputs "o" and groups "g" can be cut. The zeros of the pattern "dense", which has none, are cut
    with the outputs. `rank` is that of x.
    """
    prepared = (
        ArrayMapping(*(f"p{i}_{axis}" for axis in range(len(form.shape))))
        for i, form in enumerate(settings.prepared_of(operands))
    )
    bias = (ArrayMapping("o"),) if settings.has_bias else ()
    residual = (ArrayMapping(*row_factors(rank), "o"),) if settings.has_residual else ()
    zeros = ArrayMapping("o", "g" if settings.pattern.prunes else "none")
    return (*residual, ArrayMapping("o", "g", "v"), zeros, ArrayMapping("o"), *bias, *prepared)


def weight_shardings(
    cut: MeshPartition, settings: LinearParams, operands, forms: tuple[str, ...]
) -> tuple:
    """The shardings of the residual and of the weight's operands in a cut.

    The residual is cut as y is, and scale and bias as its outputs are. The prepared
    `forms` that the shards have are cut, too; others are whole, and nothing reads them.
    """
    prepared = (
        cut.sharding(*_form_axes(name, len(form.shape), name in forms))
        for name, form in zip(settings.prepared, settings.prepared_of(operands), strict=True)
    )
    outputs = cut.sharding("y_out")
    bias = (outputs,) if settings.has_bias else ()
    residual = (cut.sharding("y_rows", "y_out"),) if settings.has_residual else ()
    zeros = cut.sharding("out", "k" if settings.pattern.prunes else None)
    return (*residual, cut.sharding("out", "k", None), zeros, outputs, *bias, *prepared)


def forms_in(op: str, cut: MeshPartition, settings: LinearParams, operands) -> tuple[str, ...]:
    """The prepared forms that the shards of a cut have. A warning names the others.

    Inside `shard_map`, where a cut has no mesh, the arrays are those of the shards already.
    """
    if not (cut.k or cut.out):
        return settings.prepared
    size = jax.lax.axis_size if cut.mesh is None else cut.mesh.shape.__getitem__
    parts = [math.prod(map(size, axes)) for axes in (cut.out, cut.k)]
    out_features = settings.weight(operands)[0].out_features
    kept: list[str] = []
    lost: list[str] = []
    for name in settings.prepared:
        form = registry.form_of(name)
        bears = form is not None and form.bears(out_features, *parts)
        (kept if bears else lost).append(name)
    if lost:
        warnings.warn(
            f"{op}: the weight is split over mesh axes {(*cut.out, *cut.k)}, and its prepared "
            f"forms {lost} cannot be: each device reads the packed form instead. "
            "slidejax.drop_prepared saves their memory",
            stacklevel=2,
        )
    return tuple(kept)


def with_forms(w: SlideWeight, names: tuple[str, ...]) -> SlideWeight:
    """The weight with these of its prepared forms."""
    return w.replace(prepared={name: w.prepared[name] for name in names})


def _form_axes(name: str, rank: int, kept: bool) -> list[str | None]:
    """The axes of the weight with which those of a prepared form are cut."""
    form = registry.form_of(name)
    axes: list[str | None] = [None] * rank
    if kept and form is not None:
        if form.outputs is not None:
            axes[0] = "out"
        if form.inputs:
            axes[1] = "k"
    return axes


# --- checks ---------------------------------------------------------------------------------------


def check_result(out_features: int, bias, out_dtype) -> tuple[jax.Array | None, np.dtype]:
    """Returns the bias as an array, and the dtype of a product's result.

    Raises:
      ValueError: if one of them is not possible.
    """
    resolved = dtype_of(out_dtype)
    if resolved is None or resolved not in (jnp.bfloat16, jnp.float16, jnp.float32):
        got = f"{out_dtype!r:.60}" if resolved is None else resolved.name
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
    """Returns the residual of a result of this shape as an array, or None.

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
    return residual


def take_residual(
    settings: LinearParams, residual, leading: tuple[int, ...], out_features: int
) -> tuple[LinearParams, jax.Array | None]:
    """Checks the residual of a product of x with these leading axes; returns settings with it."""
    residual = check_residual(residual, (*leading, out_features))
    return dataclasses.replace(settings, has_residual=residual is not None), residual


def _check_forms(w: SlideWeight) -> None:
    """Raises ValueError if a prepared form is not that of the weight."""
    for name, array in w.prepared.items():
        form = registry.form_of(name)
        if form is not None and form.shape is not None and array.shape != form.shape(w):
            raise ValueError(
                f"w.prepared[{name!r}] must have shape {form.shape(w)} for values of shape "
                f"{w.values.shape}, got {array.shape}: it is the form of another weight, or of the "
                "whole of one of which w is a shard. slidejax.drop_prepared drops it"
            )


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
    if w.is_k_shard and w.groups % BLOCK_GROUPS:
        raise ValueError(
            f"w is a shard of K with {w.groups} groups, which are no whole blocks of "
            f"{BLOCK_GROUPS}: split K over fewer devices (jax.jit gathers what does not divide)"
        )
    _check_forms(w)
    prepared = tuple(sorted(w.prepared))
    settings = LinearParams(
        w.pattern, w.in_features, out_dtype, implementation, bias is not None, prepared, reduce_axes
    )
    return settings, bias

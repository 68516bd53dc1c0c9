"""How a layer contracts its input with its kernel: kernels of any shape are packed and run.

Dense, DenseGeneral (LinearGeneral in NNX), Einsum and GPT-2's Conv1D all compute one
`lax.dot_general`. They differ in the axes of the kernel that are batch, input and output axes, and
in the order of the result's axes. A kernel is packed as `[..., in, out]`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.ops.linear import linear
from slidejax.rules import Skipped
from slidejax.weights.numerics import dtype_of, is_quantized
from slidejax.weights.packed import LinearWeight, SlideWeight

__all__ = [
    "Axes",
    "Contraction",
    "axis_names",
    "check_product",
    "contract",
    "from_matrix",
    "promote_packed",
    "stacked_axes",
    "to_matrix",
]

# The batch, input and output axes of a kernel inside its layer.
Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A product of an input and a kernel, axis by axis. All axes are counted from the front.

    Attributes:
      kernel_batch, kernel_in, kernel_out: the axes of the kernel.
      x_batch, x_in: the axes of x that go with `kernel_batch` and `kernel_in`, in the same order.
      result: for each axis of the result, its place in (batch, other axes of x, outputs). None: the
        result has that order.
    """

    kernel_batch: tuple[int, ...]
    kernel_in: tuple[int, ...]
    kernel_out: tuple[int, ...]
    x_batch: tuple[int, ...]
    x_in: tuple[int, ...]
    result: tuple[int, ...] | None = None

    @classmethod
    def dense(cls, x_ndim: int) -> Contraction:
        """Contracts the last axis of x with the first axis of a kernel `[in, out]`."""
        return cls((), (0,), (1,), (), (x_ndim - 1,))

    @classmethod
    def general(
        cls, x_ndim: int, axis: tuple[int, ...], batch: tuple[int, ...], features: int
    ) -> Contraction:
        """The contraction of Flax's DenseGeneral and LinearGeneral.

        Their kernels are `[*batch, *inputs, *features]`.

        Args:
          x_ndim: the rank of x.
          axis: the input axes of x, which may be negative.
          batch: the batch axes of x, which may be negative.
          features: the number of output axes.
        """

        def normalized(axes):  # sorted, as Flax sorts them
            return tuple(sorted(a % x_ndim for a in axes))

        n_batch, n_in = len(batch), len(axis)
        last = n_batch + n_in
        kernel = (
            tuple(range(n_batch)),
            tuple(range(n_batch, last)),
            tuple(range(last, last + features)),
        )
        return cls(*kernel, normalized(batch), normalized(axis))

    @classmethod
    def einsum(cls, equation: str, x_ndim: int) -> Contraction:
        """The contraction of an einsum of x and the kernel, such as `"btnh,nhd->btd"`.

        x may have an ellipsis.

        Raises:
          Skipped: if the einsum is more than a product of matrices (a sum over an axis of one
            operand, a diagonal).
        """
        x, kernel, result = _parse_einsum(equation, x_ndim)
        batch = [c for c in kernel if c in x and c in result]
        inputs = [c for c in kernel if c in x and c not in result]
        outputs = [c for c in kernel if c not in x and c in result]
        if (
            not inputs
            or not outputs
            or len(batch) + len(inputs) + len(outputs) != len(kernel)
            or not set(x) - set(inputs) <= set(result)
        ):
            raise Skipped(f"its einsum {equation!r} is not a product of matrices")
        order = batch + [c for c in x if c not in batch and c not in inputs] + outputs

        def places(names, operand) -> tuple[int, ...]:
            return tuple(operand.index(c) for c in names)

        kernel_axes = places(batch, kernel), places(inputs, kernel), places(outputs, kernel)
        return cls(*kernel_axes, places(batch, x), places(inputs, x), places(result, order))

    @property
    def kernel(self) -> Axes:
        """The kernel's batch, input and output axes."""
        return self.kernel_batch, self.kernel_in, self.kernel_out

    def bias_order(self) -> tuple[int, ...]:
        """The axes of a bias in the order (batch, outputs).

        The bias of an Einsum has the order of the result: this gives the place of each axis in it.
        """
        n_batch, n_out = len(self.kernel_batch), len(self.kernel_out)
        if self.result is None:
            return tuple(range(n_batch + n_out))
        ndim = len(self.result)
        ours = [axis for axis in self.result if axis < n_batch or axis >= ndim - n_out]
        return tuple(ours.index(axis) for axis in (*range(n_batch), *range(ndim - n_out, ndim)))


def _parse_einsum(equation: str, x_ndim: int) -> tuple[list[str], list[str], list[str]]:
    """The axis names of x, the kernel and the result."""
    equation = equation.replace(" ", "")
    operands, _, result = equation.partition("->")
    if "->" not in equation or operands.count(",") != 1:
        raise Skipped(f"its einsum {equation!r} is not of the form 'x,kernel->y'")
    x, kernel = operands.split(",")
    if "..." in kernel:
        raise Skipped(f"its einsum {equation!r} has an ellipsis in the kernel")
    ellipsis = [f".{i}" for i in range(x_ndim - len(x.replace("...", "")))] if "..." in x else []

    def names(term):
        before, dots, after = term.partition("...")
        return [*before, *(ellipsis if dots else []), *after]

    parsed = names(x), names(kernel), names(result)
    if any(len(set(term)) != len(term) for term in parsed):
        raise Skipped(f"its einsum {equation!r} takes a diagonal")
    return parsed


def to_matrix(kernel: jax.Array, axes: Axes) -> jax.Array:
    """A kernel as `[..., in, out]`.

    Leading axes (of scan and vmap) come first, then the batch axes.

    Args:
      kernel: a kernel with any number of leading axes before the layer's own.
      axes: the layer's `Contraction.kernel`.
    """
    lead = kernel.ndim - sum(map(len, axes))
    batch, inputs, outputs = (tuple(lead + a for a in group) for group in axes)
    kernel = jnp.transpose(kernel, (*range(lead), *batch, *inputs, *outputs))
    front = kernel.shape[: lead + len(batch)]
    split = len(front) + len(inputs)
    return kernel.reshape(
        *front, math.prod(kernel.shape[len(front) : split]), math.prod(kernel.shape[split:])
    )


def from_matrix(matrix: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """The inverse of `to_matrix` for a kernel without leading and batch axes.

    Args:
      matrix: `[in, out]`.
      shape: the kernel's own shape.
      axes: the layer's `Contraction.kernel`.
    """
    order = axes[1] + axes[2]
    return jnp.transpose(
        matrix.reshape([shape[a] for a in order]), sorted(range(len(order)), key=order.__getitem__)
    )


def stacked_axes(shape: tuple[int, ...], layer_shape: tuple[int, ...], path: str) -> int:
    """The number of axes that scan and vmap put before those of the layer.

    Args:
      shape: the kernel's shape in the model.
      layer_shape: the kernel's shape inside its layer.
      path: the kernel's path, for errors.

    Raises:
      Skipped: if the layers are not stacked along the first axis, or if the shapes do not tell the
        axis.
      ValueError: if the shapes do not belong together.
    """
    hidden = len(shape) - len(layer_shape)
    ways = [
        removed
        for removed in itertools.combinations(range(len(shape)), max(hidden, 0))
        if tuple(size for axis, size in enumerate(shape) if axis not in removed) == layer_shape
    ]
    if hidden < 0 or not ways:
        raise ValueError(
            f"{path} has shape {shape}, but in its layer the model makes it {layer_shape}"
        )
    if ways[0] != tuple(range(hidden)):
        raise Skipped(
            f"its layers are stacked along axis {ways[0][0]} of the kernel, not along the first"
        )
    if len(ways) > 1:
        raise Skipped(
            "the axis along which its layers are stacked cannot be told from the others: "
            f"shape {shape}"
        )
    return hidden


def axis_names(w: SlideWeight, names: tuple, ndim: int, axes: Axes) -> SlideWeight:
    """The PartitionSpecs of a packed weight, from the names of its kernel's axes.

    Axes that are flattened together take the name of the first of them. Inputs keep their name only
    if they are whole blocks, because K cannot be cut elsewhere.

    Args:
      w: the packed weight.
      names: the names of the kernel's axes. Names that are missing at the end are None.
      ndim: the rank of the kernel.
      axes: the kernel's axes inside its layer.
    """
    names = (*names, *(None,) * (ndim - len(names)))
    lead = ndim - sum(map(len, axes))
    batch, (k, *_), (out, *_) = ([names[lead + a] for a in group] for group in axes)
    k = None if w.in_features % w.pattern.block else k
    return w.replace(prepared={}).partition_spec(out=out, k=k, batch=(*names[:lead], *batch))


def promote_packed(promote: Callable[..., Any], x, w: LinearWeight, bias) -> tuple:
    """The operands of a layer after its promotion of dtypes.

    8-bit values and master values take no part.

    Args:
      promote: `(x, values, bias) -> (x, values, bias)`, where values may be None.
      x, w, bias: the operands.

    Returns:
      `(x, w, bias)`.

    Raises:
      ValueError: if the layer computes in a dtype that a packed kernel cannot multiply.
    """
    values = w.promoted
    before, given = None if values is None else values.dtype, jnp.result_type(x)
    x, values, bias = promote(x, values, bias)
    if x.dtype not in _COMPUTED:
        raise ValueError(
            f"a layer with a packed kernel computes in bfloat16, float16 or float32; its input "
            f"{given} makes it compute in {x.dtype}: cast the input, or give the layer a dtype"
        )
    if values is not None and values.dtype != before:
        w = w.with_promoted(values)
    return x, w, bias


# The dtypes in which layers with packed kernels compute, and of their results.
_COMPUTED = (jnp.bfloat16, jnp.float16, jnp.float32)


def check_product(
    layer: str, dot_general: Any = None, dot_general_cls: Any = None, preferred: Any = None
) -> Any:
    """The dtype that a layer's arguments ask of its result; None for that of its input.

    `precision` needs no check: products of packed weights accumulate in int32 or float32, and are
    at least as exact as `jax.lax.Precision.HIGHEST` asks.

    Args:
      layer: the name of the layer, for errors.
      dot_general: None, `jax.lax.dot_general`, or a `functools.partial` of it with
        `preferred_element_type` or `precision`.
      dot_general_cls: None.
      preferred: the layer's own `preferred_element_type`.

    Raises:
      ValueError: for an argument that a packed weight cannot honour.
    """
    standard = dot_general
    if isinstance(dot_general, functools.partial) and not dot_general.args:
        asked = dot_general.keywords
        if asked.keys() <= {"preferred_element_type", "precision"}:
            standard = dot_general.func
            preferred = asked.get("preferred_element_type") if preferred is None else preferred
    if dot_general_cls is not None or standard not in (None, jax.lax.dot_general):
        raise ValueError(
            f"{layer}: a packed kernel has a product of its own, so dot_general must be None or "
            "jax.lax.dot_general (with a preferred_element_type), and dot_general_cls must be "
            f"None. Got dot_general={dot_general!r}, dot_general_cls={dot_general_cls!r}"
        )
    if preferred is None:
        return None
    dtype = dtype_of(preferred)
    if dtype is None or dtype not in _COMPUTED:
        raise ValueError(
            f"{layer}: preferred_element_type must be bfloat16, float16, float32 or None, got "
            f"{preferred!r}"
        )
    return dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _warn_if_trained(dtype: str, bias: jax.Array) -> jax.Array:
    """The bias. If it has a gradient, a training goes on in which the values have none."""
    return bias


def _backward_of_bias(dtype: str, residuals: None, cotangent: jax.Array) -> tuple[jax.Array]:
    warnings.warn(
        f"a layer's bias is trained, and its {dtype} values have no gradient: "
        "slidejax.trainable.masters trains them, too",
        stacklevel=2,
    )
    return (cotangent,)


_warn_if_trained.defvjp(lambda dtype, bias: (bias, None), _backward_of_bias)


def contract(
    x: jax.Array,
    w: LinearWeight,
    axes: Contraction,
    features: tuple[int, ...],
    bias: jax.Array | None = None,
    implementation: str | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """The layer's result.

    Args:
      x: the layer's input.
      w: the weight: the layer's kernel after `to_matrix` and `pack`.
      axes: the layer's contraction.
      features: sizes of the kernel's output axes.
      bias: a bias in the layer's own shape, or None.
      implementation: as in `slidejax.linear`.
      residual: an array in the shape of the layer's result, added as `slidejax.linear` does; or
        None.
      out_dtype: bfloat16, float16 or float32; None takes x's. A bias of a wider dtype makes the
        result wider, as it does in Flax.

    Raises:
      ValueError: if the shapes do not fit each other.
    """
    if len(w.shape) - 2 != len(axes.kernel_batch) or w.out_features != math.prod(features):
        raise ValueError(
            f"a packed kernel of shape {w.shape} does not fit a layer with output axes {features}"
        )
    batch = tuple(x.shape[a] for a in axes.x_batch)
    free = tuple(a for a in range(x.ndim) if a not in axes.x_batch + axes.x_in)
    free_shape = tuple(x.shape[a] for a in free)
    inputs = math.prod(x.shape[a] for a in axes.x_in)
    x = jnp.transpose(x, (*axes.x_batch, *free, *axes.x_in)).reshape(*batch, *free_shape, inputs)
    if bias is not None:
        out_dtype = None if out_dtype is None else jnp.promote_types(out_dtype, bias.dtype)
        if isinstance(w, SlideWeight) and is_quantized(w.dtype):
            bias = _warn_if_trained(w.dtype.name, bias)
        bias = jnp.transpose(bias, axes.bias_order()).reshape(*batch, math.prod(features))

    shape = (*batch, *free_shape, *features)
    if residual is not None:
        residual = _as_computed(residual, shape, axes.result)
        residual = residual.reshape(*batch, *free_shape, w.out_features)

    def product(x, w, bias, residual):
        return linear(
            x, w, bias, implementation=implementation, residual=residual, out_dtype=out_dtype
        )

    for _ in batch:
        product = jax.vmap(product)
    y = product(x, w, bias, residual).reshape(shape)
    return y if axes.result is None else jnp.transpose(y, axes.result)


def _as_computed(residual, shape: tuple[int, ...], order: tuple[int, ...] | None) -> jax.Array:
    """A residual of a layer's result, with its axes as they are before the result is transposed.

    Args:
      residual: an array in the shape of the layer's result.
      shape: of the result before it is transposed.
      order: the transposition, or None.
    """
    result = shape if order is None else tuple(shape[a] for a in order)
    if jnp.shape(residual) != result:
        raise ValueError(
            f"residual must have the shape of the layer's result, {result}, got "
            f"{jnp.shape(residual)}"
        )
    residual = jnp.asarray(residual)
    if order is None:
        return residual
    return jnp.transpose(residual, sorted(range(len(order)), key=order.__getitem__))

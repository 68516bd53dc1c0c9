"""Prologues: norms, activations and gated activations, fused into the lift of a linear layer.

| prologue | y, which is quantised instead of x |
|---|---|
| `RMSNorm(weight, eps)` | `x * (rsqrt(mean(x^2) + eps) * weight)` |
| `LayerNorm(weight, bias, eps)` | `(x - mean(x)) * (rsqrt(variance + eps) * weight) + bias` |
| `Activation("silu")` | `activation(x)` |
| `GLU(up, "silu")` | `activation(x) * up` |
| `GLU(activation="silu")` | `activation(x[..., :in]) * x[..., in:]` |

The variance is `max(0, mean(x^2) - mean(x)^2)`, which needs one pass over x.

The formulas are those of `flax.linen` and `flax.nnx`. They are computed in float32 and rounded
once, to x's dtype. XLA does the same with the unfused model: it does not round between elementwise
steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping

from slidejax.bounds import Bound
from slidejax.ops.sharding import MeshPartition, row_factors
from slidejax.weights.numerics import of_rank
from slidejax.weights.registries import register_exported

__all__ = [
    "ACTIVATIONS",
    "GLU",
    "PLAIN",
    "Activation",
    "InputLayout",
    "LayerNorm",
    "Prologue",
    "RMSNorm",
    "check_halves",
    "inputs_of",
]

# The kernels have these functions, too. A new one goes into `Activation`, `kNames` and their limit
# in cuda/lift/lift.h, `Activated` in cuda/lift/prologue.cuh, the limit in cuda/decode/handlers.cc,
# `_ACTIVATION_NUMBERS` in slidejax/ops/chain.py, and the lists of the emulators' tests.
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Prologue:
    """The `prologue=` of `slidejax.lift_quantize` and `slidejax.linear`.

    It is a pytree. Its leaves have the shape of x if `ROWS` is true, and `[in]` otherwise.
    """

    ROWS: ClassVar[bool] = False

    @property
    def halves(self) -> bool:
        """Whether x has twice as many columns as y."""
        return False

    def apply(self, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
        """Computes y from x `[..., in]`, in x's dtype.

        `axes` are the mesh axes over which the columns are split inside `shard_map`. x and y are
        then one shard.
        """
        raise NotImplementedError

    def check(self, x: jax.Array) -> None:
        """Raises ValueError for arrays that do not fit x."""
        if self.halves and x.shape[-1] % 2:
            raise ValueError(
                f"{type(self).__name__} without up takes x with two halves, [..., 2 * in], got "
                f"shape {x.shape}"
            )
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name, leaf = field.name, getattr(self, field.name)
            if field.metadata.get("static") or (leaf is None and field.default is None):
                continue
            expected = x.shape if self.ROWS else x.shape[-1:]
            what = f"{type(self).__name__}: {name}"
            if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
                raise TypeError(f"{what} must be an array, got {type(leaf).__name__}")
            if jnp.shape(leaf) != expected:
                raise ValueError(
                    f"{what} must have shape {expected} for x of shape {x.shape}, got "
                    f"{jnp.shape(leaf)}"
                )
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise ValueError(f"{what} must be floating, got {jnp.result_type(leaf)}")
            if self.ROWS and jnp.result_type(leaf) != x.dtype:
                raise ValueError(
                    f"{what} must have x's dtype, {x.dtype}, got {jnp.result_type(leaf)}"
                )


def _mean(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    return jax.lax.pmean(mean, axes) if axes else mean


def _check_activation(name: str) -> None:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r:.60}")


def _check_eps(eps: float) -> None:
    Bound(0).check(eps, "eps")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RMSNorm(Prologue):
    """Root-mean-square norm, as `flax.linen.RMSNorm` and `flax.nnx.RMSNorm` compute it.

    Attributes:
      weight: `[in]`, the norm's `scale`.
      eps: added to the mean of squares.

    Squares are added in float32, as Flax adds them. The square of a number above 1.8e19 is infinite
    there, and the finite numbers of such a row become zeros.

    >>> from slidejax import lift_quantize
    >>> norm = RMSNorm(jnp.ones(2), eps=0.0)
    >>> codes, scale = lift_quantize(jnp.array([[3.0, 4.0]]), "2:4", prologue=norm)
    >>> codes[0, :2].tolist(), round(float(scale[0, 0]), 6)
    ([95, 127], 0.008908)
    """

    weight: jax.Array
    eps: float = dataclasses.field(default=1e-6, metadata={"static": True})

    def __post_init__(self):
        _check_eps(self.eps)

    def apply(self, x, axes=()):
        v = x.astype(jnp.float32)
        factor = jax.lax.rsqrt(_mean(v * v, axes) + np.float32(self.eps))
        factor = factor * of_rank(self.weight.astype(jnp.float32), v.ndim)
        return (v * factor).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerNorm(Prologue):
    """Layer norm, as `flax.linen.LayerNorm` and `flax.nnx.LayerNorm` compute it.

    Attributes:
      weight: `[in]`, the norm's `scale`.
      bias: `[in]`, or None.
      eps: added to the variance.

    Squares are added in float32, as in `RMSNorm`.
    """

    weight: jax.Array
    bias: jax.Array | None = None
    eps: float = dataclasses.field(default=1e-6, metadata={"static": True})

    def __post_init__(self):
        _check_eps(self.eps)

    def apply(self, x, axes=()):
        v = x.astype(jnp.float32)
        mean = _mean(v, axes)
        variance = jnp.maximum(np.float32(0), _mean(v * v, axes) - mean * mean)
        factor = jax.lax.rsqrt(variance + np.float32(self.eps))
        y = (v - mean) * (factor * of_rank(self.weight.astype(jnp.float32), v.ndim))
        if self.bias is not None:
            y = y + of_rank(self.bias.astype(jnp.float32), v.ndim)
        return y.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activation(Prologue):
    """An activation between two linear layers.

    Attributes:
      activation: "silu", "gelu" (exact), "gelu_tanh" or "relu".
    """

    activation: str = dataclasses.field(default="gelu", metadata={"static": True})

    def __post_init__(self):
        _check_activation(self.activation)

    def apply(self, x, axes=()):
        return ACTIVATIONS[self.activation](x.astype(jnp.float32)).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GLU(Prologue):
    """A gated activation. x is the gate, or the gate and up side by side.

    Attributes:
      up: an array of x's shape and dtype. None: x is `[..., 2 * in]`, the gate and behind it up, as
        one product makes them. On a GPU the lift then reads both halves where they lie. Such an x
        cannot be split over a mesh along its columns.
      activation: of the gate: "silu", "gelu" (exact), "gelu_tanh" or "relu".

    >>> from slidejax import linear, pack
    >>> w = pack(jnp.ones((8, 2)), "6:8", mask=jnp.ones((8, 2), bool).at[6:].set(False))
    >>> linear(jnp.ones((1, 8)), w, prologue=GLU(jnp.full((1, 8), 2.0), "relu"))
    Array([[12., 12.]], dtype=float32)
    >>> both = jnp.concatenate([jnp.ones((1, 8)), jnp.full((1, 8), 2.0)], -1)
    >>> linear(both, w, prologue=GLU(activation="relu"))
    Array([[12., 12.]], dtype=float32)
    """

    up: jax.Array | None = None
    activation: str = dataclasses.field(default="silu", metadata={"static": True})
    ROWS: ClassVar[bool] = True

    def __post_init__(self):
        _check_activation(self.activation)

    @property
    def halves(self) -> bool:
        return self.up is None

    def apply(self, x, axes=()):
        gate, up = jnp.split(x, 2, axis=-1) if self.up is None else (x, self.up)
        gate = ACTIVATIONS[self.activation](gate.astype(jnp.float32))
        return (gate * up.astype(jnp.float32)).astype(x.dtype)


# --- as operands ----------------------------------------------------------------------------------


for _prologue in (RMSNorm, LayerNorm, Activation, GLU):
    register_exported(_prologue)


@dataclasses.dataclass(frozen=True)
class InputLayout:
    """The layout of x and a prologue's arrays among an op's operands.

    It is a parameter of the primitives. x comes first, and the arrays follow.

    Attributes:
      tree: the structure of the prologue, or of None.
      rows: the number of operands that have rows: x, and `up` of a `GLU`.
      halves: whether x has twice as many columns as what is quantised.
    """

    tree: jax.tree_util.PyTreeDef
    rows: int
    halves: bool = False

    @property
    def count(self) -> int:
        return 1 + self.tree.num_leaves

    @property
    def has_prologue(self) -> bool:
        return self != PLAIN

    def columns(self, x: jax.Array) -> int:
        """The columns that are quantised."""
        return x.shape[-1] // 2 if self.halves else x.shape[-1]

    def mappings(self, columns, rank: int) -> tuple[ArrayMapping, ...]:
        """The Shardy factors of the operands for an x of this rank, and `columns` for its last.

        Two halves have a factor of their own, which nothing else has.
        """
        columns = "both" if self.halves else columns
        return tuple(
            ArrayMapping(*(row_factors(rank) if i < self.rows else ()), columns)
            for i in range(self.count)
        )

    def shardings(self, cut: MeshPartition) -> tuple:
        """The operands' shardings in a cut."""
        return tuple(
            cut.sharding("rows", "k") if i < self.rows else cut.sharding("k")
            for i in range(self.count)
        )

    def apply(self, xs: Sequence[jax.Array], axes: tuple[str, ...] = ()) -> jax.Array:
        """x after the prologue, if there is one. `axes` is that of `Prologue.apply`."""
        prologue = self.prologue(xs)
        return xs[0] if prologue is None else prologue.apply(xs[0], axes)

    def prologue(self, xs: Sequence[jax.Array]) -> Prologue | None:
        """The prologue whose arrays follow x."""
        return jax.tree.unflatten(self.tree, xs[1:])

    def pull_back(
        self, xs: Sequence[jax.Array], dy: jax.Array, axes: tuple[str, ...] = ()
    ) -> tuple[jax.Array, ...]:
        """The gradients of the operands, from that of `apply`."""
        if not self.has_prologue:
            return (dy.astype(xs[0].dtype),)
        _, pull = jax.vjp(lambda *xs: self.apply(xs, axes), *xs)
        return pull(dy.astype(xs[0].dtype))

    def flat(self, xs: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """The operands with one axis of rows, as the primitives take them."""
        columns = xs[0].shape[-1]
        rows = math.prod(xs[0].shape[:-1])
        return tuple(a.reshape(rows, columns) if i < self.rows else a for i, a in enumerate(xs))


def check_halves(op: str, inputs: InputLayout, reduce_axis) -> None:
    """Raises ValueError if the columns of two halves are split over mesh axes."""
    if inputs.halves and reduce_axis is not None:
        raise ValueError(
            f"{op}: reduce_axis splits the columns of x, which a GLU without up does not allow; "
            f"give up as an array, got reduce_axis {reduce_axis!r}"
        )


PLAIN = InputLayout(jax.tree.structure(None), 1)  # x alone


def inputs_of(x: jax.Array, prologue: Prologue | None) -> tuple[InputLayout, list[jax.Array]]:
    """The layout and the operands of x `[..., in]` and its prologue.

    Operands are of x's shape and `[in]`.

    Raises:
      TypeError: if `prologue` is no `Prologue`.
      ValueError: for arrays that do not fit x.
    """
    if prologue is None:
        return PLAIN, [x]
    if not isinstance(prologue, Prologue):
        raise TypeError(
            'prologue must be a Prologue, such as slidejax.RMSNorm(weight) or Activation("silu"), '
            f"got {type(prologue).__name__}"
        )
    prologue.check(x)
    leaves, tree = jax.tree.flatten(prologue)
    rows = 1 + (len(leaves) if prologue.ROWS else 0)
    layout = InputLayout(tree, rows, prologue.halves)
    return layout, [x, *map(jnp.asarray, leaves)]

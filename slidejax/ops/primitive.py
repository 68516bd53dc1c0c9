"""What the three ops share: making primitives, leading axes, manual mesh axes, the cut of K over a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slidejax.weights.pattern import BLOCK_GROUPS, Pattern


def make_primitive(
    name: str, shape_rule: Callable[..., list], lowering: Callable[..., Any]
) -> Primitive:
    """A primitive with several results, a shape rule and one lowering for each platform.

    Args:
      name: of the primitive, as jaxprs show it.
      shape_rule: `(*avals, **params) -> [(shape, dtype), ...]`, all of rank 2 with rows like the first operand.
      lowering: `(*operands, platform=..., **params) -> list of results`, written in JAX; `platform` is "cuda" or
        "default".
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def abstract_eval(x, *avals, **params):
        # from x's own aval, so that it keeps the mesh axes over which x varies inside shard_map
        return [
            x.update(shape=shape, dtype=np.dtype(dtype), weak_type=False)
            for shape, dtype in shape_rule(x, *avals, **params)
        ]

    def lower_for(platform):
        def lower(*operands, **params):
            return lowering(*operands, platform=platform, **params)

        return mlir.lower_fun(lower, multiple_results=True)

    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, lower_for("default"))
    mlir.register_lowering(primitive, lower_for("cuda"), platform="cuda")
    jitted = jax.jit(
        lambda *operands, params: primitive.bind(*operands, **dict(params)),
        static_argnames="params",
    )
    primitive.def_impl(
        lambda *operands, **params: jitted(*operands, params=tuple(sorted(params.items())))
    )
    return primitive


def with_rules(
    primal: Callable[..., Any],
    vmap_rule: Callable[..., tuple[Any, Any]],
    backward: Callable[[Any, Any], tuple],
    residuals: Callable[[tuple, Any], Any] = lambda operands, results: operands,
) -> Callable[..., Any]:
    """`primal` with a vmap rule inside a reverse-mode rule: `custom_partitioning` brings neither.

    Args:
      primal: `(*operands) -> results`.
      vmap_rule: `(op, axis_size, in_batched, *operands) -> (results, out_batched)`, where `op` is the op itself, so that maps nest.
      backward: `(residuals, cotangents) -> cotangents of the operands`.
      residuals: `(operands, results) -> what backward needs`; all operands by default.
    """

    @custom_vmap
    def batched(*operands):
        return primal(*operands)

    @batched.def_vmap
    def _(axis_size, in_batched, *operands):
        return vmap_rule(batched, axis_size, in_batched, *operands)

    @jax.custom_vjp
    def op(*operands):
        return batched(*operands)

    def forward(*operands):
        results = batched(*operands)
        return results, residuals(operands, results)

    op.defvjp(forward, backward)
    return op


def map_batched(op, axis_size: int, in_batched, x_operands: int, operands):
    """The vmap rule of an op whose first `x_operands` operands and whose results have rows: a batch of rows is just more rows; a batch
    of anything else runs one after the other."""
    batched = list(jax.tree.leaves(in_batched))
    if not any(batched[x_operands:]):
        x_parts = [
            a if b else jnp.broadcast_to(a, (axis_size, *a.shape))
            for a, b in zip(operands[:x_operands], batched, strict=False)
        ]
        ys = op(*(a.reshape(-1, a.shape[-1]) for a in x_parts), *operands[x_operands:])
        ys = jax.tree.map(lambda y: y.reshape(axis_size, -1, y.shape[-1]), ys)
        return ys, jax.tree.map(lambda y: True, ys)

    def one(slices):
        rest = iter(slices)
        return op(*(next(rest) if b else a for a, b in zip(operands, batched, strict=True)))

    ys = jax.lax.map(one, [a for a, b in zip(operands, batched, strict=True) if b])
    return ys, jax.tree.map(lambda y: True, ys)


def check_input(x, name: str = "x") -> jax.Array:
    """`x` as a float array with at least one axis; ValueError otherwise."""
    x = jnp.asarray(x)
    if x.ndim < 1:
        raise ValueError(f"{name} must be [..., in], got a scalar")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}")
    return x


def varying_axes(*arrays) -> frozenset:
    """The manual mesh axes over which any of the arrays varies; empty outside `shard_map`."""
    axes: frozenset = frozenset()
    for array in arrays:
        aval = jax.typeof(array)
        manual = getattr(aval, "manual_axis_type", None)
        axes |= manual.varying if manual is not None else getattr(aval, "vma", frozenset())
    return axes


def vary(axes: frozenset, *arrays) -> list:
    """The arrays, made varying over all of `axes`: a primitive's operands must agree. Its transpose is a sum."""
    out = []
    for array in arrays:
        missing = tuple(sorted(axes - varying_axes(array)))
        out.append(jax.lax.pcast(array, missing, to="varying") if missing else array)
    return out


def axis_names(reduce_axis) -> tuple[str, ...]:
    """`reduce_axis` as a tuple of mesh axis names."""
    if reduce_axis is None:
        return ()
    names = (reduce_axis,) if isinstance(reduce_axis, str) else tuple(reduce_axis)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"reduce_axis must name one or more mesh axes, got {reduce_axis!r}")
    return names


# --- sharding ---------------------------------------------------------------------------------------------------------


def spec_axes(entry) -> tuple[str, ...]:
    """A PartitionSpec entry as a tuple of mesh axis names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def spec_entry(axes: Sequence[str]):
    """The inverse of `spec_axes`."""
    return None if not axes else axes[0] if len(axes) == 1 else tuple(axes)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How an op is cut over a mesh: the axes that split rows, outputs and K."""

    mesh: Any
    rows: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    k: tuple[str, ...] = ()

    def sharding(self, *entries: str | None) -> NamedSharding:
        """The sharding of an operand whose axes are named "rows", "out", "k" or None."""
        return NamedSharding(
            self.mesh, P(*(None if e is None else spec_entry(getattr(self, e)) for e in entries))
        )

    def check_k(self, op: str, pattern: Pattern, in_features: int) -> Cut:
        """Returns self; ValueError if K does not divide into whole blocks over the axes that split it."""
        shards = int(np.prod([self.mesh.shape[axis] for axis in self.k], initial=1))
        if in_features % (pattern.block * shards):
            raise ValueError(
                f"{op}: K is split {shards} ways over mesh axes {self.k}, but {in_features} inputs are not a whole number "
                f"of blocks of {pattern.block} columns ({BLOCK_GROUPS} groups of pattern {pattern}) for each shard"
            )
        return self


def first_axes(*entries) -> tuple[str, ...]:
    """The first of several PartitionSpec entries that names an axis."""
    return next((axes for axes in map(spec_axes, entries) if axes), ())


def spec_of(shape_with_sharding) -> tuple:
    """The PartitionSpec entries of a `custom_partitioning` argument, one for each axis."""
    spec = getattr(shape_with_sharding.sharding, "spec", None)
    entries = tuple(spec) if spec is not None else ()
    return entries + (None,) * (len(shape_with_sharding.shape) - len(entries))

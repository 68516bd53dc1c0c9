"""Mesh axes: those over which arrays vary in `shard_map`, and those along which an op is cut."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from slidejax.weights.pattern import BLOCK_GROUPS, Pattern

__all__ = [
    "MeshPartition",
    "axis_names",
    "check_partitioner",
    "cut_of",
    "explicit_mesh",
    "is_explicit",
    "partitioned",
    "product_spec",
    "row_factors",
    "spec_axes",
    "spec_entry",
    "spec_of",
    "vary",
    "varying_axes",
    "with_automatic_axes",
]


def varying_axes(*arrays) -> frozenset:
    """The manual mesh axes over which any of the arrays varies. Empty outside `shard_map`."""
    axes: frozenset = frozenset()
    for array in arrays:
        aval = jax.typeof(array)
        manual = getattr(aval, "manual_axis_type", None)
        axes |= manual.varying if manual is not None else getattr(aval, "vma", frozenset())
    return axes


def vary(axes: frozenset, *arrays) -> list:
    """Makes the arrays vary over all of `axes`: the operands of a primitive must agree.

    The transpose is a sum over the axes that are added.
    """
    out = []
    for array in arrays:
        missing = tuple(sorted(axes - varying_axes(array)))
        out.append(jax.lax.pcast(array, missing, to="varying") if missing else array)
    return out


def axis_names(reduce_axis) -> tuple[str, ...]:
    """Returns `reduce_axis` as a tuple of mesh axis names.

    Raises:
      ValueError: if it names no mesh axes, or one that the code around does not map over.
    """
    if reduce_axis is None:
        return ()
    given = (reduce_axis,) if isinstance(reduce_axis, str) else reduce_axis
    names = tuple(given) if isinstance(given, (tuple, list)) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"reduce_axis must name one or more mesh axes, got {reduce_axis!r:.60}")
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for name in names:
        if name not in manual:  # an axis of a vmap has a name, too
            raise ValueError(
                f"reduce_axis must name mesh axes of the shard_map around, got {name!r}"
            )
    return names


def spec_axes(entry) -> tuple[str, ...]:
    """Returns a PartitionSpec entry as a tuple of mesh axis names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def spec_entry(axes: Sequence[str]):
    """The inverse of `spec_axes`."""
    return None if not axes else axes[0] if len(axes) == 1 else tuple(axes)


@dataclasses.dataclass(frozen=True)
class MeshPartition:
    """How an op is cut over a mesh.

    Attributes:
      mesh: the mesh.
      rows: for each leading axis of x, the mesh axes that split it.
      out, k: the mesh axes that split outputs and K.
      scattered: `(mesh axis, axis of y)` for those axes of `k` over which the sum over K is
        scattered: each device keeps its part of that axis of y.
    """

    mesh: Any
    rows: tuple[tuple[str, ...], ...] = ()
    out: tuple[str, ...] = ()
    k: tuple[str, ...] = ()
    scattered: tuple[tuple[str, int], ...] = ()

    def sharding(self, *entries: str | None) -> NamedSharding:
        """The sharding of an operand whose axes are each "rows", "out", "k" or None.

        "rows" stands for all leading axes of x. "y_rows" and "y_out" are those of the result.
        """
        spec: list = []
        for entry in entries:
            if entry in ("rows", "y_rows"):
                spec += [
                    axes + (self._scattered(i) if entry == "y_rows" else ())
                    for i, axes in enumerate(self.rows)
                ]
            elif entry == "y_out":
                spec.append(self.out + self._scattered(len(self.rows)))
            else:
                spec.append(() if entry is None else getattr(self, entry))
        return NamedSharding(self.mesh, P(*map(spec_entry, spec)))

    def _scattered(self, axis: int) -> tuple[str, ...]:
        return tuple(name for name, at in self.scattered if at == axis)

    def sum_over_k(self, acc: jax.Array) -> jax.Array:
        """Sums one shard's accumulators `[leading axes, out]` over the axes that split K."""
        for name, at in self.scattered:
            acc = jax.lax.psum_scatter(acc, name, scatter_dimension=at, tiled=True)
        return jax.lax.psum(acc, tuple(a for a in self.k if a not in dict(self.scattered)))

    def scatter_rows(self, rows: jax.Array) -> jax.Array:
        """The part of an array `[leading axes, ...]` that belongs to this shard of the sum."""
        for name, at in self.scattered:
            if at < len(self.rows):
                size = rows.shape[at] // self.mesh.shape[name]
                start = jax.lax.axis_index(name) * size
                rows = jax.lax.dynamic_slice_in_dim(rows, start, size, at)
        return rows


def cut_of(
    op: str, mesh, x, w, y, pattern: Pattern, in_features: int, *, whole_k: bool = False
) -> MeshPartition:
    """How an op is cut, from the shardings that the partitioner proposes.

    A mesh axis that cuts K of x and of W stays with K. Any other goes to the axis of y that wants
    it, else to the rows of x, the outputs and K in this order. The partitioner moves the operands
    that want it for something else. K is only cut between blocks; otherwise x and W are gathered
    over that axis, and a warning says so.

    Args:
      op: its name, for the warning.
      mesh: the mesh.
      x: `[leading axes, K]` with its sharding, as `custom_partitioning` hands it out.
      w: the values of the weight, `[out, groups, kept]`. None for the lift, whose result has K.
      y: the result, `[leading axes, out or K']`.
      pattern: of the weight.
      in_features: K without padding.
      whole_k: whether K is never cut, because x does not lie as W does.
    """
    *x_rows, x_k = map(spec_axes, spec_of(x))
    *y_rows, y_last = map(spec_axes, spec_of(y))
    w_out, w_k = map(spec_axes, spec_of(w)[:2]) if w is not None else ((), y_last)
    y_out = y_last if w is not None else ()
    others = {a for axes in (*y_rows, y_out, *x_rows, w_out) for a in axes}
    wanted = [a for a in dict.fromkeys((*x_k, *w_k)) if (a in x_k and a in w_k) or a not in others]
    wanted = [] if whole_k else wanted
    k: list[str] = []
    for axis in wanted:
        shards = math.prod(mesh.shape[a] for a in (*k, axis))
        if in_features % (pattern.block * shards) == 0:
            k.append(axis)
    uncut = tuple(axis for axis in wanted if axis not in k)
    if uncut:
        _warn_of_gather(op, pattern, in_features, math.prod(mesh.shape[a] for a in wanted), uncut)
    taken = set(k)

    def claim(*claims: Sequence[str]) -> tuple[str, ...]:
        axes = tuple(a for a in dict.fromkeys(a for c in claims for a in c) if a not in taken)
        taken.update(axes)
        return axes

    y_rows_claimed = [claim(axes) for axes in y_rows]
    y_out_claimed = claim(y_out)
    rows = tuple(a + claim(b) for a, b in zip(y_rows_claimed, x_rows, strict=True))
    out = y_out_claimed + claim(w_out)
    cut = MeshPartition(mesh, rows, out, tuple(k))
    return dataclasses.replace(cut, scattered=_scattered(cut, y, (*y_rows, y_out)))


def _scattered(cut: MeshPartition, y, wanted: Sequence[Sequence[str]]) -> tuple:
    """The axes of K that y wants for one of its own axes, where they divide it."""
    found = []
    for at, axes in enumerate(wanted):
        parts = math.prod(cut.mesh.shape[a] for a in (*cut.rows, cut.out)[at])
        for axis in axes:
            if axis in cut.k and y.shape[at] % (parts * cut.mesh.shape[axis]) == 0:
                parts *= cut.mesh.shape[axis]
                found.append((axis, at))
    return tuple(found)


def _warn_of_gather(op: str, pattern: Pattern, in_features: int, shards: int, axes) -> None:
    warnings.warn(
        f"{op}: K is split {shards} ways, but {in_features} inputs are not a whole number of "
        f"blocks of {pattern.block} columns ({BLOCK_GROUPS} groups of pattern {pattern}) for each "
        f"shard: x and the weight are gathered over mesh axes {axes}",
        stacklevel=2,
    )


def row_factors(rank: int) -> tuple[str, ...]:
    """Shardy's factors for the leading axes of an operand of x's rank."""
    return tuple(f"m{i}" for i in range(rank - 1))


def partitioned(fn: Callable, rule: Callable, partition: Callable) -> Callable:
    """Gives `fn` a sharding rule and a partitioned form, as `custom_partitioning` has them."""
    op = custom_partitioning(fn)

    def partition_alone(mesh, operands, results):
        mesh, local, *shardings = partition(mesh, operands, results)

        def alone(*shards):
            # Explicit axes of `jax.set_mesh` would be part of the types of what a shard computes.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return local(*shards)

        return mesh, alone, *shardings

    op.def_partition(partition_alone, sharding_rule=rule)

    def call(*operands):
        # Without Shardy nothing reads the rule, and XLA would end the process. The primitive
        # refuses to be lowered for several devices then (`check_partitioner`).
        return op(*operands) if _uses_shardy() else fn(*operands)

    return call


def check_partitioner(axis_context: Any) -> None:
    """Refuses to lower an op for several devices without Shardy.

    Args:
      axis_context: that of a lowering rule's module context.

    Raises:
      NotImplementedError: naming the setting.
    """
    if _uses_shardy():
        return
    manual = getattr(axis_context, "manual_axes", None)
    several = (
        set(manual) != set(axis_context.mesh.axis_names)
        if manual is not None
        else getattr(axis_context, "num_devices", 1) > 1
    )
    if several:
        raise NotImplementedError(
            "slidejax runs over several devices with the Shardy partitioner alone: leave "
            "jax_use_shardy_partitioner (JAX_USE_SHARDY_PARTITIONER) on, as it is by default, or "
            "put the whole program into jax.shard_map"
        )


def _uses_shardy() -> bool:
    return getattr(jax.config, "jax_use_shardy_partitioner", True)


def spec_of(shape_with_sharding) -> tuple:
    """The PartitionSpec entries of an argument of `custom_partitioning`, one for each axis."""
    spec = getattr(shape_with_sharding.sharding, "spec", None)
    axes = getattr(spec, "unreduced", None)
    if axes:
        raise ValueError(
            f"an operand {shape_with_sharding} is unreduced over the mesh axes "
            f"{', '.join(map(repr, sorted(axes)))}: reduce it first (jax.sharding.reshard)"
        )
    entries = tuple(spec) if spec is not None else ()
    return entries + (None,) * (len(shape_with_sharding.shape) - len(entries))


# --- explicit mode --------------------------------------------------------------------------------


def with_automatic_axes(op: Callable, operands: Sequence[jax.Array], results: Callable):
    """Calls `op(*operands)`, with the explicit axes of the mesh taken as automatic ones.

    Explicit axes (`jax.sharding.AxisType.Explicit`) are part of an array's type. The partitioner
    cuts the op, as it does with automatic axes, and the results get the types that `results` says.

    Args:
      op: a function of arrays.
      operands: its arguments.
      results: makes the `PartitionSpec` of each result, as a tree, from those of the operands.
    """
    mesh = explicit_mesh(operands)
    if mesh is None:
        return op(*operands)
    explicit = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    specs = results(*(spec_of(jax.typeof(a)) for a in operands))
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P)
    )
    return jax.sharding.auto_axes(op, axes=tuple(sorted(explicit)), out_sharding=shardings)(
        *operands
    )


def is_explicit(mesh: Any) -> bool:
    """Whether a mesh has explicit axes. An empty one has no axes."""
    return AxisType.Explicit in mesh.axis_types


def explicit_mesh(operands: Sequence[jax.Array]):
    """The mesh of the operands' types if it has explicit axes, else None."""
    meshes = (jax.typeof(operand).sharding.mesh for operand in operands)
    return next(filter(is_explicit, meshes), None)


def product_spec(x: Sequence, w_out) -> P:
    """The PartitionSpec of a product, from that of x and the entry of W's outputs.

    A mesh axis that both want goes to the rows of x.
    """
    *rows, _ = x
    taken = {axis for entry in rows for axis in spec_axes(entry)}
    return P(*rows, spec_entry([a for a in spec_axes(w_out) if a not in taken]))

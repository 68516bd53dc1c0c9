"""Mesh axes: those over which arrays vary in `shard_map`, and those along which an op is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slidejax.weights.pattern import BLOCK_GROUPS, Pattern

__all__ = [
    "MeshPartition",
    "axis_names",
    "first_axes",
    "spec_axes",
    "spec_entry",
    "spec_of",
    "vary",
    "varying_axes",
    "without",
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
    """Returns `reduce_axis` as a tuple of mesh axis names."""
    if reduce_axis is None:
        return ()
    names = (reduce_axis,) if isinstance(reduce_axis, str) else tuple(reduce_axis)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"reduce_axis must name one or more mesh axes, got {reduce_axis!r}")
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
      rows, out, k: the mesh axes that split rows, outputs and K.
    """

    mesh: Any
    rows: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    k: tuple[str, ...] = ()

    def sharding(self, *entries: str | None) -> NamedSharding:
        """The sharding of an operand whose axes are each "rows", "out", "k" or None."""
        return NamedSharding(
            self.mesh, P(*(None if e is None else spec_entry(getattr(self, e)) for e in entries))
        )

    def check_k(self, op: str, pattern: Pattern, in_features: int) -> MeshPartition:
        """Returns self if each shard of K holds whole blocks; raises ValueError otherwise."""
        shards = int(np.prod([self.mesh.shape[axis] for axis in self.k], initial=1))
        if in_features % (pattern.block * shards):
            raise ValueError(
                f"{op}: K is split {shards} ways over mesh axes {self.k}, but {in_features} inputs "
                f"are not a whole number of blocks of {pattern.block} columns ({BLOCK_GROUPS} "
                f"groups of pattern {pattern}) for each shard"
            )
        return self


def first_axes(*entries) -> tuple[str, ...]:
    """The mesh axes of the first of several PartitionSpec entries that names one."""
    return next((axes for axes in map(spec_axes, entries) if axes), ())


def without(entry, taken) -> tuple[str, ...]:
    """The mesh axes of a PartitionSpec entry that another entry does not take."""
    return tuple(axis for axis in spec_axes(entry) if axis not in spec_axes(taken))


def spec_of(shape_with_sharding) -> tuple:
    """The PartitionSpec entries of an argument of `custom_partitioning`, one for each axis."""
    spec = getattr(shape_with_sharding.sharding, "spec", None)
    entries = tuple(spec) if spec is not None else ()
    return entries + (None,) * (len(shape_with_sharding.shape) - len(entries))

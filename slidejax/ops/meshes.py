"""Meshes with explicit axes, as `jax.make_mesh` makes them, taken as automatic ones.

Explicit axes are part of the types of all that is computed, so that a program has to say how every
result lies. Whole models leave that to the compiler.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from slidejax.ops.sharding import is_explicit

__all__ = ["automatic", "beside", "on_mesh"]


def automatic(params: Any) -> Any:
    """A tree of arrays on meshes with automatic axes. They stay where they are."""

    def retyped(leaf: Any) -> Any:
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or not is_explicit(sharding.mesh):
            return leaf
        mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
        placed = NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
        return jax.device_put(leaf, placed)

    return jax.tree.map(retyped, params)


def beside(params: Any) -> Sharding | None:
    """The sharding of an array that lies whole on each device of the parameters.

    None leaves it to JAX, where the parameters do.
    """
    arrays = [leaf for leaf in jax.tree.leaves(params) if _is_concrete(leaf)]
    if not arrays:
        return None
    widest = max(arrays, key=lambda array: array.sharding.num_devices)
    if isinstance(widest.sharding, NamedSharding):
        return NamedSharding(widest.sharding.mesh, PartitionSpec())
    committed = [array for array in arrays if array.committed]
    return committed[0].sharding if committed and widest.sharding.num_devices == 1 else None


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def on_mesh(params: Any) -> contextlib.AbstractContextManager:
    """A context for programs of these parameters where `jax.set_mesh` has explicit axes around.

    Those axes would be part of the types of all arrays that a program makes by itself. It takes
    those of the parameters, or else those of the mesh around, as automatic ones. It changes nothing
    where the parameters have explicit axes themselves, and where there are none around.
    """
    if not is_explicit(jax.sharding.get_abstract_mesh()):
        return contextlib.nullcontext()
    mesh = getattr(beside(params), "mesh", None)
    if mesh is not None and is_explicit(mesh):
        return contextlib.nullcontext()
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    return jax.set_mesh(Mesh(mesh.devices, mesh.axis_names))

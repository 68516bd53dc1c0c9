"""Where the small arrays of a call go: to the devices of the parameters, by explicit transfers.

JAX would move NumPy arguments of a compiled program by itself. `jax.transfer_guard("disallow")`
forbids that, so that parameters are not copied in every call without a word. Tokens and masks are
meant to be copied.

A mesh may have explicit axes, as `jax.make_mesh` makes them. Then they are part of the types of all
that is computed, and a program has to say how every result lies. Generation leaves that to the
compiler: it takes the axes as automatic ones.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

__all__ = ["automatic", "beside", "fetch", "on_mesh", "put", "start_fetching"]


def automatic(params: Any) -> Any:
    """The parameters on meshes with automatic axes. They stay where they are."""

    def retyped(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or not _is_explicit(sharding.mesh):
            return leaf
        mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
        placed = NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
        return jax.device_put(leaf, placed)

    return jax.tree.map(retyped, params)


def _is_explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types


def on_mesh(sharding: Sharding | None) -> contextlib.AbstractContextManager:
    """A context for the arrays of `automatic`, which the explicit axes of another would disturb."""
    mesh = getattr(sharding, "mesh", None)
    if isinstance(mesh, Mesh) and _is_explicit(jax.sharding.get_abstract_mesh()):
        return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def beside(params: Any) -> Sharding | None:
    """The sharding of an array that lies whole on each device of the parameters.

    None leaves it to JAX, where the parameters do.
    """
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    if not arrays:
        return None
    widest = max(arrays, key=lambda array: array.sharding.num_devices)
    if isinstance(widest.sharding, NamedSharding):
        return NamedSharding(widest.sharding.mesh, PartitionSpec())
    committed = [array for array in arrays if array.committed]
    return committed[0].sharding if committed and widest.sharding.num_devices == 1 else None


def put(arrays: Any, sharding: Sharding | None) -> Any:
    """A tree of NumPy arrays on the devices of a sharding that `beside` gave."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)

    def whole(array: Any) -> jax.Array:
        parts = [jax.device_put(array, device) for device in sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

    return jax.tree.map(whole, arrays)  # `jax.device_put` would compare those of all processes


def start_fetching(*arrays: jax.Array) -> None:
    """Begins to copy results to the host, without waiting for them."""
    with jax.transfer_guard_device_to_host("allow"):  # `fetch` asks the guard
        for array in arrays:
            array.copy_to_host_async()


def fetch(array: jax.Array) -> Any:
    """A result as a NumPy array."""
    return jax.device_get(array)

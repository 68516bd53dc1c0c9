"""Where the small arrays of a call go: to the devices of the parameters, by explicit transfers.

JAX would move NumPy arguments of a compiled program by itself. `jax.transfer_guard("disallow")`
forbids that, so that parameters are not copied in every call without a word. Tokens and masks are
meant to be copied.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Sharding

__all__ = ["fetch", "put", "start_fetching"]


def put(arrays: Any, sharding: Sharding | None) -> Any:
    """A tree of NumPy arrays, put where `slidejax.ops.meshes.beside` says."""
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

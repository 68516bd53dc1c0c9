"""Checks of a decoder's inputs before it runs: token ids, their positions and a cache.

JAX wraps, clips or drops a number that is out of range, and the logits would look like any others.
So a position that the host knows is checked, with an error. One that only the device knows, as
under `jax.jit`, gives nan.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.lm.decoder.cache import LayerCache, check_cache_dtype
from slidejax.lm.decoder.config import DecoderConfig
from slidejax.weights.layout import as_array

__all__ = ["check_ids", "check_inputs"]

_MOST = 2**31 - 1  # what an int32 can be


def check_inputs(
    config: DecoderConfig, ids: Any, positions: Any, cache: Any, whole: bool
) -> tuple[jax.Array, jax.Array]:
    """Ids and positions as int32 `[batch, tokens]`.

    An id outside the vocabulary gives nan. A token whose position is beyond the cache or the
    context gets such an id, too.

    Args:
      config, ids, positions, cache, whole: as of `slidejax.lm.decoder.apply`.

    Raises:
      ValueError, TypeError: as `apply`.
    """
    ids = as_array(_narrowed(ids), "ids")
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"ids must be integers [batch, tokens], at least one, got {ids.dtype} of shape "
            f"{ids.shape}"
        )
    _check_cache(config, ids, cache)
    limit, what = _limit(config, cache)
    if positions is None:
        if isinstance(ids.shape[1], int) and ids.shape[1] > limit:
            raise ValueError(
                f"ids must be at most as long as {what}, {limit} positions, got {ids.shape[1]} "
                "tokens"
            )
        steps = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        ids = _int32(ids)
        if not isinstance(ids.shape[1], int):  # jax.export leaves it open
            ids = jnp.where(steps >= limit, config.vocab_size, ids)
        return ids, steps
    at = _known(positions)
    positions = as_array(_narrowed(positions), "positions")
    if positions.shape != ids.shape or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(
            f"positions must be integers of the shape of ids, {ids.shape}, got {positions.dtype} "
            f"of shape {positions.shape}"
        )
    ids, positions = _int32(ids), _int32(positions)
    if at is None:
        return jnp.where(positions >= limit, config.vocab_size, ids), positions
    _check_positions(at, limit, what, whole)
    return ids, positions


def check_ids(config: DecoderConfig, ids: Any, positions: Any) -> None:
    """Raises a ValueError for an id outside the vocabulary, where the host knows it.

    Padding may have any id.
    """
    known, at = _known(ids), None if positions is None else _known(positions)
    if known is None or (positions is not None and at is None):
        return
    if at is not None and at.shape == known.shape:
        known = known[at >= 0]
    bad = known[(known < 0) | (known >= config.vocab_size)]
    if bad.size:
        raise ValueError(
            f"ids must be tokens of the model, 0 to {config.vocab_size - 1}, got {bad[0]}"
        )


def _known(values: Any) -> np.ndarray | None:
    """Integers that the host knows or can ask for; None where it cannot."""
    if isinstance(values, jax.core.Tracer):
        return None
    if isinstance(values, jax.Array) and not values.is_fully_addressable:
        return None
    try:
        known = np.asarray(values)
    except ValueError:  # rows of different lengths
        return None
    return known if np.issubdtype(known.dtype, np.integer) else None


def _narrowed(values: Any) -> Any:
    """NumPy's wide integers, of which JAX would take the last 32 bits, at the nearest int32."""
    wide = isinstance(values, np.ndarray) and values.dtype in (np.int64, np.uint64, np.uint32)
    return np.clip(values, -1, _MOST).astype(np.int32) if wide else values


def _int32(values: jax.Array) -> jax.Array:
    """Integers as int32. Wider ones do not wrap around."""
    if values.dtype.itemsize < 4 or values.dtype == jnp.int32:
        return values.astype(jnp.int32)
    return jnp.clip(values, -1, _MOST).astype(jnp.int32)


def _check_positions(at: np.ndarray, limit: int, what: str, whole: bool) -> None:
    wrong = at[(at < -1) | (at >= limit)]
    if wrong.size:
        raise ValueError(
            f"positions must be -1 for padding or from 0 to {limit - 1}, the length of {what}, "
            f"got {wrong[0]}"
        )
    for row, held in enumerate(at):
        real = held[held >= 0]
        gap = np.flatnonzero(real[1:] != real[:-1] + 1)
        if gap.size:
            before, after = real[gap[0]], real[gap[0] + 1]
            raise ValueError(
                f"positions of a row must follow each other, got {after} behind {before} in row "
                f"{row}"
            )
        if whole and real.size and (held[0] != 0 or (held[: real.size] < 0).any()):
            raise ValueError(
                f"whole=True says that token i of each row is at position i, got {held[0]} first "
                f"in row {row}"
            )


def _limit(config: DecoderConfig, cache: Any) -> tuple[int, str]:
    """How many positions a row can have, and what limits them."""
    whole = [
        layer.keys.shape[2]
        for layer, window in zip(cache or (), config.windows, strict=False)
        if not layer.wraps(window)
    ]
    length = min(whole, default=config.max_positions)
    if length < config.max_positions:
        return length, "the cache"
    return config.max_positions, "the model's context"


def _check_cache(config: DecoderConfig, ids: jax.Array, cache: Any) -> None:
    if cache is None:
        return
    if not isinstance(cache, (tuple, list)) or not all(isinstance(c, LayerCache) for c in cache):
        raise TypeError(
            f"cache must be what init_cache made, a LayerCache for each layer, "
            f"got {type(cache).__name__}"
        )
    for i, layer in enumerate(cache):
        for name, leaf in layer._asdict().items():
            if not hasattr(leaf, "dtype") and not (leaf is None and name.endswith("_scales")):
                raise TypeError(f"cache[{i}].{name} must be an array, got {type(leaf).__name__}")
    found = [layer.keys.shape for layer in cache]
    for i, shape in enumerate(found):
        if not all(isinstance(size, int) for size in shape[1:]):
            raise ValueError(
                f"cache[{i}].keys has the shape {shape}: jax.export can leave its rows open, and "
                "no other axis of it"
            )
    length = max((shape[2] for shape in found), default=0)
    sizes = (ids.shape[0], config.num_kv_heads, config.head_dim)
    fits = len(cache) == config.num_layers and all(
        (*shape[:2], shape[3]) == sizes and shape[2] in (length, window)
        for shape, window in zip(found, config.windows, strict=True)
    )
    if not fits:
        wanted = (*sizes[:2], length, sizes[2])
        raise ValueError(
            f"cache has {len(cache)} layers with keys {sorted(set(found))}, expected "
            f"{config.num_layers} with [batch, kv_heads, length, head_dim] {wanted}, or as many "
            "slots as the layer's window"
        )
    for i, layer in enumerate(cache):
        _check_layer(layer, f"cache[{i}]")


def _check_layer(layer: LayerCache, name: str) -> None:
    """Raises a ValueError unless the arrays of a layer's cache fit its keys."""
    shape, dtype = layer.keys.shape, check_cache_dtype(layer.keys.dtype)
    if (layer.values.shape, layer.values.dtype) != (shape, dtype):
        raise ValueError(
            f"{name}.values must be as its keys, {dtype} {shape}, got {layer.values.dtype} "
            f"{layer.values.shape}"
        )
    for part in ("key_scales", "value_scales"):
        scales = getattr(layer, part)
        if dtype != np.int8:
            good, wanted = scales is None, f"None beside keys of {dtype}"
        else:
            good = scales is not None and (scales.shape, scales.dtype) == (shape[:3], jnp.float32)
            wanted = f"float32 {shape[:3]} beside keys of int8"
        if not good:
            got = None if scales is None else f"{scales.dtype} {scales.shape}"
            raise ValueError(f"{name}.{part} must be {wanted}, got {got}")

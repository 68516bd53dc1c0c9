"""The static cache of keys and values.

The slot of a token is its position. So a row's own length decides what it sees, and rows of
different lengths share one array.

A layer with a window needs its last `window` tokens only. It may have as many slots, which are then
a ring: the slot of a token is its position modulo their number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.lm.decoder.config import DecoderConfig, check_config
from slidejax.ops.decode_attention import put_tokens
from slidejax.weights import numerics
from slidejax.weights.registries import register_exported

__all__ = ["Cache", "LayerCache", "init_cache"]

_DTYPES = ("bfloat16", "float16", "float32", "int8")


class LayerCache(NamedTuple):
    """Keys and values of one layer.

    Attributes:
      keys, values: `[batch, kv_heads, length, head_dim]`.
      key_scales, value_scales: float32 `[batch, kv_heads, length]` for int8 codes, else None.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    def wraps(self, window: int | None) -> bool:
        """Whether the slots are those of a layer's window, taken again and again."""
        return self.keys.shape[2] == window

    def add(
        self, keys: jax.Array, values: jax.Array, positions: jax.Array, window: int | None
    ) -> tuple[LayerCache, jax.Array, LayerCache]:
        """Puts tokens into their slots, and says which slots they see.

        Args:
          keys, values: `[batch, tokens, kv_heads, head_dim]`.
          positions: int32 `[batch, tokens]`; what is negative or beyond the cache is not written.
          window: how many positions back a token of the layer sees; None is all.

        Returns:
          Keys and values to attend to, their positions `[batch or 1, length]` with -1 for none, and
          the cache with the tokens in it.
        """
        length, tokens = self.keys.shape[2], positions.shape[1]
        new = self._stored(keys, values)
        if not self.wraps(window):
            # A negative index would count from the end, and one beyond the end is dropped.
            held = self._put(new, jnp.where(positions < 0, length, positions))
            return held, jnp.arange(length, dtype=jnp.int32)[None], held
        last = jnp.max(positions, axis=1)
        # Of the tokens with the same slot only the last one is written.
        kept = (positions >= 0) & (positions > last[:, None] - length)
        held = self._put(new, jnp.where(kept, positions % length, length))
        if tokens == 1:
            return held, _held_positions(last, length), held
        # The first of these tokens see earlier ones whose slots the last ones take.
        first = jnp.min(jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions), axis=1)
        seen = jax.tree.map(
            lambda old, more: jnp.concatenate([old, jnp.swapaxes(more, 1, 2)], axis=2), self, new
        )
        before = _held_positions(first - 1, length)
        return seen, jnp.concatenate([before, positions], axis=1), held

    def _stored(self, keys: jax.Array, values: jax.Array) -> LayerCache:
        """New keys and values as the cache keeps them, still `[batch, tokens, kv_heads, …]`."""
        if self.key_scales is None:
            return LayerCache(keys.astype(self.keys.dtype), values.astype(self.values.dtype))
        (keys, key_scales), (values, value_scales) = (
            numerics.encode(x, numerics.absmax(x, -1), jnp.int8) for x in (keys, values)
        )
        return LayerCache(keys, values, key_scales[..., 0], value_scales[..., 0])

    def _put(self, new: LayerCache, slots: jax.Array) -> LayerCache:
        """The cache with new tokens in their slots `[batch, tokens]`."""
        return jax.tree.map(lambda cache, added: put_tokens(cache, added, slots), self, new)


register_exported(LayerCache)


def _held_positions(last: jax.Array, slots: int) -> jax.Array:
    """The positions `[batch, slots]` in a ring of slots, -1 for none, after position `last`."""
    back = (last[:, None] - jnp.arange(slots, dtype=jnp.int32)) % slots
    return jnp.maximum(last[:, None] - back, -1)


Cache = tuple[LayerCache, ...]  # one for each layer


def check_cache_dtype(dtype: Any) -> np.dtype:
    """The dtype of a cache; a ValueError for one that it cannot have."""
    resolved = numerics.dtype_of(dtype)
    if resolved is None or resolved.name not in _DTYPES:
        raise ValueError(
            f"dtype of a cache (cache_dtype) must be one of {', '.join(_DTYPES)}, got {dtype!r:.60}"
        )
    return resolved


def init_cache(
    config: DecoderConfig,
    batch: int,
    length: int,
    dtype: Any = "bfloat16",
    *,
    windows: bool = False,
) -> Cache:
    """An empty cache.

    Args:
      config: the decoder's configuration.
      batch: the number of rows.
      length: the number of positions that a row can have.
      dtype: bfloat16, float16 or float32; or int8, which keeps 8-bit codes with a float32 scale for
        each token and head, by the formulas of `slidejax.weights.numerics`.
      windows: whether a layer with a window that is shorter than `length` has only as many slots,
        which takes less memory. The positions of a row must then never go back.

    Returns:
      A tuple with a `LayerCache` for each layer. It is a pytree: donate it to the step that writes
      it.

    Raises:
      ValueError: for a batch or length that is no positive integer, or another dtype.

    >>> from slidejax.lm.decoder.examples import tiny
    >>> cache = init_cache(tiny().config, batch=2, length=16)
    >>> len(cache), cache[0].keys.shape, cache[0].keys.dtype.name
    (2, (2, 2, 16, 8), 'bfloat16')
    """
    for name, value in (("batch", batch), ("length", length)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    check_config(config)
    resolved = check_cache_dtype(dtype)

    def layer(window: int | None) -> LayerCache:
        slots = min(length, window) if windows and window is not None else length
        shape = (batch, config.num_kv_heads, slots, config.head_dim)
        # Each array is its own, because all of them are donated.
        keys, values = jnp.zeros(shape, resolved), jnp.zeros(shape, resolved)
        if resolved != np.int8:
            return LayerCache(keys, values)
        return LayerCache(
            keys, values, jnp.ones(shape[:3], jnp.float32), jnp.ones(shape[:3], jnp.float32)
        )

    return tuple(layer(window) for window in config.windows)

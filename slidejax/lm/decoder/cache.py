"""The static cache of keys and values.

The slot of a token is its position. So a row's own length decides what it sees, and rows of
different lengths share one array.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from slidejax.lm.decoder.config import DecoderConfig
from slidejax.weights import numerics

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

    def write(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> LayerCache:
        """Puts tokens into their slots.

        Args:
          keys, values: `[batch, tokens, kv_heads, head_dim]`.
          positions: int32 `[batch, tokens]`; what is negative or beyond the cache is not written.
        """
        length = self.keys.shape[2]
        rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]
        # A negative index would count from the end, and one beyond the end is dropped.
        slots = jnp.where(positions < 0, length, positions)

        def put(cache: jax.Array, new: jax.Array) -> jax.Array:
            new, dtype = new.astype(cache.dtype), cache.dtype
            if dtype.itemsize == 2:
                # XLA's CPU would turn the whole cache into float32 and back to write 16-bit floats.
                cache, new = (lax.bitcast_convert_type(x, jnp.uint16) for x in (cache, new))
            written = cache.at[rows, :, slots].set(new, mode="drop")
            return lax.bitcast_convert_type(written, dtype) if dtype.itemsize == 2 else written

        if self.key_scales is None or self.value_scales is None:
            return LayerCache(put(self.keys, keys), put(self.values, values))
        (keys, key_scales), (values, value_scales) = (
            numerics.encode(x, numerics.absmax(x, -1), jnp.int8) for x in (keys, values)
        )
        return LayerCache(
            put(self.keys, keys),
            put(self.values, values),
            put(self.key_scales, key_scales[..., 0]),
            put(self.value_scales, value_scales[..., 0]),
        )


Cache = tuple[LayerCache, ...]  # one for each layer


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: Any = "bfloat16") -> Cache:
    """An empty cache.

    Args:
      config: the decoder's configuration.
      batch: the number of rows.
      length: the number of positions that a row can have.
      dtype: bfloat16, float16 or float32; or int8, which keeps 8-bit codes with a float32 scale for
        each token and head, by the formulas of `slidejax.weights.numerics`.

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
    try:
        resolved = np.dtype(jnp.dtype(dtype))
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in _DTYPES:
        raise ValueError(f"dtype of a cache must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    shape = (batch, config.num_kv_heads, length, config.head_dim)

    def layer() -> LayerCache:
        # Each array is its own, because all of them are donated.
        keys, values = jnp.zeros(shape, resolved), jnp.zeros(shape, resolved)
        if resolved != np.int8:
            return LayerCache(keys, values)
        return LayerCache(
            keys, values, jnp.ones(shape[:3], jnp.float32), jnp.ones(shape[:3], jnp.float32)
        )

    return tuple(layer() for _ in range(config.num_layers))

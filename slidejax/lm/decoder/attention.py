"""Causal attention with grouped heads, by positions: no mask is ever an argument.

A query at position p sees the keys at positions p - window + 1 to p. Small products are computed at
once. Larger ones go through blocks of queries and keys with a running softmax (arXiv 2205.14135),
so that 32,768 tokens need no square array. Blocks that no query sees are skipped.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from slidejax.lm.decoder.cache import LayerCache

__all__ = ["attend"]

# Up to this many scores are computed at once: 256 MiB of float32.
_AT_ONCE = 1 << 26
_QUERIES, _KEYS = 256, 1024  # the sizes of a block

# What an unseen score is. It is finite, so that a query that sees nothing gives no nan.
_UNSEEN = -1e30


def attend(
    queries: jax.Array,
    held: LayerCache,
    query_positions: jax.Array,
    key_positions: jax.Array,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    """Attention of queries to keys.

    Args:
      queries: `[batch, tokens, heads, head_dim]`.
      held: the keys and values.
      query_positions: int32 `[batch, tokens]`. The result of a negative one has no meaning.
      key_positions: int32 `[batch or 1, length]`; negative ones are seen by nobody.
      scale: what scores are multiplied by.
      window: how many positions back a query sees, its own included; None is all.

    Returns:
      `[batch, tokens, heads, head_dim]` in the dtype of the queries.
    """
    batch, tokens, heads, head_dim = queries.shape
    kv_heads, length = held.keys.shape[1:3]
    # [batch, kv_heads, group, tokens, head_dim]: the heads that share keys are rows of one product
    q = queries.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    q = q.transpose(0, 2, 3, 1, 4)
    inside = _Scores(scale, window)
    if batch * heads * tokens * length <= _AT_ONCE:
        out = inside.at_once(q, held, query_positions, key_positions)
    else:
        out = inside.by_blocks(q, held, query_positions, key_positions)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, head_dim)
    return out.astype(queries.dtype)


class _Scores:
    """Scores and their softmax, with what is the same for all blocks."""

    def __init__(self, scale: float, window: int | None):
        self.scale, self.window = scale, window

    def seen(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Whether a query sees a key, bool `[batch, tokens, length]`."""
        q, k = query_positions[:, :, None], key_positions[:, None, :]
        seen = (k >= 0) & (k <= q)
        return seen if self.window is None else seen & (k > q - self.window)

    def scores(self, q, held: LayerCache, query_positions, key_positions) -> jax.Array:
        """Float32 `[batch, kv_heads, group, tokens, length]`."""
        scores = jnp.einsum(
            "bkgtd,bksd->bkgts",
            q,
            held.keys.astype(q.dtype),
            preferred_element_type=jnp.float32,
            precision=_precision(q.dtype),
        )
        if held.key_scales is not None:
            scores = scores * held.key_scales[:, :, None, None, :]
        seen = self.seen(query_positions, key_positions)[:, None, None]
        return jnp.where(seen, scores * jnp.float32(self.scale), jnp.float32(_UNSEEN))

    def weighted(self, weights: jax.Array, held: LayerCache, dtype) -> jax.Array:
        """Float32 `[batch, kv_heads, group, tokens, head_dim]`: the sum of weighted values."""
        if held.value_scales is not None:
            weights = weights * held.value_scales[:, :, None, None, :]
        return jnp.einsum(
            "bkgts,bksd->bkgtd",
            weights.astype(dtype),
            held.values.astype(dtype),
            preferred_element_type=jnp.float32,
            precision=_precision(dtype),
        )

    def at_once(self, q, held: LayerCache, query_positions, key_positions) -> jax.Array:
        scores = self.scores(q, held, query_positions, key_positions)
        return self.weighted(jax.nn.softmax(scores, axis=-1), held, q.dtype)

    def by_blocks(self, q, held: LayerCache, query_positions, key_positions) -> jax.Array:
        batch, kv_heads, group, tokens, head_dim = q.shape
        blocks = math.ceil(tokens / _QUERIES)
        padding = blocks * _QUERIES - tokens
        q = jnp.pad(q, [(0, 0)] * 3 + [(0, padding), (0, 0)])
        query_positions = jnp.pad(query_positions, [(0, 0), (0, padding)], constant_values=-1)
        key_blocks, key_positions = _cut(held, key_positions)

        def one(block):
            q, query_positions = block
            return self._over_keys(q, query_positions, key_blocks, key_positions)

        out = lax.map(
            one,
            (
                jnp.moveaxis(q.reshape(batch, kv_heads, group, blocks, -1, head_dim), 3, 0),
                jnp.moveaxis(query_positions.reshape(batch, blocks, -1), 1, 0),
            ),
        )
        out = jnp.moveaxis(out, 0, 3).reshape(batch, kv_heads, group, -1, head_dim)
        return out[:, :, :, :tokens]

    def _over_keys(self, q, query_positions, key_blocks, key_positions) -> jax.Array:
        """A block of queries with all blocks of keys, `[blocks, ...]` each."""

        @jax.checkpoint
        def add(running, held, positions):
            top, total, out = running
            scores = self.scores(q, held, query_positions, positions)
            higher = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(top - higher)
            out = out * shrink[..., None] + self.weighted(weights, held, q.dtype)
            return higher, total * shrink + weights.sum(-1), out

        def step(running, block):
            visible = self.seen(query_positions, block[1]).any()
            return lax.cond(visible, add, lambda running, *_: running, running, *block), None

        rows = q.shape[:-1]
        start = (
            jnp.full(rows, _UNSEEN, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(q.shape, jnp.float32),
        )
        (_, total, out), _ = lax.scan(step, start, (key_blocks, key_positions))
        return out / jnp.maximum(total, jnp.float32(1e-30))[..., None]


def _cut(held: LayerCache, key_positions: jax.Array) -> tuple[LayerCache, jax.Array]:
    """Keys, values and positions as blocks along a new first axis; missing keys are not seen."""
    length = held.keys.shape[2]
    blocks = math.ceil(length / _KEYS)
    padding = blocks * _KEYS - length

    def cut(x: jax.Array, axis: int) -> jax.Array:
        fill = -1 if x is key_positions else 0
        widths = [(0, padding if a == axis else 0) for a in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(
            x.reshape(*x.shape[:axis], blocks, _KEYS, *x.shape[axis + 1 :]), axis, 0
        )

    return jax.tree.map(lambda x: cut(x, 2), held), cut(key_positions, 1)


def _precision(dtype) -> lax.Precision | None:
    """A GPU would otherwise multiply float32 in 19 bits."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None

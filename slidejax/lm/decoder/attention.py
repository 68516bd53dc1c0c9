"""Causal attention with grouped heads, by positions: no mask is ever an argument.

A query at position p sees the keys at positions p - window + 1 to p. Small products are computed at
once. Larger ones go through blocks of queries and keys with a running softmax (arXiv 2205.14135),
so that 32,768 tokens need no square array. Blocks that no query sees are skipped.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from slidejax.lm.decoder.cache import LayerCache

__all__ = ["attend", "attend_whole"]

# Up to this many scores are computed at once: 256 MiB of float32.
_AT_ONCE = 1 << 26
_QUERIES, _KEYS = 256, 1024  # the sizes of a block
# With so few queries there is nothing to skip that would be worth a loop.
_FEW = 16

# cuDNN takes rows of at least this many tokens.
_WHOLE = 64

# The score of an unseen key. It is finite, so that a query that sees nothing gives no nan.
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
    # A batch that jax.export leaves open counts as one. Open tokens cannot be cut into blocks.
    sizes = (size for size in (batch, heads, tokens, length) if isinstance(size, int))
    fits = math.prod(sizes) <= _AT_ONCE
    is_open = not (isinstance(tokens, int) and isinstance(length, int))
    if is_open or (fits and (tokens <= _FEW or length <= 2 * _KEYS)):
        out = inside.at_once(q, held, query_positions, key_positions)
    else:
        out = inside.by_blocks(q, held, query_positions, key_positions)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, head_dim)
    return out.astype(queries.dtype)


def attend_whole(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    scale: float,
    window: int | None,
) -> jax.Array | None:
    """Attention of whole rows, token i at position i, by cuDNN.

    Args:
      queries: `[batch, tokens, heads, head_dim]`.
      keys, values: `[batch, tokens, kv_heads, head_dim]`.
      scale, window: as in `attend`.

    Returns:
      As `attend`; None where cuDNN does not run: then `attend` does.
    """
    _, tokens, _, head_dim = queries.shape
    if not isinstance(tokens, int):  # jax.export leaves it open
        return None
    sees_all = window is None or window >= tokens
    of_16_bits = queries.dtype in (jnp.bfloat16, jnp.float16) and queries.dtype == keys.dtype
    if tokens < _WHOLE or not sees_all or not of_16_bits:
        return None
    if not _cudnn_attends(queries.dtype.name, head_dim):
        return None
    return jax.nn.dot_product_attention(
        queries, keys, values, scale=scale, is_causal=True, implementation="cudnn"
    )


@functools.cache
def _cudnn_attends(dtype: str, head_dim: int) -> bool:
    """Whether cuDNN's attention of these heads runs on this device. It is tried once."""
    if jax.default_backend() != "gpu":
        return False
    run = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    x = jax.ShapeDtypeStruct((1, _WHOLE, 2, head_dim), dtype)
    try:
        jax.jit(run).lower(x, x, x).compile()
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


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
        if _by_sums(q.shape[3]):
            products = q.astype(jnp.float32) * held.keys[:, :, None].astype(jnp.float32)
            scores = products.sum(-1)[:, :, :, None]
        else:
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
        if _by_sums(weights.shape[3]):
            products = weights[:, :, :, 0, :, None] * held.values[:, :, None].astype(jnp.float32)
            return products.sum(3)[:, :, :, None]
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

        def one(block):
            q, query_positions = block
            return self._over_keys(q, held, query_positions, key_positions)

        out = lax.map(
            one,
            (
                jnp.moveaxis(q.reshape(batch, kv_heads, group, blocks, -1, head_dim), 3, 0),
                jnp.moveaxis(query_positions.reshape(batch, blocks, -1), 1, 0),
            ),
        )
        out = jnp.moveaxis(out, 0, 3).reshape(batch, kv_heads, group, -1, head_dim)
        return out[:, :, :, :tokens]

    def _over_keys(self, q, held: LayerCache, query_positions, key_positions) -> jax.Array:
        """A block of queries with all blocks of keys."""
        size = min(_KEYS, held.keys.shape[2])

        @jax.checkpoint
        def add(running, held, positions):
            top, total, out = running
            scores = self.scores(q, held, query_positions, positions)
            higher = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(top - higher)
            out = out * shrink[..., None] + self.weighted(weights, held, q.dtype)
            return higher, total * shrink + weights.sum(-1), out

        def step(running, index):
            block, positions = _block(held, key_positions, index, size)
            visible = self.seen(query_positions, positions).any()
            skip = lambda running, *_: running  # noqa: E731
            return lax.cond(visible, add, skip, running, block, positions), None

        rows = q.shape[:-1]
        start = (
            jnp.full(rows, _UNSEEN, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(q.shape, jnp.float32),
        )
        blocks = jnp.arange(math.ceil(held.keys.shape[2] / size), dtype=jnp.int32)
        (_, total, out), _ = lax.scan(step, start, blocks)
        return out / jnp.maximum(total, jnp.float32(1e-30))[..., None]


def _block(
    held: LayerCache, key_positions: jax.Array, index: jax.Array, size: int
) -> tuple[LayerCache, jax.Array]:
    """A block of keys, read where they lie. The last one begins earlier, if it would not fit.

    Keys that the block before it has are not seen again.
    """
    length = held.keys.shape[2]
    start = jnp.minimum(index * size, length - size)
    block = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, 2), held)
    positions = lax.dynamic_slice_in_dim(key_positions, start, size, 1)
    new = start + jnp.arange(size, dtype=jnp.int32) >= index * size
    return block, jnp.where(new[None], positions, -1)


def _by_sums(tokens: int) -> bool:
    """Whether products are written as sums: for one token on a CPU.

    XLA's products on a CPU copy the keys to transpose them, and copy a cache that the same step
    writes. Sums are fused with the reading and copy nothing.
    """
    return tokens == 1 and jax.default_backend() == "cpu"


def _precision(dtype) -> lax.Precision | None:
    """A GPU would otherwise multiply float32 in 19 bits."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None

"""A small decoder whose linear layers are exchanged: the whole model of `slidejax bench --model`.

It has what Llama has: RMS norms, rotary embeddings, grouped queries, a gated MLP, an embedding, a
head and a static KV cache. Norms have no weights and linear layers no biases; neither changes the
time of a step. A linear layer is a function `multiply(x [..., in], weights) -> [..., out]`, and all
else is the same on every side.

A decoder's weights are a list with one dictionary for each block, by the names of
`Sizes.linears`. Its caches are a list of (keys, values) `[batch, context, kv_heads, head]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.bench.shapes import Sizes

__all__ = [
    "Attention",
    "Caches",
    "Multiply",
    "attention_here",
    "block",
    "caches",
    "decode",
    "prefill",
]

Multiply = Callable[[jax.Array, Any], jax.Array]
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # of queries, keys, values
Caches = list[tuple[jax.Array, jax.Array]]


def caches(sizes: Sizes, layers: int, batch: int, context: int) -> Caches:
    """Empty caches in bfloat16, for `context` positions of `batch` sequences."""
    shape = (batch, context, sizes.kv_heads, sizes.head)
    return [(jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16)) for _ in range(layers)]


def _norm(x: jax.Array, eps: float) -> jax.Array:
    v = x.astype(jnp.float32)
    return (v * jax.lax.rsqrt((v * v).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def _rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """The rotary embedding of heads `[batch, length, heads, head]` at `positions` `[length]`."""
    width = x.shape[-1]
    angles = positions[:, None, None] * theta ** (-jnp.arange(0, width, 2) / width)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, -1).astype(x.dtype)


def _attend_cached(
    cache: tuple[jax.Array, jax.Array],
    position: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention of one position to all positions of a cache up to it, and the cache with it."""
    keys, values = (
        jax.lax.dynamic_update_slice(old, new, (0, position, 0, 0))
        for old, new in zip(cache, (k, v), strict=True)
    )
    batch, _, heads, width = q.shape
    grouped = q.reshape(batch, k.shape[2], heads // k.shape[2], width)
    scores = jnp.einsum("bhgd,bshd->bhgs", grouped, keys, preferred_element_type=jnp.float32)
    seen = jnp.arange(keys.shape[1]) <= position
    scores = jnp.where(seen, scores * width**-0.5, -1e30)
    out = jnp.einsum("bhgs,bshd->bhgd", jax.nn.softmax(scores, -1).astype(values.dtype), values)
    return out.reshape(q.shape), (keys, values)


def attention_here(note: Callable[[str], None]) -> Attention:
    """Causal attention of a prefill: cuDNN's where it runs, else XLA's.

    Args:
      note: called with a line if a GPU has no attention of cuDNN.
    """

    def causal(implementation: Any) -> Attention:
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=implementation
        )

    if jax.default_backend() != "gpu":
        return causal("xla")
    x = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    try:
        jax.block_until_ready(jax.jit(causal("cudnn"))(x, x, x))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        note(f"prefills use XLA's attention; cuDNN's does not run here: {error}")
        return causal("xla")
    return causal("cudnn")


def block(
    sizes: Sizes,
    multiply: Multiply,
    x: jax.Array,
    weights: dict[str, Any],
    attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
    positions: jax.Array,
) -> tuple[jax.Array, Any]:
    """One block.

    Args:
      sizes: of the decoder.
      multiply: the linear layer.
      x: `[batch, length, hidden]`.
      weights: of the block.
      attend: of rotated queries and keys, and values, `[batch, length, heads, head]`; returns
        their attention, and anything that the caller wants back.
      positions: `[length]`.

    Returns:
      x after the block, and what `attend` wants back.
    """
    batch, length, _ = x.shape
    qkv = multiply(_norm(x, sizes.eps), weights["qkv"]).reshape(batch, length, -1, sizes.head)
    q, k, v = jnp.split(qkv, [sizes.heads, sizes.heads + sizes.kv_heads], axis=2)
    q, k = _rotate(q, positions, sizes.theta), _rotate(k, positions, sizes.theta)
    attended, state = attend(q, k, v)
    x = x + multiply(attended.reshape(batch, length, -1), weights["o"])
    gate, up = jnp.split(multiply(_norm(x, sizes.eps), weights["gate_up"]), 2, -1)
    gated = jax.nn.silu(gate.astype(jnp.float32)).astype(x.dtype) * up
    return x + multiply(gated, weights["down"]), state


def decode(
    sizes: Sizes,
    multiply: Multiply,
    steps: int,
    weights: Sequence[dict[str, Any]],
    ends: tuple[jax.Array, jax.Array],
    filled: Caches,
) -> tuple[jax.Array, Caches]:
    """Decodes `steps` tokens greedily, in a loop, at the last positions of the caches.

    Args:
      sizes: of the decoder.
      multiply: the linear layer.
      steps: at most the positions of the caches.
      weights: of the blocks.
      ends: the embedding and the head, both `[vocabulary, hidden]` in bfloat16.
      filled: the caches. The positions before the last `steps` count as filled.

    Returns:
      The tokens `[steps, batch]`, int32, and the caches. The token before the first one is 0.
    """
    embedding, head = ends
    batch, context = filled[0][0].shape[:2]

    def step(carry: Any, position: jax.Array) -> Any:
        tokens, old = carry
        x = embedding[tokens][:, None]
        new = []
        for w, cache in zip(weights, old, strict=True):
            attend = functools.partial(_attend_cached, cache, position)
            x, cache = block(sizes, multiply, x, w, attend, position[None])
            new.append(cache)
        logits = jax.lax.dot_general(
            _norm(x[:, 0], sizes.eps),
            head,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)
        return (tokens, new), tokens

    start = (jnp.zeros(batch, jnp.int32), filled)
    (_, filled), tokens = jax.lax.scan(step, start, jnp.arange(context - steps, context))
    return tokens, filled


def prefill(
    sizes: Sizes,
    multiply: Multiply,
    attention: Attention,
    weights: Sequence[dict[str, Any]],
    x: jax.Array,
) -> jax.Array:
    """x `[batch, length, hidden]` after all blocks. Nothing is cached, and there is no head."""
    positions = jnp.arange(x.shape[1])
    for w in weights:
        x, _ = block(sizes, multiply, x, w, lambda q, k, v: (attention(q, k, v), None), positions)
    return x

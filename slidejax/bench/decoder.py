"""The whole model of `slidejax bench --model`: the decoder of `slidejax.lm` with random weights.

Every kind of linear layer runs in the same program. A rival's layer takes the place of a packed
weight (`Exchanged`), and so gets every change to attention, cache and head.

A decoder's linear weights are a list with one dictionary for each block, by the names of
`Sizes.linears`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.bench.shapes import Sizes
from slidejax.lm.decoder.apply import apply
from slidejax.lm.decoder.cache import Cache, init_cache
from slidejax.lm.decoder.config import DecoderConfig, Rope
from slidejax.weights.packed import SlideWeight, WrappedWeight

__all__ = ["Exchanged", "Multiply", "caches", "config_of", "decode", "parameters", "prefill"]

Multiply = Callable[[jax.Array, Any], jax.Array]

# Where the products of `Sizes.linears` are among the parameters of `slidejax.lm.decoder.apply`.
_PLACES = {
    "qkv": ("self_attn", "qkv_proj"),
    "o": ("self_attn", "o_proj"),
    "gate_up": ("mlp", "gate_up_proj"),
    "down": ("mlp", "down_proj"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exchanged(WrappedWeight):
    """A linear layer that takes the place of a packed weight without being one.

    Attributes:
      held: what `multiply` takes.
      multiply: `(x [..., in], held) -> [..., out]` in x's dtype. Static.
      sizes: (in, out). Static.
    """

    held: Any
    multiply: Multiply = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def packed(self) -> SlideWeight | None:
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    def check(self, name: str = "w") -> Exchanged:
        return self

    def trained(self) -> Exchanged:
        return dataclasses.replace(self, held=jax.tree.map(lambda leaf: False, self.held))

    def linear(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        *,
        implementation: str | None = None,
        out_dtype: Any = None,
        reduce_axis: Any = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        y = self.multiply(x, self.held)
        y = y if bias is None else y + bias.astype(y.dtype)
        y = y if residual is None else y + residual.astype(y.dtype)
        return y if out_dtype is None else y.astype(out_dtype)


def config_of(sizes: Sizes, layers: int) -> DecoderConfig:
    """The configuration of a decoder with these sizes and a number of blocks."""
    return DecoderConfig(
        model_type="llama",
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_layers=layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head,
        max_positions=1 << 20,
        norm_eps=sizes.eps,
        activation="silu",
        tied=False,
        windows=(None,) * layers,
        ropes=(Rope(sizes.theta),) * layers,
        query_scale=sizes.head**-0.5,
    )


def parameters(
    sizes: Sizes,
    multiply: Multiply | None,
    weights: Sequence[dict[str, Any]],
    ends: tuple[jax.Array, jax.Array],
) -> dict[str, Any]:
    """The parameters of `slidejax.lm.decoder.apply`.

    Args:
      sizes: of the decoder.
      multiply: the linear layer; None if the weights are slidejax's own.
      weights: of the blocks.
      ends: the embedding `[vocabulary, hidden]` and the head `[hidden, vocabulary]`, in bfloat16.
    """
    norm = {"weight": jnp.ones(sizes.hidden, jnp.float32)}

    def block(held: dict[str, Any]) -> dict[str, Any]:
        layer: dict[str, Any] = {"input_layernorm": norm, "post_attention_layernorm": norm}
        for name, (out, inputs) in sizes.linears.items():
            module, place = _PLACES[name]
            kernel = held[name]
            if multiply is not None:
                kernel = Exchanged(kernel, multiply, (inputs, out))
            layer.setdefault(module, {})[place] = {"kernel": kernel}
        return layer

    embedding, head = ends
    return {
        "model": {
            "embed_tokens": {"embedding": embedding},
            "layers": {str(i): block(held) for i, held in enumerate(weights)},
            "norm": norm,
        },
        "lm_head": {"kernel": head},
    }


def caches(config: DecoderConfig, batch: int, context: int) -> Cache:
    """Empty caches in bfloat16, for `context` positions of `batch` sequences."""
    return init_cache(config, batch, context)


def decode(
    config: DecoderConfig, steps: int, params: dict[str, Any], filled: Cache
) -> tuple[jax.Array, Cache]:
    """Decodes `steps` tokens greedily, in a loop, at the last positions of the caches.

    Args:
      config: of the decoder.
      steps: at most the positions of the caches.
      params: what `parameters` made.
      filled: the caches. The positions before the last `steps` count as filled.

    Returns:
      The tokens `[steps, batch]`, int32, and the caches. The token before the first one is 0.
    """
    batch, _, context, _ = filled[0].keys.shape

    def step(carry: Any, position: jax.Array) -> Any:
        tokens, cache = carry
        at = jnp.full((batch, 1), position, jnp.int32)
        logits, cache = apply(config, params, tokens[:, None], at, cache, last=True)
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)
        return (tokens, cache), tokens

    start = (jnp.zeros(batch, jnp.int32), filled)
    at = jnp.arange(context - steps, context, dtype=jnp.int32)
    (_, filled), tokens = jax.lax.scan(step, start, at)
    return tokens, filled


def prefill(config: DecoderConfig, params: dict[str, Any], ids: jax.Array) -> jax.Array:
    """The logits `[batch, vocab]` behind ids `[batch, length]`. Nothing is cached."""
    return apply(config, params, ids, last=True)[0]

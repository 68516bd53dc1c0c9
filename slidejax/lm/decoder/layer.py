"""One layer of the decoder, and the parts that it is made of.

`slidejax.lm.decoder.apply` names the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from slidejax.contraction import Contraction
from slidejax.functional import show_input, show_output, watched
from slidejax.lm.decoder.attention import attend, attend_whole
from slidejax.lm.decoder.cache import LayerCache
from slidejax.lm.decoder.config import DecoderConfig, Rope
from slidejax.ops.chain import Stage, linear_chain
from slidejax.ops.decode_attention import decode_attention
from slidejax.ops.implementations import decode, hopper
from slidejax.ops.linear import linear
from slidejax.ops.prologue import GLU, Prologue, RMSNorm
from slidejax.weights.numerics import of_rank
from slidejax.weights.packed import LinearWeight, SlideWeight

__all__ = ["Layer", "chain_kernels", "columns", "dot", "rms_norm", "turns_at"]

# A step of at most this many rows computes what lies between two attentions as a chain. With
# prepared weights more rows are faster one layer after the other.
CHAINED_ROWS = 4
_CHAINED_PREPARED_ROWS = 2
# So does a step of as many rows as these, where the products are those of the Hopper kernel.
HOPPER_CHAINED_ROWS = range(3, 257)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation (arXiv 1910.07467), in float32, rounded once."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    wide = wide * lax.rsqrt(mean + jnp.float32(eps))
    return (wide * of_rank(weight.astype(jnp.float32), x.ndim)).astype(x.dtype)


def turns_at(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 `[batch, tokens, 1, head_dim / 2]`."""
    frequencies = jnp.asarray(rope.frequencies(head_dim))
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _turn(x: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs of channels of `[batch, tokens, heads, head_dim]`."""
    cos, sin = turns
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _product(x: jax.Array, kernel: Any, bias: Any, implementation: str | None) -> jax.Array:
    """`x @ kernel + bias` in the dtype of x."""
    if isinstance(kernel, LinearWeight):
        return linear(x, kernel, bias, implementation)
    y = columns(x, kernel)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def columns(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` in float32. A CPU takes a kernel of float32 as it is (`fuse.serving`)."""
    if kernel.dtype == jnp.float32 and jax.default_backend() == "cpu":
        x = x.astype(jnp.float32)
    return dot(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def dot(x: jax.Array, kernel: jax.Array, dimensions: Any) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, kernel, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def chain_kernels(params: Mapping[str, Any]) -> list[SlideWeight] | None:
    """The kernels of the chain that lies between two attentions, from the parameters of a layer.

    None if it is no chain: some are no packed weights of fused projections, or the outputs of
    attention and MLP are normalised.
    """
    projections = [("self_attn", "qkv_proj"), ("self_attn", "o_proj")]
    projections += [("mlp", "gate_up_proj"), ("mlp", "down_proj")]
    kernels = [params[module].get(name, {}).get("kernel") for module, name in projections]
    if "post_feedforward_layernorm" in params:
        return None
    return kernels if all(isinstance(kernel, SlideWeight) for kernel in kernels) else None


class Layer:
    """One layer: attention and a gated MLP, each added to the residual stream."""

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        params: Mapping,
        implementation: str | None,
        whole: bool,
    ):
        self.config, self.params = config, params
        self.implementation, self.whole = implementation, whole
        self.path, self.window = f"model/layers/{index}", config.windows[index]

    def __call__(
        self, x: jax.Array, positions: jax.Array, turns: Any, held: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        y, held = self._attention(self._norm("input_layernorm", x), positions, turns, held)
        if self.config.sandwich_norm:
            x = x + self._norm("post_attention_layernorm", y)
            y = self._mlp(self._norm("pre_feedforward_layernorm", x))
            return x + self._norm("post_feedforward_layernorm", y), held
        x = x + y
        return x + self._mlp(self._norm("post_attention_layernorm", x)), held

    def chains(self, x: jax.Array) -> bool:
        """Whether the layers of a decoding step follow each other in chains."""
        kernels = chain_kernels(self.params)
        rows, tokens = x.shape[:2]
        if not (isinstance(rows, int) and isinstance(tokens, int)):  # jax.export may leave it open
            return False
        if tokens > 1 or kernels is None or watched():
            return False
        if rows in HOPPER_CHAINED_ROWS and all(hopper.may_chain(k, rows) for k in kernels):
            return True
        prepared = any(kernel.prepared for kernel in kernels)
        if not prepared and all(
            decode.is_small(rows, k.in_features, k.pattern, k.dtype) for k in kernels
        ):
            return True
        return rows <= (min(_CHAINED_PREPARED_ROWS, CHAINED_ROWS) if prepared else CHAINED_ROWS)

    def step(self, x, positions, turns, held, qkv, following: Layer | None):
        """One token of each row. What lies between two attentions is one chain.

        Args:
          x: `[batch, 1, hidden]`.
          positions, turns, held: as of `__call__`.
          qkv: queries, keys and values, if the layer before has computed them; or None.
          following: the next layer, or None.

        Returns:
          x after the layer, the cache, and queries, keys and values of the next layer or None.
        """
        if qkv is None:
            (qkv,) = linear_chain(x, [self._qkv_stage()], implementation=self.implementation)
        y, held = self._attend_fused(qkv, positions, turns, held)
        stages = [
            self._stage("self_attn", "o_proj", residual=x),
            self._stage("mlp", "gate_up_proj", self._prologue("post_attention_layernorm")),
            self._stage("mlp", "down_proj", GLU(activation=self.config.activation), residual=0),
        ]
        if following is None or not following.chains(x):
            (x,) = linear_chain(y, stages, implementation=self.implementation)
            return x, held, None
        stages.append(following._qkv_stage())
        x, qkv = linear_chain(y, stages, (2, 3), self.implementation)
        return x, held, qkv

    def _qkv_stage(self) -> Stage:
        return self._stage("self_attn", "qkv_proj", self._prologue("input_layernorm"))

    def _prologue(self, norm: str) -> RMSNorm:
        return RMSNorm(self.params[norm]["weight"], self.config.norm_eps)

    def _stage(
        self, module: str, name: str, prologue: Prologue | None = None, residual: Any = None
    ) -> Stage:
        layer = self.params[module][name]
        return Stage(layer["kernel"], layer.get("bias"), prologue, residual)

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.params[name]["weight"], self.config.norm_eps)

    def _linear(self, module: str, name: str, x: jax.Array) -> jax.Array:
        path = f"{self.path}/{module}/{name}/kernel"
        layer = self.params[module][name]
        x = show_input(path, x, Contraction.dense(x.ndim))
        y = _product(x, layer["kernel"], layer.get("bias"), self.implementation)
        return show_output(path, y)

    def _attention(self, x, positions, turns, held):
        if "qkv_proj" in self.params["self_attn"]:
            y, held = self._attend_fused(
                self._linear("self_attn", "qkv_proj", x), positions, turns, held
            )
        else:
            q, k, v = (
                self._linear("self_attn", name, x) for name in ("q_proj", "k_proj", "v_proj")
            )
            y, held = self._attend(None, q, k, v, positions, turns, held)
        return self._linear("self_attn", "o_proj", y), held

    def _attend_fused(self, qkv, positions, turns, held):
        ends = (self.config.q_size, self.config.q_size + self.config.kv_size)
        q, k, v = jnp.split(qkv, ends, axis=-1)
        return self._attend(qkv, q, k, v, positions, turns, held)

    def _attend(self, qkv, q, k, v, positions, turns, held):
        """Attention `[batch, tokens, q_size]`, and the cache. qkv holds q, k and v, or is None."""
        config, params = self.config, self.params["self_attn"]
        q, k, v = (self._heads(y) for y in (q, k, v))
        if config.qk_norm:
            q = rms_norm(q, params["q_norm"]["weight"], config.norm_eps)
            k = rms_norm(k, params["k_norm"]["weight"], config.norm_eps)
        if held is not None and held.key_scales is None and q.shape[1] == 1:
            if qkv is not None and not config.qk_norm:
                y, held = self._attend_one(self._heads(qkv), None, None, positions, turns, held)
            else:
                y, held = self._attend_one(q, k, v, positions, turns, held)
        else:
            y, held = self._attend_many(q, k, v, positions, turns, held)
        return y.reshape(*q.shape[:2], config.q_size), held

    def _heads(self, x: jax.Array) -> jax.Array:
        """`[batch, tokens, heads, head_dim]`."""
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)

    def _attend_one(self, q, k, v, positions, turns, held):
        """One token of each row: the rotation, the cache and the attention are one op.

        Without k and v, q holds all three.
        """
        cosines, sines = turns
        attended = decode_attention(
            q[:, 0],
            None if k is None else k[:, 0],
            None if v is None else v[:, 0],
            held.keys,
            held.values,
            positions[:, 0],
            (cosines[:, 0, 0], sines[:, 0, 0]),
            scale=self.config.query_scale,
            window=self.window,
        )
        return attended.y, LayerCache(attended.keys, attended.values)

    def _attend_many(self, q, k, v, positions, turns, held):
        q, k = _turn(q, turns), _turn(k, turns)
        scale = self.config.query_scale
        if self.whole and (held is None or held.key_scales is None):
            y = attend_whole(q, k, v, scale=scale, window=self.window)
            if y is not None:
                return y, None if held is None else held.add(k, v, positions, self.window)[2]
        if held is None:
            seen, slots = LayerCache(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)), positions
        else:
            seen, slots, held = held.add(k, v, positions, self.window)
        return attend(q, seen, positions, slots, scale=scale, window=self.window), held

    def _mlp(self, x: jax.Array) -> jax.Array:
        if "gate_up_proj" in self.params["mlp"]:
            both = self._linear("mlp", "gate_up_proj", x)
            down = self.params["mlp"]["down_proj"]
            if _gates_in_the_lift(both, down["kernel"]):
                gated = GLU(activation=self.config.activation)
                bias = down.get("bias")
                return linear(both, down["kernel"], bias, self.implementation, prologue=gated)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate, up = self._linear("mlp", "gate_proj", x), self._linear("mlp", "up_proj", x)
        return self._linear("mlp", "down_proj", _activation(self.config.activation, gate) * up)


# With fewer rows XLA's fused gate costs less than what the lift does for one.
_LIFTED_ROWS = 256


def _gates_in_the_lift(x: jax.Array, kernel: Any) -> bool:
    """Whether the lift of `down` computes the gate. Calibration wants to see its result."""
    rows = x.shape[0] * x.shape[1]
    many = not isinstance(rows, int) or rows >= _LIFTED_ROWS  # jax.export may leave it open
    return isinstance(kernel, SlideWeight) and many and not watched()


def _activation(name: str, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    y = jax.nn.silu(wide) if name == "silu" else jax.nn.gelu(wide, approximate=True)
    return y.astype(x.dtype)

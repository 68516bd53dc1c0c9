"""The decoder as a pure function: `apply(config, params, ids, positions, cache)`.

Parameters are nested dicts with the names of Hugging Face's Llama:

    model/embed_tokens/embedding                           [vocab, hidden]
    model/layers/0/input_layernorm/weight                  [hidden], float32
    model/layers/0/self_attn/{q,k,v,o}_proj/kernel, bias   [in, out], [out]
    model/layers/0/self_attn/{q,k}_norm/weight             [head_dim], float32
    model/layers/0/post_attention_layernorm/weight
    model/layers/0/{pre,post}_feedforward_layernorm/weight
    model/layers/0/mlp/{gate,up,down}_proj/kernel, bias
    model/norm/weight
    lm_head/kernel                                         [hidden, vocab]; absent when tied

A kernel is an array, or a weight that `slidejax.linear` multiplies with. The dtype of the embedding
is the one that the decoder computes in. In place of q, k and v there may be one `qkv_proj`, and in
place of gate and up one `gate_up_proj` (`slidejax.lm.decoder.fuse`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from slidejax.contraction import Contraction
from slidejax.functional import show_input, show_output, watched
from slidejax.lm.decoder.attention import attend, attend_whole
from slidejax.lm.decoder.cache import Cache, LayerCache
from slidejax.lm.decoder.config import DecoderConfig, Rope
from slidejax.ops.chain import Stage, linear_chain
from slidejax.ops.decode_attention import decode_attention
from slidejax.ops.implementations import hopper
from slidejax.ops.linear import linear
from slidejax.ops.primitive import as_array
from slidejax.ops.prologue import GLU, Prologue, RMSNorm
from slidejax.weights.numerics import of_rank
from slidejax.weights.packed import LinearWeight, SlideWeight

__all__ = ["CHAINED_ROWS", "apply", "outputs"]

# A step of at most this many rows computes what lies between two attentions as a chain. With
# prepared weights more rows are faster one layer after the other.
CHAINED_ROWS = 4
_CHAINED_PREPARED_ROWS = 2
# So does a step of as many rows as these, where the products are those of the Hopper kernel.
HOPPER_CHAINED_ROWS = range(5, 257)


def apply(
    config: DecoderConfig,
    params: Mapping[str, Any],
    ids: jax.Array,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
    *,
    last: bool = False,
    whole: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Logits of the next tokens.

    With a cache the keys and values of the tokens are written to it first, and each token then sees
    the slots up to its own position. Without one the tokens see each other. Rows do not depend on
    each other.

    Args:
      config: the decoder's configuration. Static.
      params: nested dicts, see this module.
      ids: int32 `[batch, tokens]`. An id outside the vocabulary gives no error here; the logits of
        its row are nan.
      positions: int32 `[batch, tokens]`: the position of each token in its row, from 0. -1 marks
        padding, on any side: it is not written and nobody sees it, and its logits have no meaning.
        The positions of a row must be without gaps, over all calls with one cache, and never go
        back. None means that each row is whole: 0, 1, 2 and so on.
      cache: what `init_cache` made, or an earlier call returned; or None. A position beyond its
        length is not written, but in a layer that has as many slots as its window.
      last: whether to give the logits of the last token of each row only.
      whole: says that token i of each row is at position i, or is padding behind the row's tokens.
        It is not checked. The tokens then see each other alone, and a GPU attends by cuDNN where it
        can. Without positions it is always so.
      implementation: as in `slidejax.linear`.

    Returns:
      `(logits, cache)`: float32 `[batch, tokens, vocab]`, or `[batch, vocab]` with `last`; and the
      cache with the tokens in it, or None.

    Raises:
      ValueError: if ids or positions are no integer matrices of one shape, the cache has other
        rows, layers or sizes, or without positions ids are longer than the cache.
      TypeError: if one of them is no array, or the cache is none.

    The right padding of a batch does not change its rows:

    >>> from slidejax.lm.decoder.examples import tiny
    >>> model = tiny()
    >>> ids = jnp.array([[3, 4, 5], [6, 7, 0]])
    >>> positions = jnp.array([[0, 1, 2], [0, 1, -1]])
    >>> logits, _ = apply(model.config, model.params, ids, positions, last=True)
    >>> alone, _ = apply(model.config, model.params, ids[1:, :2], last=True)
    >>> bool(jnp.allclose(logits[1], alone[0], atol=1e-6))
    True
    """
    whole = whole or positions is None
    ids, positions = _check(config, ids, positions, cache)
    states, written = _states(config, params, ids, positions, cache, implementation, whole)
    x = states[-1]
    if last:
        x = jnp.take_along_axis(x, jnp.argmax(positions, axis=1)[:, None, None], axis=1)
    x = _rms_norm(x, params["model"]["norm"]["weight"], config.norm_eps)
    logits = _head(config, params, x, implementation)
    return logits[:, 0] if last else logits, written


def outputs(
    config: DecoderConfig, params: Mapping[str, Any], ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Logits and what is between the layers, for distillation.

    Args:
      config, params, ids: as in `apply`.

    Returns:
      `(logits, states)`: float32 `[batch, tokens, vocab]`; and, each `[batch, tokens, hidden]`, the
      embeddings and the residual stream after each layer. The last one is normalised.
    """
    ids, positions = _check(config, ids, None, None)
    states, _ = _states(config, params, ids, positions, None, None, True)
    states[-1] = _rms_norm(states[-1], params["model"]["norm"]["weight"], config.norm_eps)
    return _head(config, params, states[-1], None), tuple(states)


def _states(
    config: DecoderConfig,
    params: Mapping[str, Any],
    ids: jax.Array,
    positions: jax.Array,
    cache: Cache | None,
    implementation: str | None,
    whole: bool,
) -> tuple[list[jax.Array], Cache | None]:
    """The residual stream before the first layer and after each; and the cache.

    `whole` says that token i of every row is at position i.
    """
    body = params["model"]
    embedding = body["embed_tokens"]["embedding"]
    # Padding may have any id. Elsewhere one that is not there must be seen: its logits are nan.
    known = jnp.where(ids < 0, embedding.shape[0], ids)
    known = jnp.where(positions < 0, 0, known)
    x = _rows_of(embedding, known, generates=cache is not None)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    turns = {rope: _turns(rope, config.head_dim, positions) for rope in dict.fromkeys(config.ropes)}
    layers = [
        _Layer(config, i, body["layers"][str(i)], implementation, whole)
        for i in range(config.num_layers)
    ]
    states, written, qkv = [x], [], None
    for i, layer in enumerate(layers):
        held = None if cache is None else cache[i]
        following = layers[i + 1] if i + 1 < len(layers) else None
        if held is not None and layer.chains(x):
            x, held, qkv = layer.step(x, positions, turns[config.ropes[i]], held, qkv, following)
        else:
            x, held = layer(x, positions, turns[config.ropes[i]], held)
        states.append(x)
        if held is not None:
            written.append(held)
    return states, None if cache is None else tuple(written)


def _rows_of(embedding: jax.Array, ids: jax.Array, *, generates: bool) -> jax.Array:
    """The embeddings of tokens; nan for one that is not there."""
    if generates and embedding.dtype.itemsize == 2 and jax.default_backend() == "cpu":
        # XLA's CPU would turn the whole embedding into float32 to take some rows of 16-bit floats.
        nan = int(np.asarray(np.nan, embedding.dtype).view(np.uint16))
        bits = lax.bitcast_convert_type(embedding, jnp.uint16)
        rows = jnp.take(bits, ids, axis=0, mode="fill", fill_value=nan)
        return lax.bitcast_convert_type(rows, embedding.dtype)
    return jnp.take(embedding, ids, axis=0, mode="fill", fill_value=jnp.nan)


def _check(config: DecoderConfig, ids, positions, cache) -> tuple[jax.Array, jax.Array]:
    ids = as_array(_known(ids, config.vocab_size), "ids")
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"ids must be integers [batch, tokens], at least one, got {ids.dtype} of shape "
            f"{ids.shape}"
        )
    _check_cache(config, ids, positions, cache)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    positions = as_array(_known(positions, 2**31 - 1), "positions")
    if positions.shape != ids.shape or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(
            f"positions must be integers of the shape of ids, {ids.shape}, got {positions.dtype} "
            f"of shape {positions.shape}"
        )
    return _int32(ids, config.vocab_size), _int32(positions, 2**31 - 1)


def _known(values: Any, end: int) -> Any:
    """NumPy's 64-bit integers, of which JAX takes 32 bits only: outside 0 to `end` they are -1."""
    if not isinstance(values, np.ndarray) or values.dtype not in (np.int64, np.uint64, np.uint32):
        return values
    return np.where((values >= 0) & (values < end), values, -1).astype(np.int32)


def _int32(values: jax.Array, end: int) -> jax.Array:
    """Integers as int32. Wider ones do not wrap around: outside 0 to `end` they become -1."""
    narrow = values.astype(jnp.int32)
    if values.dtype.itemsize < 4 or values.dtype == jnp.int32:
        return narrow
    return jnp.where((values >= 0) & (values < end), narrow, -1)


def _check_cache(config: DecoderConfig, ids: jax.Array, positions, cache) -> None:
    if cache is None:
        return
    if not isinstance(cache, (tuple, list)) or not all(isinstance(c, LayerCache) for c in cache):
        raise TypeError(
            f"cache must be what init_cache made, a LayerCache for each layer, "
            f"got {type(cache).__name__}"
        )
    found = [layer.keys.shape for layer in cache]
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
    whole = any(shape[2] != window for shape, window in zip(found, config.windows, strict=True))
    if positions is None and whole and ids.shape[1] > length:
        raise ValueError(
            f"ids must be at most as long as the cache, {length} positions, got {ids.shape[1]} "
            "tokens"
        )


# --- the parts ------------------------------------------------------------------------------------


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation (arXiv 1910.07467), in float32, rounded once."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    wide = wide * lax.rsqrt(mean + jnp.float32(eps))
    return (wide * of_rank(weight.astype(jnp.float32), x.ndim)).astype(x.dtype)


def _turns(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
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
    y = _columns(x, kernel)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def _columns(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` in float32. A CPU takes a kernel of float32 as it is (`fuse.serving`)."""
    if kernel.dtype == jnp.float32 and jax.default_backend() == "cpu":
        x = x.astype(jnp.float32)
    return _dot(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def _dot(x: jax.Array, kernel: jax.Array, dimensions: Any) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, kernel, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _head(config, params, x, implementation) -> jax.Array:
    """Float32 logits; a tied head reads the embedding as it lies."""
    path = "lm_head/kernel"
    if "lm_head" not in params:
        embedding = params["model"]["embed_tokens"]["embedding"]
        return _dot(x, embedding, (((x.ndim - 1,), (1,)), ((), ())))
    kernel = params["lm_head"]["kernel"]
    x = show_input(path, x, Contraction.dense(x.ndim))
    if isinstance(kernel, LinearWeight):
        y = linear(x, kernel, None, implementation, out_dtype=jnp.float32)
    else:
        y = _columns(x, kernel)
    return show_output(path, y)


class _Layer:
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
        projections = [("self_attn", "qkv_proj"), ("self_attn", "o_proj")]
        projections += [("mlp", "gate_up_proj"), ("mlp", "down_proj")]
        kernels = [self.params[module].get(name, {}).get("kernel") for module, name in projections]
        if x.shape[1] > 1 or self.config.sandwich_norm or watched():
            return False
        if not all(isinstance(kernel, SlideWeight) for kernel in kernels):
            return False
        if x.shape[0] in HOPPER_CHAINED_ROWS:
            return all(hopper.may_chain(kernel, x.shape[0]) for kernel in kernels)
        prepared = any(kernel.prepared for kernel in kernels)
        return x.shape[0] <= (
            min(_CHAINED_PREPARED_ROWS, CHAINED_ROWS) if prepared else CHAINED_ROWS
        )

    def step(self, x, positions, turns, held, qkv, following: _Layer | None):
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
        return _rms_norm(x, self.params[name]["weight"], self.config.norm_eps)

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
            q = _rms_norm(q, params["q_norm"]["weight"], config.norm_eps)
            k = _rms_norm(k, params["k_norm"]["weight"], config.norm_eps)
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
    return isinstance(kernel, SlideWeight) and rows >= _LIFTED_ROWS and not watched()


def _activation(name: str, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    y = jax.nn.silu(wide) if name == "silu" else jax.nn.gelu(wide, approximate=True)
    return y.astype(x.dtype)

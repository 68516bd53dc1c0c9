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

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from slidejax.contraction import Contraction
from slidejax.functional import show_input, show_output, watched
from slidejax.kinds import check_flag
from slidejax.lm.decoder.cache import Cache
from slidejax.lm.decoder.config import DecoderConfig, check_config
from slidejax.lm.decoder.inputs import check_inputs
from slidejax.lm.decoder.layer import Layer, columns, dot, rms_norm, turns_at
from slidejax.lm.decoder.params import check_params, check_tree
from slidejax.ops.linear import linear
from slidejax.ops.registry import check_name as check_implementation
from slidejax.ops.sharding import product_spec, with_automatic_axes
from slidejax.weights.packed import LinearWeight

__all__ = ["apply", "outputs"]


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
        back. One beyond the cache or the model's context is an error where positions are known.
        Under a trace it gives nan as the logits of its row. None means that each row is whole:
        0, 1, 2 and so on.
      cache: what `init_cache` made, or an earlier call returned; or None. A position beyond its
        length is not written, but in a layer that has as many slots as its window.
      last: whether to give the logits of the last token of each row only.
      whole: says that token i of each row is at position i, or is padding behind the row's tokens.
        It is not checked under a trace. The tokens then see each other alone, and a GPU attends by
        cuDNN where it can. Without positions it is always so.
      implementation: as in `slidejax.linear`.

    Returns:
      `(logits, cache)`: float32 `[batch, tokens, vocab]`, or `[batch, vocab]` with `last`; and the
      cache with the tokens in it, or None.

    Raises:
      ValueError: if ids or positions are no integer matrices of one shape, the cache has other
        rows, layers or sizes, or ids are longer than the cache or the context; if positions that
        are known are out of range; or naming the paths, if parameters are missing, unknown, or of
        other shapes than the configuration says.
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
    check_config(config)
    check_tree(params)
    whole = check_flag(whole, "whole") or positions is None
    last = check_flag(last, "last")
    check_implementation(implementation)
    check_params(config, params, layouts=True)
    ids, positions = check_inputs(config, ids, positions, cache, whole)
    cache = None if cache is None else tuple(jax.tree.map(jnp.asarray, layer) for layer in cache)

    def run(params, ids, positions, cache):
        states, written = _states(config, params, ids, positions, cache, implementation, whole)
        x = states[-1]
        if last:
            x = jnp.take_along_axis(x, jnp.argmax(positions, axis=1)[:, None, None], axis=1)
        x = rms_norm(x, params["model"]["norm"]["weight"], config.norm_eps)
        logits = _head(config, params, x, implementation)
        return logits[:, 0] if last else logits, written

    def results(params, ids, positions, cache):
        rows, *rest, vocab = _logits_spec(params, ids)
        return P(rows, *([] if last else rest), vocab), _specs(cache)

    return _on_any_mesh(run, results, params, ids, positions, cache)


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
    check_config(config)
    check_tree(params)
    check_params(config, params, layouts=True)
    ids, positions = check_inputs(config, ids, None, None, True)

    def run(params, ids, positions):
        states, _ = _states(config, params, ids, positions, None, None, True)
        states[-1] = rms_norm(states[-1], params["model"]["norm"]["weight"], config.norm_eps)
        return _head(config, params, states[-1], None), tuple(states)

    def results(params, ids, positions):
        return _logits_spec(params, ids), (P(*ids, None),) * (config.num_layers + 1)

    return _on_any_mesh(run, results, params, ids, positions)


# --- explicit mesh axes ---------------------------------------------------------------------------


def _on_any_mesh(run: Callable, results: Callable, *operands: Any) -> Any:
    """Calls `run(*operands)`. Explicit mesh axes are taken as automatic ones in between.

    `results` makes the `PartitionSpec`s of what it returns, from trees like the operands that have
    the entries of a spec in the place of each leaf.
    """
    if watched():  # what layers show has the types of the code around
        return run(*operands)
    leaves, tree = jax.tree.flatten(operands)
    return with_automatic_axes(
        lambda *leaves: run(*jax.tree.unflatten(tree, leaves)),
        leaves,
        lambda *specs: results(*jax.tree.unflatten(tree, specs)),
    )


def _logits_spec(params: Any, ids: tuple) -> P:
    """Rows lie as the ids do, and the vocabulary as the output embedding does."""
    if "lm_head" not in params:
        return product_spec((*ids, None), params["model"]["embed_tokens"]["embedding"][0])
    kernel = params["lm_head"]["kernel"]
    packed = isinstance(kernel, LinearWeight)
    vocab = jax.tree.leaves(kernel, is_leaf=_is_spec)[0][0] if packed else kernel[1]
    return product_spec((*ids, None), vocab)


def _specs(tree: Any) -> Any:
    return jax.tree.map(lambda spec: P(*spec), tree, is_leaf=_is_spec)


def _is_spec(node: Any) -> bool:
    """Whether a node is a result of `spec_of`."""
    return type(node) is tuple and all(type(e) in (str, tuple, type(None)) for e in node)


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
    turns = {
        rope: turns_at(rope, config.head_dim, positions) for rope in dict.fromkeys(config.ropes)
    }
    layers = [
        Layer(config, i, body["layers"][str(i)], implementation, whole)
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


# --- the output embedding -------------------------------------------------------------------------


def _head(config, params, x, implementation) -> jax.Array:
    """Float32 logits; a tied head reads the embedding as it lies."""
    path = "lm_head/kernel"
    if "lm_head" not in params:
        embedding = params["model"]["embed_tokens"]["embedding"]
        return dot(x, embedding, (((x.ndim - 1,), (1,)), ((), ())))
    kernel = params["lm_head"]["kernel"]
    x = show_input(path, x, Contraction.dense(x.ndim))
    if isinstance(kernel, LinearWeight):
        y = linear(x, kernel, None, implementation, out_dtype=jnp.float32)
    else:
        y = columns(x, kernel)
    return show_output(path, y)

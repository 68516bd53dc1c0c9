"""The names of a decoder's parameters in files, and how a tensor becomes a parameter.

Paths are those of `slidejax.lm.decoder.apply`. PyTorch keeps a linear layer's weight as
`[out, in]`; here a kernel is `[in, out]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.weights.numerics import all_finite

__all__ = ["gguf_name", "parameter", "safetensors_name", "tree_of"]

_GGUF = {
    "self_attn/q_proj": "attn_q",
    "self_attn/k_proj": "attn_k",
    "self_attn/v_proj": "attn_v",
    "self_attn/o_proj": "attn_output",
    "self_attn/q_norm": "attn_q_norm",
    "self_attn/k_norm": "attn_k_norm",
    "mlp/gate_proj": "ffn_gate",
    "mlp/up_proj": "ffn_up",
    "mlp/down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_SANDWICH = {
    **_GGUF,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GGUF_OUTSIDE = {
    "model/embed_tokens/embedding": "token_embd.weight",
    "model/norm/weight": "output_norm.weight",
    "lm_head/kernel": "output.weight",
}


def safetensors_name(path: str) -> str:
    """The name of a parameter in Hugging Face's files.

    >>> safetensors_name("model/layers/0/mlp/up_proj/kernel")
    'model.layers.0.mlp.up_proj.weight'
    """
    *module, kind = path.split("/")
    return ".".join([*module, "bias" if kind == "bias" else "weight"])


def gguf_name(path: str, sandwich_norm: bool) -> str:
    """The name of a parameter in a GGUF file.

    >>> gguf_name("model/layers/0/mlp/up_proj/kernel", sandwich_norm=False)
    'blk.0.ffn_up.weight'
    """
    if path in _GGUF_OUTSIDE:
        return _GGUF_OUTSIDE[path]
    _, _, layer, *module, kind = path.split("/")
    names = _GGUF_SANDWICH if sandwich_norm else _GGUF
    return f"blk.{layer}.{names['/'.join(module)]}.{'bias' if kind == 'bias' else 'weight'}"


def parameter(path: str, tensor: np.ndarray, dtype: Any) -> jax.Array:
    """A floating tensor of a file as a parameter: kernels transposed, norms in float32.

    Raises:
      ValueError: naming the parameter, if it has nan or infinite values, or values that are too
        large for the dtype.
    """
    value = _parameter(path, tensor, dtype)
    if not bool(all_finite(value)):
        if bool(all_finite(tensor)):
            raise ValueError(
                f"{path!r} has values that are too large for dtype {value.dtype.name}: "
                "take bfloat16 or float32"
            )
        raise ValueError(f"{path!r} has values that are nan or infinite: the file is damaged")
    return value


def _parameter(path: str, tensor: np.ndarray, dtype: Any) -> jax.Array:
    # JAX may go on using NumPy's memory, and this can be the file itself: so it is copied.
    if path.endswith("/weight"):
        return jnp.array(tensor, jnp.float32)
    with np.errstate(over="ignore"):  # `parameter` looks at the result
        value = jnp.array(np.asarray(tensor, dtype))
    return value.T if path.endswith("/kernel") else value  # JAX transposes faster than NumPy


def tree_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from '/'-joined paths.

    >>> tree_of({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree

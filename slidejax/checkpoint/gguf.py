"""Reading a Llama-type GGUF file: its configuration, its weights as Flax parameters and its tokenizer.

GGUF is llama.cpp's one-file format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Block-quantised
tensors are dequantised to float32 by the ``gguf`` package. Two things differ from Hugging Face's layout:

* llama.cpp rotates neighbouring rows (2i, 2i+1) where Hugging Face rotates rows (i, i + dim/2), so the rows of q and k
  are stored interleaved; :func:`_deinterleave` puts them back.
* a model with tied embeddings has no ``output.weight``: the head is the transposed embedding.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

__all__ = ["read_gguf", "read_gguf_tokenizer"]

# llama.cpp token types: 3 is "control", 4 is "user defined"; both are matched whole, before any byte-pair merge.
_CONTROL, _USER_DEFINED = 3, 4

# How each of llama.cpp's named pre-tokenizers cuts text before the merges: whether digits are split one by one.
_PRE_TOKENIZERS = {"gpt-2": False, "default": False, "smollm": True}


def _open(path: str | os.PathLike[str]) -> Any:
    try:
        import gguf
    except ImportError as e:
        raise ImportError("reading a GGUF file needs the package 'gguf': pip install 'slidejax[huggingface]'") from e
    if not os.path.isfile(path):
        raise ValueError(f"no GGUF file at {os.fspath(path)!r}")
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{os.fspath(path)!r} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    try:
        return gguf.GGUFReader(path)
    except Exception as e:  # the reader indexes into a memory map: a cut-off file surfaces as almost any exception
        raise ValueError(f"{os.fspath(path)!r} is damaged or cut short: {e}") from e


class _Fields:
    """The key-value part of a GGUF file, with errors that name the file and the key."""

    def __init__(self, reader: Any, path: str | os.PathLike[str]):
        self._fields, self._path = reader.fields, os.fspath(path)

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        if key not in self._fields:
            raise ValueError(f"{self._path!r} has no key {key!r}")
        return self._fields[key].contents()


def _config(fields: _Fields, tied: bool, path: str) -> LlamaConfig:
    from transformers import LlamaConfig

    architecture = fields.require("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path!r} holds a model of architecture {architecture!r}; only 'llama' can be read")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise NotImplementedError(f"{path!r} scales its rotary positions ({scaling!r}), which FlaxLlama cannot do")
    vocab_size = fields.get("llama.vocab_size") or len(fields.require("tokenizer.ggml.tokens"))
    heads = int(fields.require("llama.attention.head_count"))
    hidden = int(fields.require("llama.embedding_length"))
    rope_dim = int(fields.get("llama.rope.dimension_count", hidden // heads))
    if rope_dim * heads != hidden:
        raise NotImplementedError(
            f"{path!r}: head size {rope_dim} times {heads} heads is not the hidden size {hidden}, "
            "which FlaxLlama takes for granted"
        )
    return LlamaConfig(
        vocab_size=int(vocab_size),
        hidden_size=hidden,
        intermediate_size=int(fields.require("llama.feed_forward_length")),
        num_hidden_layers=int(fields.require("llama.block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(fields.get("llama.attention.head_count_kv", heads)),
        max_position_embeddings=int(fields.require("llama.context_length")),
        # stored in float32; the shortest decimal that rounds to the same float32 is what the model card says (1e-05)
        rms_norm_eps=float(str(np.float32(fields.require("llama.attention.layer_norm_rms_epsilon")))),
        rope_theta=float(fields.get("llama.rope.freq_base", 10000.0)),
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
    )


def _deinterleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """From llama.cpp's order of rotated rows to Hugging Face's; ``weight`` is [heads * dim, in].

    >>> _deinterleave(np.arange(4)[:, None], heads=1).ravel()
    array([0, 2, 1, 3])
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_gguf(path: str | os.PathLike[str]) -> tuple[LlamaConfig, dict[str, Any]]:
    """Reads a Llama-type GGUF file.

    Args:
      path: the file.

    Returns:
      Hugging Face's configuration, and the parameters of ``FlaxLlamaForCausalLM`` as nested dicts of float32 NumPy
      arrays (kernels are [in, out]).

    Raises:
      ValueError: the file is missing, damaged, not GGUF, of another architecture, or lacks a tensor (named).
      NotImplementedError: the model needs what FlaxLlama lacks (scaled rotary positions, free head size).
    """
    import gguf

    name = os.fspath(path)
    reader = _open(path)
    tensors = {t.name: t for t in reader.tensors}
    config = _config(_Fields(reader, path), "output.weight" not in tensors, name)

    def take(key: str, *shape: int) -> np.ndarray:
        if key not in tensors:
            raise ValueError(f"{name!r} has no tensor {key!r}")
        tensor = tensors[key]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as e:
            raise NotImplementedError(f"{name!r}: tensor {key!r} has type {tensor.tensor_type.name}: {e}") from e
        if array.shape != shape:
            raise ValueError(f"{name!r}: tensor {key!r} has shape {array.shape}, expected {shape}")
        return np.asarray(array, np.float32)

    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    kv = hidden // heads * kv_heads

    def linear(weight: np.ndarray) -> dict[str, np.ndarray]:
        return {"kernel": np.ascontiguousarray(weight.T)}

    def layer(i: int) -> dict[str, Any]:
        p = f"blk.{i}."
        return {
            "input_layernorm": {"weight": take(p + "attn_norm.weight", hidden)},
            "post_attention_layernorm": {"weight": take(p + "ffn_norm.weight", hidden)},
            "self_attn": {
                "q_proj": linear(_deinterleave(take(p + "attn_q.weight", hidden, hidden), heads)),
                "k_proj": linear(_deinterleave(take(p + "attn_k.weight", kv, hidden), kv_heads)),
                "v_proj": linear(take(p + "attn_v.weight", kv, hidden)),
                "o_proj": linear(take(p + "attn_output.weight", hidden, hidden)),
            },
            "mlp": {
                "gate_proj": linear(take(p + "ffn_gate.weight", inner, hidden)),
                "up_proj": linear(take(p + "ffn_up.weight", inner, hidden)),
                "down_proj": linear(take(p + "ffn_down.weight", hidden, inner)),
            },
        }

    embedding = take("token_embd.weight", config.vocab_size, hidden)
    head = embedding if config.tie_word_embeddings else take("output.weight", config.vocab_size, hidden)
    params = {
        "model": {
            "embed_tokens": {"embedding": embedding},
            "layers": {str(i): layer(i) for i in range(config.num_hidden_layers)},
            "norm": {"weight": take("output_norm.weight", hidden)},
        },
        "lm_head": linear(head),
    }
    return config, params


def read_gguf_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Builds the tokenizer that a GGUF file describes: a byte-level BPE from its tokens and merges.

    Args:
      path: the file.

    Returns:
      A ``transformers.PreTrainedTokenizerFast`` with the file's special tokens and chat template.

    Raises:
      ValueError: the file is missing or damaged, or its tokenizer is of another kind (named).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = _Fields(_open(path), path)
    kind, pre = fields.require("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{os.fspath(path)!r} has a tokenizer of kind {kind!r}, pre-tokenizer {pre!r}; "
            f"only byte-level BPE ('gpt2') with one of {sorted(_PRE_TOKENIZERS)} can be built"
        )
    tokens = fields.require("tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ", 1)) for m in fields.require("tokenizer.ggml.merges")]
    types = fields.get("tokenizer.ggml.token_type", [])

    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if _PRE_TOKENIZERS[pre]
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, k in zip(tokens, types) if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types) if k == _USER_DEFINED])

    ids = {
        "bos_token": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token": fields.get("tokenizer.ggml.eos_token_id"),
        "unk_token": fields.get("tokenizer.ggml.unknown_token_id"),
        "pad_token": fields.get("tokenizer.ggml.padding_token_id"),
    }
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )

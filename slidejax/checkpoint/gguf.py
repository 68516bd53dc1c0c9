"""Reads a Llama-type GGUF file: its configuration, its weights as Flax parameters, its tokenizer.

GGUF is llama.cpp's one-file format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The
`gguf` package dequantises its block-quantised tensors to float32. Two things differ from Hugging
Face's layout:

* llama.cpp rotates neighbouring rows (2i, 2i+1), and Hugging Face rotates rows (i, i + dim/2). The
  file therefore stores the rows of q and k interleaved, and `deinterleave` puts them back.
* A model with tied embeddings has no `output.weight`: its head is the transposed embedding.
"""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slidejax.bounds import COUNT
from slidejax.checkpoint.gguf_layout import GGUFLayout, TensorPlace
from slidejax.checkpoint.gguf_tokenizer import check_tokenizer
from slidejax.files import check_path
from slidejax.kinds import shown

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

__all__ = ["GGUFFile", "deinterleave"]

# llama.cpp token types: 3 is "control", 4 is "user defined". Both are matched whole, before any
# byte-pair merge.
_CONTROL, _USER_DEFINED = 3, 4

# llama.cpp's named pre-tokenizers cut text before the merges. The value says whether they split
# digits one by one.
_PRE_TOKENIZERS = {"gpt-2": False, "default": False, "smollm": True}

# Keys of a Llama that change what it computes, with the value that FlaxLlama computes.
_PLAIN: dict[str, Any] = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "attention.sliding_window": 0,
    "expert_count": 0,
}
_LARGEST = float(np.finfo(np.float32).max)
_MOST_LAYERS = 4096
# The tensors of a layer.
_LAYER = (
    "attn_norm",
    "ffn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


def deinterleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """From llama.cpp's order of rotated rows to Hugging Face's; `weight` is [heads * dim, in].

    Raises:
      TypeError, ValueError: if the weight is no matrix, or its rows do not divide into heads.

    >>> deinterleave(np.arange(4)[:, None], heads=1).ravel()
    array([0, 2, 1, 3])
    """
    if not isinstance(weight, np.ndarray) or weight.ndim != 2:
        raise TypeError(f"weight must be an array [heads * dim, in], got {shown(weight)}")
    heads = COUNT.check(heads, "heads")
    rows, columns = weight.shape
    if rows % (2 * heads):
        raise ValueError(f"heads must divide the pairs of {rows} rows, got {heads}")
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


class GGUFFile:
    """An open Llama-type GGUF file: `config`, `params` and `tokenizer`, each read when asked for.

    Args:
      path: the file.

    Raises:
      ValueError: the file is missing, damaged, cut short or not GGUF.
      TypeError: `path` is none.
      ImportError: the package `gguf` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = check_path(path)
        try:
            import gguf
        except ImportError as e:
            raise ImportError(
                "reading a GGUF file needs the package 'gguf': pip install 'slidejax[lm]'"
            ) from e
        self.path = os.fspath(path)
        if not os.path.isfile(path):
            raise ValueError(f"no GGUF file at {self.path!r}")
        self._layout = GGUFLayout(Path(path))
        self._values = self._layout.values
        self._tensors: dict[str, tuple[Any, TensorPlace, int]] = {}
        for name, place in self._layout.tensors.items():
            try:
                kind = gguf.GGMLQuantizationType(place.kind)
            except ValueError as e:
                raise ValueError(f"{self.path!r}: tensor {name!r} has type {place.kind}") from e
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if place.shape[-1] % block:
                raise ValueError(
                    f"{self.path!r} is damaged: rows of tensor {name!r} have {place.shape[-1]} "
                    f"numbers, which fill no blocks of {block}"
                )
            row_bytes = place.shape[-1] // block * size
            self._layout.data(place, row_bytes)  # it checks that they lie in the file
            self._tensors[name] = (kind, place, row_bytes)
        self._check_overlaps()

    @property
    def keys(self) -> list[str]:
        """The names of the metadata."""
        return list(self._values)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors by their names, as `read` returns them."""
        return {name: place.shape for name, (_, place, _) in self._tensors.items()}

    def value(self, key: str, default: Any = None) -> Any:
        """The metadata under a key, or the default."""
        return self._get(key, default)

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, dequantised by the package gguf.

        Raises:
          ValueError: there is no such tensor.
          NotImplementedError: its type cannot be dequantised.
        """
        if name not in self._tensors:
            raise ValueError(f"{self.path!r} has no tensor {name!r}")
        return self._take(name, *self.tensors[name])

    def _check_overlaps(self) -> None:
        """Raises a ValueError if two tensors have bytes in common."""
        places = sorted(
            (place.start, place.start + math.prod(place.shape[:-1]) * row_bytes, name)
            for name, (_, place, row_bytes) in self._tensors.items()
        )
        for (_, end, one), (start, _, other) in itertools.pairwise(places):
            if start < end:
                raise ValueError(
                    f"{self.path!r} is damaged: the tensors {one!r} and {other!r} overlap"
                )

    def size(
        self,
        key: str,
        default: int | None = None,
        *,
        most: int = 2**31 - 1,
        layers: int | None = None,
    ) -> int:
        """A positive integer of the metadata.

        Args:
          key: its key.
          default: what counts if there is no such key; None: it must be there.
          most: the largest that is accepted.
          layers: accept a list of that many equal numbers, too; None: no list.

        Raises:
          ValueError: naming file and key, if it is missing or no such number.
          NotImplementedError: naming file and key, if layers have different sizes.
        """
        value = self._require(key) if default is None else self._get(key, default)
        if layers is not None and isinstance(value, list):
            if len(value) != layers:
                raise ValueError(
                    f"{self.path!r}: {key} must have an entry for each of {layers} layers, got "
                    f"{len(value)}"
                )
            if any(one != value[0] for one in value):
                raise NotImplementedError(f"{self.path!r}: {key}: layers of different sizes")
            value = value[0]
        if type(value) is not int or not 1 <= value <= most:
            wanted = (
                "a positive integer" if type(value) is not int or value < 1 else f"at most {most}"
            )
            raise ValueError(f"{self.path!r}: {key} must be {wanted}, got {value!r:.80}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number of the metadata that float32 holds; arguments as in `size`.

        Raises:
          ValueError: naming file and key, if it is missing or no such number.
        """
        value = self._require(key) if default is None else self._get(key, default)
        if type(value) not in (int, float) or not 0 < value <= _LARGEST:
            raise ValueError(f"{self.path!r}: {key} must be a positive number, got {value!r:.80}")
        return float(value)

    def _get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def _require(self, key: str) -> Any:
        if key not in self._values:
            raise ValueError(f"{self.path!r} has no key {key!r}")
        return self._values[key]

    def config(self) -> LlamaConfig:
        """Hugging Face's configuration of the model.

        Raises:
          ValueError: another architecture, or a key is missing (named).
          NotImplementedError: the model has scaled rotary positions, a free head size or tensors,
            such as biases, that FlaxLlama lacks; or it is one file of several.
        """
        from transformers import LlamaConfig

        architecture = self._require("general.architecture")
        if architecture != "llama":
            raise ValueError(
                f"{self.path!r}: general.architecture is {architecture!r:.80}; only 'llama' can be read"
            )
        self._refuse_unread()
        self._check_tokenizer()
        if "llama.vocab_size" in self._values:
            vocab_size = self.size("llama.vocab_size")
        else:
            vocab_size = len(self._require("tokenizer.ggml.tokens"))
        heads, hidden = self.size("llama.attention.head_count"), self.size("llama.embedding_length")
        kv_heads = self.size("llama.attention.head_count_kv", heads)
        if hidden % heads or heads % kv_heads:
            raise ValueError(
                f"{self.path!r}: llama.embedding_length {hidden}, attention.head_count {heads} and "
                f"attention.head_count_kv {kv_heads} do not divide each other"
            )
        rope_dim = self.size("llama.rope.dimension_count", hidden // heads)
        if rope_dim * heads != hidden:
            raise NotImplementedError(
                f"{self.path!r}: head size {rope_dim} times {heads} heads is not the hidden size {hidden}, "
                "which FlaxLlama takes for granted"
            )
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=self.size("llama.feed_forward_length"),
            num_hidden_layers=self.size("llama.block_count", most=_MOST_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=self.size("llama.context_length"),
            # It is stored in float32. The model card says the shortest decimal that rounds to the
            # same float32, such as 1e-05.
            rms_norm_eps=float(
                str(np.float32(self.number("llama.attention.layer_norm_rms_epsilon")))
            ),
            rope_theta=self.number("llama.rope.freq_base", 10000.0),
            bos_token_id=self._get("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._get("tokenizer.ggml.eos_token_id"),
            pad_token_id=self._get("tokenizer.ggml.padding_token_id"),
            tie_word_embeddings="output.weight" not in self._tensors,
            architectures=["LlamaForCausalLM"],
        )

    def _check_tokenizer(self) -> None:
        """Raises a ValueError for metadata of the tokenizer that contradict each other."""
        check_tokenizer(self._values, repr(self.path))

    def _refuse_unread(self) -> None:
        """Raises if the file asks for something that FlaxLlama lacks, or has other tensors."""
        if self._get("split.count", 0) not in (0, 1):
            raise NotImplementedError(
                f"{self.path!r} is one file of {self._get('split.count')} (split.count): join them "
                "with llama.cpp's gguf-split --merge"
            )
        found = {key: self._get(f"llama.{key}", plain) for key, plain in _PLAIN.items()}
        wrong = [f"llama.{key} {found[key]!r}" for key in _PLAIN if found[key] != _PLAIN[key]]
        known = {"token_embd.weight", "output_norm.weight", "output.weight"}
        for i in range(self.size("llama.block_count", most=_MOST_LAYERS)):
            known |= {f"blk.{i}.{name}.weight" for name in _LAYER}
        unread = sorted(self._tensors.keys() - known)
        if "rope_freqs.weight" in unread and (self.read("rope_freqs.weight") == 1).all():
            unread.remove("rope_freqs.weight")
        if unread:
            more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
            wrong.append(f"the tensors {', '.join(unread[:3])}{more}")
        if wrong:
            raise NotImplementedError(
                f"{self.path!r} has {'; '.join(wrong)}, which FlaxLlama has no place for "
                "(slidejax.lm.load reads more)"
            )

    def _take(self, key: str, *shape: int) -> np.ndarray:
        """The tensor `key` in float32, which must have this shape."""
        import gguf

        if key not in self._tensors:
            raise ValueError(f"{self.path!r} has no tensor {key!r}")
        kind, place, row_bytes = self._tensors[key]
        try:
            array = gguf.dequantize(self._layout.data(place, row_bytes), kind)
        except NotImplementedError as e:
            raise NotImplementedError(
                f"{self.path!r}: tensor {key!r} has type {kind.name}: {e}"
            ) from e
        if array.shape != shape:
            raise ValueError(
                f"{self.path!r}: tensor {key!r} has shape {array.shape}, expected {shape}"
            )
        return np.asarray(array, np.float32)

    def params(self) -> dict[str, Any]:
        """The parameters of `FlaxLlamaForCausalLM`.

        They are nested dicts of float32 NumPy arrays, and kernels are [in, out].

        Raises:
          ValueError: a tensor is missing or has another shape than the configuration says (named).
        """
        config, take = self.config(), self._take
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
                    "q_proj": linear(
                        deinterleave(take(p + "attn_q.weight", hidden, hidden), heads)
                    ),
                    "k_proj": linear(deinterleave(take(p + "attn_k.weight", kv, hidden), kv_heads)),
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
        head = (
            embedding
            if config.tie_word_embeddings
            else take("output.weight", config.vocab_size, hidden)
        )
        return {
            "model": {
                "embed_tokens": {"embedding": embedding},
                "layers": {str(i): layer(i) for i in range(config.num_hidden_layers)},
                "norm": {"weight": take("output_norm.weight", hidden)},
            },
            "lm_head": linear(head),
        }

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that the file describes: a byte-level BPE from its tokens and merges.

        Returns:
          A `transformers.PreTrainedTokenizerFast` with the file's special tokens and chat template.

        Raises:
          ValueError: the tokenizer is of another kind (named).
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        kind, pre = (
            self._require("tokenizer.ggml.model"),
            self._get("tokenizer.ggml.pre", "default"),
        )
        if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
            raise ValueError(
                f"{self.path!r} has a tokenizer of kind {kind!r}, pre-tokenizer {pre!r}; "
                f"only byte-level BPE ('gpt2') with one of {sorted(_PRE_TOKENIZERS)} can be built"
            )
        self._check_tokenizer()
        tokens = self._require("tokenizer.ggml.tokens")
        merges = [tuple(m.split(" ", 1)) for m in self._require("tokenizer.ggml.merges")]
        types = self._get("tokenizer.ggml.token_type", [])
        try:
            model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
        except Exception as e:  # it has no exceptions of its own
            raise ValueError(
                f"{self.path!r}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {e}"
            ) from e
        tokenizer = Tokenizer(model)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
            if _PRE_TOKENIZERS[pre]
            else byte_level
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [
                AddedToken(t, special=True)
                for t, k in zip(tokens, types, strict=False)
                if k == _CONTROL
            ]
        )
        tokenizer.add_tokens(
            [
                AddedToken(t, normalized=False)
                for t, k in zip(tokens, types, strict=False)
                if k == _USER_DEFINED
            ]
        )

        ids = {
            "bos_token": self._get("tokenizer.ggml.bos_token_id"),
            "eos_token": self._get("tokenizer.ggml.eos_token_id"),
            "unk_token": self._get("tokenizer.ggml.unknown_token_id"),
            "pad_token": self._get("tokenizer.ggml.padding_token_id"),
        }
        special = {name: tokens[i] for name, i in ids.items() if i is not None}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=self._get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            **special,
        )

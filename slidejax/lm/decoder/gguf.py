"""Reading a GGUF file: its metadata as a `DecoderConfig`, its tensors as parameters.

The names of the metadata are those of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp rotates neighbouring channels
(2i, 2i + 1) of Llama's heads, so such a file holds the rows of q and k in another order. Norms of
Gemma are stored with 1 added.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import numpy as np

from slidejax.checkpoint.gguf import GGUFFile, deinterleave
from slidejax.checkpoint.gguf_tokenizer import check_tokenizer
from slidejax.checkpoint.staging import GGUF_TOKENIZER
from slidejax.files import CHECKSUM, json_checksum
from slidejax.lm.decoder.config import MOST_LAYERS, DecoderConfig, Rope
from slidejax.lm.decoder.names import gguf_name, parameter, tree_of
from slidejax.lm.decoder.params import expected

__all__ = ["GGUF_TOKENIZER", "config_of", "params_of", "tokenizer_of"]

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
_MODEL_TYPES = {"gemma3": "gemma3_text"}

# Keys of other parts of a file. They do not change what the model computes.
_OUTSIDE = ("general.", "tokenizer.", "quantize.", "GGUF.", "split.")
# Keys of the architecture that must have this value: the computation that they ask for is not done.
_ONLY: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.finetuned": None,  # a note
    "rope.scaling.original_context_length": None,  # read by other types of scaling only
    "use_parallel_residual": False,
}


def config_of(file: GGUFFile) -> DecoderConfig:
    """The configuration that the metadata and the tensors of a file say.

    Raises:
      ValueError: a key is missing or has an impossible value (named).
      NotImplementedError: another architecture; or a key asks for what the decoder does not do, or
        is not known (named).
    """
    keys = _Keys(file)
    architecture = keys.architecture
    gemma = architecture == "gemma3"
    layers = keys.size("block_count", most=MOST_LAYERS)
    heads = keys.size("attention.head_count", layers=layers)
    hidden = keys.size("embedding_length")
    head_dim = keys.size("attention.key_length", hidden // heads)
    if head_dim % 2:
        keys.refuse("attention.key_length", f"a head of {head_dim} channels, which are no pairs")
    kv_heads = keys.size("attention.head_count_kv", heads, layers=layers)
    if heads % kv_heads:
        raise ValueError(
            f"{file.path!r}: {architecture}.attention.head_count_kv must divide "
            f"{architecture}.attention.head_count {heads}, got {kv_heads}"
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, head_dim) != head_dim:
            keys.refuse(key, f"it is not the size of a head, {head_dim}")
    windows = _windows(keys, layers)
    tensors = file.tensors
    positions = keys.size("context_length")
    # llama.cpp scales the scores of the largest Gemma 3, which has 62 layers, in another way.
    scalar = hidden / heads if gemma and layers == 62 else head_dim
    vocabulary = keys.size("vocab_size", tensors.get("token_embd.weight", (0,))[0])
    config = DecoderConfig(
        model_type=_MODEL_TYPES.get(architecture, architecture),
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=keys.size("feed_forward_length", layers=layers),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=positions,
        # It is stored in float32. The model card says the shortest decimal that rounds to it.
        norm_eps=float(str(np.float32(keys.number("attention.layer_norm_rms_epsilon")))),
        activation="gelu_tanh" if gemma else "silu",
        tied="output.weight" not in tensors,
        windows=windows,
        ropes=_ropes(keys, file, windows, head_dim),
        query_scale=scalar**-0.5,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        qk_norm=architecture in ("qwen3", "gemma3"),
        sandwich_norm=gemma,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        bos_token_id=_token(file, "bos", vocabulary),
        eos_token_ids=tuple(
            dict.fromkeys(
                t
                for t in (_token(file, n, vocabulary) for n in ("eos", "eot", "eom"))
                if t is not None
            )
        ),
        pad_token_id=_token(file, "padding", vocabulary),
    )
    keys.finish()
    tokens = file.value("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > vocabulary:
        raise ValueError(
            f"{file.path!r}: tokenizer.ggml.tokens has {len(tokens)} tokens, and the model has "
            f"{vocabulary} (token_embd.weight)"
        )
    return config


def params_of(file: GGUFFile, config: DecoderConfig, dtype: Any) -> dict[str, Any]:
    """The parameters, dequantised tensor by tensor.

    Args:
      file: the file.
      config: its configuration.
      dtype: of embeddings, kernels and biases. Norms are float32.

    Raises:
      ValueError: naming it, if a tensor is missing or unknown or has another shape.
      NotImplementedError: if a tensor has a type that the package gguf cannot dequantise.
    """
    check_tensors(file, config)
    return tree_of({path: param_of(file, config, path, dtype) for path in expected(config)})


def check_tensors(file: GGUFFile, config: DecoderConfig) -> None:
    """Raises a ValueError if a tensor is missing or unknown, or has another shape."""
    shapes = {gguf_name(path, config.sandwich_norm): path for path in expected(config)}
    unknown = sorted(file.tensors.keys() - shapes.keys() - {"rope_freqs.weight"})
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"{file.path!r} holds tensors that a {config.model_type} does not have: "
            f"{', '.join(unknown[:3])}{more}"
        )
    for name, path in shapes.items():
        _check_shape(file, name, _stored_shape(path, config))


def param_of(file: GGUFFile, config: DecoderConfig, path: str, dtype: Any) -> Any:
    """One parameter, dequantised.

    Args:
      file, config, dtype: as in `params_of`.
      path: the parameter's path.

    Raises:
      ValueError: naming it, if the tensor is missing or has another shape.
      NotImplementedError: if it has a type that the package gguf cannot dequantise.
    """
    name = gguf_name(path, config.sandwich_norm)
    if name in file.tensors:
        _check_shape(file, name, _stored_shape(path, config))
    tensor = file.read(name)
    if config.model_type == "llama" and "/self_attn/q_proj/" in path:
        tensor = _in_order(tensor, config.num_heads)
    elif config.model_type == "llama" and "/self_attn/k_proj/" in path:
        tensor = _in_order(tensor, config.num_kv_heads)
    return parameter(path, tensor, dtype)


def _stored_shape(path: str, config: DecoderConfig) -> tuple[int, ...]:
    shape = expected(config)[path]
    return shape[::-1] if path.endswith("/kernel") else shape


def _check_shape(file: GGUFFile, name: str, wanted: tuple[int, ...]) -> None:
    if name not in file.tensors:
        raise ValueError(f"{file.path!r} has no tensor {name!r}")
    if file.tensors[name] != wanted:
        raise ValueError(
            f"{file.path!r}: tensor {name!r} has shape {file.tensors[name]}, expected {wanted}"
        )


def tokenizer_of(file: GGUFFile) -> bytes:
    """The metadata of the tokenizer as a JSON object, with the file's own keys and a checksum.

    Raises:
      ValueError: naming file and key, if keys have wrong types or contradict each other.
    """
    values = {key: file.value(key) for key in file.keys if key.startswith("tokenizer.")}
    check_tokenizer(values, repr(file.path))
    values[CHECKSUM] = json_checksum(values)
    return json.dumps(values, ensure_ascii=False).encode()


def _in_order(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, or their biases, in the order of Hugging Face."""
    return deinterleave(tensor.reshape(len(tensor), -1), heads).reshape(tensor.shape)


class _Keys:
    """The metadata of the architecture. Keys that nobody took are judged at the end."""

    def __init__(self, file: GGUFFile):
        self._file = file
        if (files := file.value("split.count", 1)) not in (0, 1):
            raise NotImplementedError(
                f"{file.path!r} is one file of {files} (split.count): join them with llama.cpp's "
                "gguf-split --merge"
            )
        if file.value("general.type", "model") != "model":
            raise NotImplementedError(
                f"{file.path!r}: general.type is {file.value('general.type')!r}, expected 'model'"
            )
        self.architecture = file.value("general.architecture")
        if self.architecture not in _ARCHITECTURES:
            raise NotImplementedError(
                f"{file.path!r}: general.architecture is {self.architecture!r}, expected one of "
                f"{', '.join(_ARCHITECTURES)}"
            )
        self._left = {key for key in file.keys if not key.startswith(_OUTSIDE)}

    def fail(self, key: str, value: Any, wanted: str) -> NoReturn:
        raise ValueError(
            f"{self._file.path!r}: {self.architecture}.{key} must be {wanted}, got {value!r:.80}"
        )

    def refuse(self, key: str, why: str) -> NoReturn:
        raise NotImplementedError(f"{self._file.path!r}: {self.architecture}.{key}: {why}")

    def take(self, key: str, default: Any) -> Any:
        full = f"{self.architecture}.{key}"
        self._left.discard(full)
        return self._file.value(full, default)

    def size(self, key: str, default: int | None = None, **options: Any) -> int:
        self.take(key, default)
        return self._file.size(f"{self.architecture}.{key}", default, **options)

    def number(self, key: str, default: float | None = None) -> float:
        self.take(key, default)
        return self._file.number(f"{self.architecture}.{key}", default)

    def finish(self) -> None:
        for full in sorted(self._left):
            key = full.removeprefix(f"{self.architecture}.")
            value = self._file.value(full)
            if key not in _ONLY or full == key:
                raise NotImplementedError(
                    f"{self._file.path!r}: {full} is not a key that slidejax knows, and it may "
                    "change what is computed"
                )
            if _ONLY[key] is not None and value != _ONLY[key]:
                self.refuse(key, f"{value!r} is not supported")


def _token(file: GGUFFile, name: str, vocabulary: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = file.value(key)
    if value is not None and (type(value) is not int or not 0 <= value < vocabulary):
        raise ValueError(
            f"{file.path!r}: {key} must be in 0..{vocabulary - 1}, the tokens of the model, got "
            f"{value!r:.80}"
        )
    return value


def _windows(keys: _Keys, layers: int) -> tuple[int | None, ...]:
    name, of_layers = "attention.sliding_window", "attention.sliding_window_pattern"
    window, pattern = keys.take(name, None), keys.take(of_layers, None)
    if window is None or (type(window) is int and window == 0):
        return (None,) * layers
    window = keys.size(name)
    if keys.architecture == "llama" and pattern is None:  # a Mistral: every layer has it
        return (window,) * layers
    if keys.architecture != "gemma3":
        keys.refuse(name, f"a {keys.architecture} has no windows in GGUF")
    if not isinstance(pattern, list):
        every = keys.size(of_layers, 6)  # llama.cpp has this number in its code
        slides = [bool((i + 1) % every) for i in range(layers)]
    elif len(pattern) == layers and all(type(p) in (bool, int) and p in (0, 1) for p in pattern):
        slides = [bool(p) for p in pattern]
    else:
        keys.fail(of_layers, pattern, f"one truth value for each of {layers} layers")
    return tuple(window if slide else None for slide in slides)


def _ropes(
    keys: _Keys, file: GGUFFile, windows: tuple[int | None, ...], head_dim: int
) -> tuple[Rope, ...]:
    """The rotary positions of each layer.

    Llama 3.1 says its scaling in the tensor `rope_freqs.weight` alone. A factor without a type is
    linear, and `rope.scale_linear` is its old name.
    """
    gemma = keys.architecture == "gemma3"
    theta = keys.number("rope.freq_base", 1_000_000.0 if gemma else 10_000.0)
    kind = keys.take("rope.scaling.type", None)
    factor = keys.number("rope.scaling.factor", 1.0) * keys.number("rope.scale_linear", 1.0)
    if kind not in (None, "none", "linear"):
        keys.refuse("rope.scaling.type", f"{kind!r} is neither 'none' nor 'linear'")
    divisors: tuple[float, ...] = () if kind == "none" or factor == 1.0 else (factor,)
    if "rope_freqs.weight" in file.tensors:
        given = file.read("rope_freqs.weight")
        if given.shape != (head_dim // 2,) or not (np.isfinite(given).all() and (given > 0).all()):
            raise ValueError(
                f"{file.path!r}: rope_freqs.weight must be {head_dim // 2} positive numbers, got "
                f"shape {given.shape}"
            )
        if divisors:
            keys.refuse("rope.scaling.factor", "there is a tensor rope_freqs.weight, too")
        divisors = tuple(map(float, given))
    rope = Rope(theta, divisors)
    if not gemma:
        return (rope,) * len(windows)
    local = Rope(keys.number("rope.freq_base_swa", 10_000.0))
    return tuple(rope if window is None else local for window in windows)

"""`DecoderConfig` from Hugging Face's config.json, as transformers 4 and 5 write it.

What a file does not say has the value that transformers' class of the same architecture gives it.
Every key that changes what the model computes is honoured or refused by its name. A key that is not
known here is refused, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from slidejax.lm.decoder.config import MOST, MOST_LAYERS, DecoderConfig, Rope

__all__ = ["MODEL_TYPES", "from_huggingface"]


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """How an architecture differs from the others, and its defaults in transformers.

    Attributes:
      kv_heads, head_dim: defaults; None: as many as heads, and hidden size by heads.
      max_positions: default.
      window: default of `sliding_window`; None where there are no windows.
      qkv_bias: whether q, k and v always have biases.
      may_have_bias: whether `attention_bias` is a key of it, for q, k, v and o.
      may_have_mlp_bias: whether `mlp_bias` is a key of it.
      qk_norm: whether queries and keys are normalised.
      gemma: whether norms, windows, rotary bases and the embedding are those of Gemma 3.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int = 2048
    window: int | None = None
    qkv_bias: bool = False
    may_have_bias: bool = False
    may_have_mlp_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False


_ARCHITECTURES = {
    "llama": _Architecture(may_have_bias=True, may_have_mlp_bias=True),
    "mistral": _Architecture(kv_heads=8, max_positions=4096 * 32, window=4096),
    "qwen2": _Architecture(kv_heads=32, max_positions=32768, window=4096, qkv_bias=True),
    "qwen3": _Architecture(
        kv_heads=32,
        head_dim=128,
        max_positions=32768,
        window=4096,
        may_have_bias=True,
        qk_norm=True,
    ),
    "gemma3_text": _Architecture(
        kv_heads=4,
        head_dim=256,
        max_positions=131_072,
        window=4096,
        may_have_bias=True,
        qk_norm=True,
        gemma=True,
    ),
}
MODEL_TYPES = tuple(_ARCHITECTURES)
_CLASSES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3_text",
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# Keys that do not change what a decoder computes: notes, training, and defaults of generation that
# old files keep here.
# fmt: off
_HARMLESS = frozenset([
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "architectures", "attention_dropout", "attn_implementation", "bad_words_ids",
    "begin_suppress_tokens", "cache_implementation", "chunk_size_feed_forward",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
    "initializer_range", "is_decoder", "is_llama_config", "label2id", "length_penalty",
    "max_length", "max_sequence_length", "min_length", "model_max_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "prefix", "pretraining_tp", "problem_type",
    "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
])
# fmt: on

# Keys that must have this value, or be absent or null: the computation that they ask for is not
# done here.
_ONLY: dict[str, Any] = {
    "add_cross_attention": False,
    "attn_logit_softcapping": None,
    "attention_bias": False,
    "attention_multiplier": None,
    "auto_map": None,
    "final_logit_softcapping": None,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "rope_interleaved": False,
    "text_config": None,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "vision_config": None,
}


def from_huggingface(values: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """Reads the content of a config.json.

    `quantization_config` is not looked at here: it says how the files are read, and not what the
    model computes (`slidejax.lm.decoder.compressed`).

    Args:
      values: the JSON object.
      source: what to call it in errors.

    Raises:
      ValueError: naming the key, if one is missing or has an impossible value.
      NotImplementedError: naming the key, if the file asks for a computation that the decoder does
        not do, or has a key that is not known.

    >>> config = from_huggingface({
    ...     "model_type": "mistral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    ...     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    ...     "sliding_window": 16})
    >>> config.windows, config.head_dim, config.ropes[0]
    ((16, 16), 8, Rope(theta=10000.0, divisors=()))
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{source} must hold a JSON object, got {type(values).__name__}")
    keys = _Keys(values, source)
    model_type = keys.take("model_type", None)
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise NotImplementedError(
            f"{source}: model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}"
        )
    kind = _ARCHITECTURES[model_type]
    _check_class(values, model_type, source)
    heads = keys.size("num_attention_heads")
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers", most=MOST_LAYERS)
    if kind.head_dim is None and heads > hidden and values.get("head_dim") is None:
        keys.bad("num_attention_heads", heads, f"at most hidden_size, {hidden}")
    head_dim = keys.size("head_dim", kind.head_dim or hidden // heads)
    if head_dim % 2:
        keys.bad("head_dim", head_dim, "even")
    kv_heads = keys.size("num_key_value_heads", kind.kv_heads or heads, null=heads)
    if heads % kv_heads:
        keys.bad("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
    positions = keys.size("max_position_embeddings", kind.max_positions)
    bias = kind.may_have_bias and keys.flag("attention_bias", False)
    if kind.qkv_bias and keys.take("attention_bias", True) is not True:
        keys.refuse("attention_bias", f"{model_type} has biases")
    windows = _windows(keys, kind, model_type, layers)
    scalar = keys.number("query_pre_attn_scalar", 256) if kind.gemma else head_dim
    config = DecoderConfig(
        model_type=model_type,
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        activation=_activation(keys, kind),
        tied=keys.flag("tie_word_embeddings", kind.gemma),
        windows=windows,
        ropes=_ropes(keys, kind, windows, head_dim, positions),
        query_scale=scalar**-0.5,
        embedding_scale=hidden**0.5 if kind.gemma else 1.0,
        qk_norm=kind.qk_norm,
        sandwich_norm=kind.gemma,
        qkv_bias=bias or kind.qkv_bias,
        output_bias=bias,
        mlp_bias=kind.may_have_mlp_bias and keys.flag("mlp_bias", False),
        bos_token_id=keys.token("bos_token_id"),
        eos_token_ids=keys.tokens("eos_token_id"),
        pad_token_id=keys.token("pad_token_id"),
    )
    keys.finish()
    return config


class _Keys:
    """The keys of a file. Those that nobody took are judged at the end."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self._values, self._source = dict(values), source
        self._values.pop("quantization_config", None)

    def take(self, key: str, default: Any) -> Any:
        """The value of a key, which is then used up."""
        return self._values.pop(key, default)

    def refuse(self, key: str, why: str) -> NoReturn:
        raise NotImplementedError(f"{self._source}: {key}: {why}")

    def bad(self, key: str, value: Any, expected: str) -> NoReturn:
        raise ValueError(f"{self._source}: {key} must be {expected}, got {value!r}")

    def size(
        self, key: str, default: int | None = None, null: int | None = None, most: int = MOST
    ) -> int:
        if key not in self._values and default is None:
            raise ValueError(f"{self._source} lacks {key}")
        value = self.take(key, default)
        if value is None:  # as transformers reads null
            value = default if null is None else null
        if type(value) is not int or value < 1:
            self.bad(key, value, "a positive integer")
        if value > most:
            self.bad(key, value, f"at most {most}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.take(key, default)
        if not _is_positive(value):
            self.bad(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if type(value) is not bool:
            self.bad(key, value, "true or false")
        return value

    def token(self, key: str) -> int | None:
        value = self.take(key, None)
        if value is not None and not _is_token(value):
            self.bad(key, value, "a token id or null")
        return value if value is None or value >= 0 else None

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self.take(key, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_token(token) for token in ids):
            self.bad(key, value, "a token id, a list of them or null")
        return tuple(token for token in ids if token >= 0)

    def finish(self) -> None:
        for key, value in self._values.items():
            if key in _HARMLESS or value is None:
                continue
            if key in _ONLY and value == _ONLY[key]:
                continue
            if key in _ONLY:
                self.refuse(key, f"{value!r} is not supported")
            self.refuse(key, "not a key that slidejax knows, and it may change what is computed")


def _is_positive(value: Any) -> bool:
    """Whether a value of a file is a number, and neither 0 nor infinite in float32."""
    return type(value) in (int, float) and 1e-37 < value < 1e38


def _is_token(value: Any) -> bool:
    """Whether a value of a file is a token id, or a negative number that stands for none."""
    return type(value) is int and -MOST <= value <= MOST


def _check_class(values: Mapping[str, Any], model_type: str, source: str) -> None:
    names = values.get("architectures") or []
    if not isinstance(names, list) or any(not str(name).endswith("ForCausalLM") for name in names):
        raise NotImplementedError(
            f"{source}: architectures: {names!r} is no causal language model (...ForCausalLM)"
        )
    for name in names:
        other = _CLASSES.get(name, model_type)
        if other != model_type:
            raise NotImplementedError(
                f"{source}: architectures: {name} is no {model_type!r}, which model_type says"
            )


def _activation(keys: _Keys, kind: _Architecture) -> str:
    key = "hidden_activation" if kind.gemma else "hidden_act"
    name = keys.take(key, None)
    if name is None:
        name = "gelu_pytorch_tanh" if kind.gemma else "silu"
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        keys.refuse(key, f"{name!r} is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


# --- windows --------------------------------------------------------------------------------------


def _windows(
    keys: _Keys, kind: _Architecture, model_type: str, layers: int
) -> tuple[int | None, ...]:
    """The window of each layer."""
    window = keys.take("sliding_window", kind.window)
    if window is not None and (type(window) is not int or window < 1):
        keys.bad("sliding_window", window, "a positive integer or null")
    types = _layer_types(keys, layers)
    if kind.window is None:
        slides = [False] * layers
        if window is not None:
            keys.refuse("sliding_window", f"{model_type} has none")
    elif kind.gemma:
        pattern = keys.take("sliding_window_pattern", None)
        pattern = 6 if pattern is None else pattern
        also = keys.take("_sliding_window_pattern", None)
        also = pattern if also is None else also
        if type(pattern) is not int or pattern < 1:
            keys.bad("sliding_window_pattern", pattern, "a positive integer")
        if also != pattern and types is None:
            keys.bad("_sliding_window_pattern", also, f"sliding_window_pattern, {pattern}")
        slides = types or [bool((i + 1) % pattern) for i in range(layers)]
        if window is None and any(slides):
            keys.bad("sliding_window", window, "a positive integer where layers have windows")
        types = None
    elif model_type == "mistral":
        slides = [window is not None] * layers
    else:
        uses = keys.take("use_sliding_window", False)
        if type(uses) is not bool:
            keys.bad("use_sliding_window", uses, "true or false")
        first = keys.take("max_window_layers", 28)
        if type(first) is not int or first < 0:
            keys.bad("max_window_layers", first, "an integer from 0")
        window = window if uses else None
        slides = types or [window is not None and i >= first for i in range(layers)]
        if window is None and any(slides):
            keys.refuse("layer_types", "layers have windows, and use_sliding_window is false")
        types = None
    if types is not None and types != slides:
        keys.refuse("layer_types", f"{model_type} has the same attention in every layer")
    return tuple(window if slide else None for slide in slides)


def _layer_types(keys: _Keys, layers: int) -> list[bool] | None:
    """The layers that have windows, by `layer_types`; None if it is absent."""
    types = keys.take("layer_types", None)
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers:
        keys.bad("layer_types", types, f"a list of {layers} names")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            keys.refuse("layer_types", f"{name!r} is neither full_attention nor sliding_attention")
    return [name == "sliding_attention" for name in types]


# --- rotary positions -----------------------------------------------------------------------------


def _ropes(
    keys: _Keys,
    kind: _Architecture,
    windows: tuple[int | None, ...],
    head_dim: int,
    positions: int,
) -> tuple[Rope, ...]:
    """The rotary positions of each layer.

    transformers 4 has `rope_theta`, `rope_scaling` and Gemma's `rope_local_base_freq`. transformers
    5 has `rope_parameters`, which Gemma nests by the type of the layer.
    """
    theta = keys.take("rope_theta", None)
    scaling = keys.take("rope_scaling", None)
    new = keys.take("rope_parameters", None)
    for key, value in (("rope_scaling", scaling), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            keys.bad(key, value, "an object or null")
    if not kind.gemma:
        _agree(keys, theta, scaling, new, "rope_parameters")
        given = dict(scaling or new or {})
        given.setdefault("rope_theta", 10_000.0 if theta is None else theta)
        rope = _rope(
            keys, given, "rope_scaling" if scaling else "rope_parameters", head_dim, positions
        )
        return (rope,) * len(windows)
    local = keys.take("rope_local_base_freq", None)
    nested = dict(new or {})
    if nested and not nested.keys() <= {"full_attention", "sliding_attention"}:
        keys.refuse("rope_parameters", f"{sorted(nested)} are not the types of Gemma's layers")
    for name, part in nested.items():
        if part is not None and not isinstance(part, Mapping):
            keys.bad(f"rope_parameters.{name}", part, "an object or null")
    made = []
    for name, old, scales, key, default in (
        ("full_attention", theta, scaling, "rope_theta", 1_000_000.0),
        ("sliding_attention", local, None, "rope_local_base_freq", 10_000.0),
    ):
        part = nested.get(name)
        _agree(keys, old, scales, part, f"rope_parameters.{name}", key, default)
        given = {**(part or {}), **(scales or {})}
        given.setdefault("rope_theta", default if old is None else old)
        made.append(_rope(keys, given, "rope_parameters", head_dim, positions))
    full, sliding = made
    return tuple(full if window is None else sliding for window in windows)


def _agree(
    keys: _Keys,
    theta: Any,
    scaling: Any,
    new: Any,
    where: str,
    key: str = "rope_theta",
    default: float = 10_000.0,
) -> None:
    """Refuses a file in which the keys of transformers 4 and 5 say different things.

    Each version would compute another model. A base inside `rope_scaling` counts for version 5
    alone.
    """
    inner = (scaling or {}).get("rope_theta")
    outer = (new or {}).get("rope_theta", theta)
    if inner is not None and inner != (default if outer is None else outer):
        keys.bad("rope_scaling.rope_theta", inner, f"what {key} is, {outer or default!r}")
    if not new:
        return
    if theta is not None and theta != new.get("rope_theta", theta):
        keys.bad(key, theta, f"what {where}.rope_theta is, {new['rope_theta']!r}")

    def scaled(values: Mapping[str, Any]) -> dict[str, Any]:
        kept = {
            k: v for k, v in values.items() if k not in ("type", "rope_theta") and v is not None
        }
        return {**kept, "rope_type": values.get("rope_type", values.get("type")) or "default"}

    if scaling and scaled(scaling) != scaled(new):
        keys.bad("rope_scaling", scaling, f"what {where} is, {new!r}")


def _rope(keys: _Keys, given: Mapping[str, Any], key: str, head_dim: int, positions: int) -> Rope:
    """One kind of rotary positions from its parameters."""
    rest = dict(given)
    theta, old = rest.pop("rope_theta"), rest.pop("type", None)
    name = rest.pop("rope_type", old) or "default"
    if rest.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        keys.refuse(key, "partial_rotary_factor is not supported")

    def number(field: str, default: Any = None) -> float:
        value = rest.pop(field, default)
        if not _is_positive(value):
            keys.bad(f"{key}.{field}", value, f"a positive number (rope_type {name!r})")
        return float(value)

    if not _is_positive(theta):
        keys.bad("rope_theta", theta, "a positive number")
    theta = float(theta)
    if name == "default":
        if rest.pop("factor", None) not in (None, 1):
            keys.refuse(key, "a factor without a rope_type")
        rope = Rope(theta)
    elif name == "linear":
        rope = Rope(theta, (number("factor"),))
    elif name == "llama3":
        factor, low, high = (
            number(field) for field in ("factor", "low_freq_factor", "high_freq_factor")
        )
        original = number("original_max_position_embeddings", positions)
        if original < 1:
            keys.bad(f"{key}.original_max_position_embeddings", original, "1 or more")
        if not low < high:
            keys.bad(f"{key}.low_freq_factor", low, f"below high_freq_factor, {high}")
        rope = Rope.llama3(theta, head_dim, factor, low, high, int(original))
    else:
        keys.refuse(key, f"rope_type {name!r} is not one of default, linear, llama3")
    rest.pop("original_max_position_embeddings", None)
    rest = {field: value for field, value in rest.items() if value is not None}
    if rest:
        keys.refuse(key, f"{sorted(rest)[0]!r} is not known for rope_type {name!r}")
    return rope

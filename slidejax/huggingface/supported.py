"""The cases in which transformers' Flax classes do not compute what a configuration says.

A configuration that asks for it is refused by the name of the key. `slidejax.lm.load` reads most of
these models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["check_supported", "rope_theta"]

_INSTEAD = "slidejax.lm.load reads Llama, Mistral, Qwen and Gemma 3 as their files say"
_SIZED = ("llama", "mistral")  # their classes take the size of a head for granted


def check_supported(config: Any) -> None:
    """Raises a NotImplementedError if the Flax class would compute another model."""
    refused = []
    if getattr(config, "quantization_config", None):
        refused.append("quantization_config: codes are taken for weights")
    for key in ("rope_scaling", "rope_parameters"):
        if _scales(getattr(config, key, None)):
            refused.append(f"{key}={getattr(config, key)} is ignored")
    if config.model_type in _SIZED:
        if getattr(config, "mlp_bias", False):
            refused.append("mlp_bias=True is ignored")
        head_dim = getattr(config, "head_dim", None)
        if head_dim and head_dim * config.num_attention_heads != config.hidden_size:
            refused.append(
                f"head_dim={head_dim} with {config.num_attention_heads} heads and "
                f"hidden_size={config.hidden_size} is ignored"
            )
    if config.model_type == "mistral":
        window = config.sliding_window
        if window is None:
            refused.append("sliding_window=None is taken for a window of one token")
        elif window < config.max_position_embeddings:
            refused.append(f"sliding_window={window} is taken for one of {window + 1} tokens")
    if refused:
        raise NotImplementedError(
            f"transformers' Flax {config.model_type}: {'; '.join(refused)}. {_INSTEAD}"
        )


def _scales(rope: Any) -> bool:
    """Whether rotary parameters ask for more than a base."""
    if not isinstance(rope, Mapping):
        return bool(rope)
    plain = {"rope_theta", "rope_type", "type", "original_max_position_embeddings"}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return kind != "default" or not rope.keys() <= plain


def rope_theta(config: Any) -> float | None:
    """The rotary base: transformers 5 writes it into `rope_parameters`."""
    new = getattr(config, "rope_parameters", None)
    if isinstance(new, Mapping) and "rope_theta" in new:
        return new["rope_theta"]
    return getattr(config, "rope_theta", None)

"""Language models: one decoder for many architectures; reading, serving and evaluating models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slidejax.lm.decoder.config import DecoderConfig
    from slidejax.lm.decoder.family import convert, eight_bit
    from slidejax.lm.decoder.files import load, save
    from slidejax.lm.decoder.model import Decoder
    from slidejax.lm.decoder.streaming import convert_files
    from slidejax.lm.generation.generate import Completion
    from slidejax.lm.generation.stream import Stream
    from slidejax.lm.text.tokenizer import Tokenizer

__all__ = [
    "Completion",
    "Decoder",
    "DecoderConfig",
    "Stream",
    "Tokenizer",
    "convert",
    "convert_files",
    "eight_bit",
    "load",
    "save",
]

# Loaded when first used: the command line looks at other modules of this package without JAX.
_HOME = {
    "Completion": "generation.generate",
    "Decoder": "decoder",
    "DecoderConfig": "decoder",
    "Stream": "generation.stream",
    "Tokenizer": "text.tokenizer",
    "convert": "decoder",
    "convert_files": "decoder.streaming",
    "eight_bit": "decoder.family",
    "load": "decoder",
    "save": "decoder",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"slidejax.lm.{_HOME[name]}"), name)
        globals()[name] = value  # from now on found without this function
        return value
    raise AttributeError(f"module 'slidejax.lm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

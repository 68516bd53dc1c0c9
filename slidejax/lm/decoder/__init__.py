"""One decoder for Llama, Mistral, Qwen and Gemma: a configuration and a pure function."""

from slidejax.lm.decoder.apply import apply
from slidejax.lm.decoder.cache import Cache, LayerCache, init_cache
from slidejax.lm.decoder.config import DecoderConfig, Rope
from slidejax.lm.decoder.family import FAMILY, convert, functional
from slidejax.lm.decoder.files import load, save
from slidejax.lm.decoder.fuse import fuse, serving
from slidejax.lm.decoder.model import Decoder

__all__ = [
    "FAMILY",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "LayerCache",
    "Rope",
    "apply",
    "convert",
    "functional",
    "fuse",
    "init_cache",
    "load",
    "save",
    "serving",
]

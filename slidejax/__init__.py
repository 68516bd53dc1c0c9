"""slidejax: (2N-2):2N sparse weights on 2:4 sparse tensor cores, for JAX and Flax.

w = slidejax.pack(kernel, "6:8", dtype="int8")
y = slidejax.linear(x, w)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slidejax import adapters as adapters
    from slidejax import checkpoint as checkpoint
    from slidejax import conversion as conversion
    from slidejax import functional as functional
    from slidejax import generate as generate
    from slidejax import huggingface as huggingface
    from slidejax import linen as linen
    from slidejax import lm as lm
    from slidejax import lm_eval as lm_eval
    from slidejax import models as models
    from slidejax import nnx as nnx
    from slidejax import prune as prune
    from slidejax import rules as rules
    from slidejax import train as train
    from slidejax import trainable as trainable
    from slidejax import tune as tune
    from slidejax.ops.chain import Stage, linear_chain
    from slidejax.ops.decode_attention import decode_attention
    from slidejax.ops.explain import explain
    from slidejax.ops.lift_quantize import lift_quantize
    from slidejax.ops.linear import linear
    from slidejax.ops.prologue import GLU, Activation, LayerNorm, RMSNorm
    from slidejax.ops.registry import implementations
    from slidejax.ops.sparse_matmul import sparse_matmul
    from slidejax.rules import Report, Rule
    from slidejax.train.recover import recover as recover
    from slidejax.variants.prepared import drop_prepared, prepare
    from slidejax.variants.trainable import combine, partition
    from slidejax.weights.packed import SlideWeight, pack, quantize, unpack
    from slidejax.weights.pattern import Pattern

__version__ = "0.1.0"

__all__ = [
    "GLU",
    "Activation",
    "LayerNorm",
    "Pattern",
    "RMSNorm",
    "Report",
    "Rule",
    "SlideWeight",
    "Stage",
    "combine",
    "decode_attention",
    "drop_prepared",
    "explain",
    "implementations",
    "lift_quantize",
    "linear",
    "linear_chain",
    "pack",
    "partition",
    "prepare",
    "prune",
    "quantize",
    "sparse_matmul",
    "unpack",
]

# Everything is loaded when it is first used. `import slidejax` takes no time, and a part that needs
# an optional package needs it only when it is used.
_MODULES = (
    "adapters",
    "checkpoint",
    "conversion",
    "functional",
    "generate",
    "huggingface",
    "linen",
    "lm",
    "lm_eval",
    "models",
    "nnx",
    "prune",
    "rules",
    "train",
    "trainable",
    "tune",
)
_HOME = {
    "GLU": "ops.prologue",
    "Activation": "ops.prologue",
    "LayerNorm": "ops.prologue",
    "Pattern": "weights.pattern",
    "RMSNorm": "ops.prologue",
    "Report": "rules",
    "Rule": "rules",
    "SlideWeight": "weights.packed",
    "Stage": "ops.chain",
    "combine": "variants.trainable",
    "decode_attention": "ops.decode_attention",
    "drop_prepared": "variants.prepared",
    "explain": "ops.explain",
    "implementations": "ops.registry",
    "lift_quantize": "ops.lift_quantize",
    "linear": "ops.linear",
    "linear_chain": "ops.chain",
    "pack": "weights.packed",
    "partition": "variants.trainable",
    "prepare": "variants.prepared",
    "quantize": "weights.packed",
    "recover": "train.recover",
    "sparse_matmul": "ops.sparse_matmul",
    "unpack": "weights.packed",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"slidejax.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"slidejax.{_HOME[name]}"), name)
        globals()[name] = value  # from now on found without this function
        return value
    raise AttributeError(f"module 'slidejax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_HOME})

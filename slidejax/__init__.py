"""slidejax: (2N-2):2N sparse weights on 2:4 sparse tensor cores, for JAX and Flax.

w = slidejax.pack(kernel, "6:8", dtype="int8")
y = slidejax.linear(x, w)
"""

import importlib

from slidejax import prune
from slidejax.ops.explain import explain
from slidejax.ops.lift_quantize import lift_quantize
from slidejax.ops.linear import linear
from slidejax.ops.prologue import GLU, Activation, LayerNorm, RMSNorm
from slidejax.ops.registry import implementations
from slidejax.ops.sparse_matmul import sparse_matmul
from slidejax.rules import Report, Rule
from slidejax.variants.prepared import drop_prepared, prepare
from slidejax.variants.trainable import combine, partition
from slidejax.weights.packed import SlideWeight, pack, quantize, unpack
from slidejax.weights.pattern import Pattern

__all__ = [
    "GLU",
    "Activation",
    "LayerNorm",
    "Pattern",
    "RMSNorm",
    "Report",
    "Rule",
    "SlideWeight",
    "combine",
    "drop_prepared",
    "explain",
    "implementations",
    "lift_quantize",
    "linear",
    "pack",
    "partition",
    "prepare",
    "prune",
    "quantize",
    "sparse_matmul",
    "unpack",
]

# Parts that need Flax, files or an optional package are loaded when first used.
_LAZY = (
    "adapters",
    "checkpoint",
    "huggingface",
    "linen",
    "nnx",
    "rules",
    "train",
    "trainable",
    "tune",
)


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"slidejax.{name}")
    if name == "recover":
        return importlib.import_module("slidejax.train.recover").recover
    raise AttributeError(f"module 'slidejax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, "recover"])

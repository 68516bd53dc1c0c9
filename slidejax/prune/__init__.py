"""Pruning: choosing which weights of every group are kept, and which values they get.

Each method for one kernel has a file of its own: `magnitude`, `wanda`, `sparsegpt` (with `exchange`
and `refit`), and `round_kernel` for 8 bit. `convert` prunes a whole model. `mixed` chooses a
pattern for each layer of a model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from slidejax.prune.sparsegpt import exchange, layer_error, refit, sparsegpt
from slidejax.prune.wanda import wanda
from slidejax.weights.magnitude import magnitude

if TYPE_CHECKING:
    from slidejax.conversion import convert, mixed
    from slidejax.prune.model.calibration import Calibration, cut
    from slidejax.prune.model.costs import Times, measured_times
    from slidejax.prune.model.methods import Method
    from slidejax.prune.rounding import clip_search, round_kernel

__all__ = [
    "Calibration",
    "Method",
    "Times",
    "clip_search",
    "convert",
    "cut",
    "exchange",
    "layer_error",
    "magnitude",
    "measured_times",
    "mixed",
    "refit",
    "round_kernel",
    "sparsegpt",
    "wanda",
]

# These are loaded when they are first used. `slidejax.conversion` needs Flax.
_LAZY = {
    "Calibration": "slidejax.prune.model.calibration",
    "Method": "slidejax.prune.model.methods",
    "Times": "slidejax.prune.model.costs",
    "clip_search": "slidejax.prune.rounding",
    "convert": "slidejax.conversion",
    "cut": "slidejax.prune.model.calibration",
    "measured_times": "slidejax.prune.model.costs",
    "mixed": "slidejax.conversion",
    "round_kernel": "slidejax.prune.rounding",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'slidejax.prune' has no attribute {name!r}")

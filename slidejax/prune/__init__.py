"""Pruning: choosing which weights of every group are kept, and what the kept ones become.

One file a method for one kernel (`magnitude`, `wanda`, `sparsegpt` with `exchange` and `refit`, `round_kernel` for 8 bit);
`convert` prunes a whole model with the calibrated ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slidejax.prune.sparsegpt import exchange, layer_error, refit, sparsegpt
from slidejax.prune.wanda import wanda
from slidejax.weights.magnitude import magnitude

if TYPE_CHECKING:
    from slidejax.prune.model.mixed import measured_times, mixed
    from slidejax.prune.model.calibration import Calibration, convert, cut
    from slidejax.prune.rounding import clip_search, round_kernel

__all__ = [
    "Calibration",
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

# What needs Flax is loaded when first used.
_LAZY = {
    "Calibration": "model.calibration",
    "convert": "model.calibration",
    "cut": "model.calibration",
    "measured_times": "model.mixed",
    "mixed": "model.mixed",
    "clip_search": "rounding",
    "round_kernel": "rounding",
}


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"slidejax.prune.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'slidejax.prune' has no attribute {name!r}")

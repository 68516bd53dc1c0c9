"""Flax NNX: `SlideLinear` and its kin, and converting models."""

from slidejax.nnx.conversion import (
    Packed,
    SlideEinsum,
    SlideLinear,
    SlideLinearGeneral,
    convert,
    functional,
    map_weights,
)

__all__ = [
    "Packed",
    "SlideEinsum",
    "SlideLinear",
    "SlideLinearGeneral",
    "convert",
    "functional",
    "map_weights",
]

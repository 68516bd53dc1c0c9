"""Flax NNX: `SlideLinear` and other layers with packed weights, and converting models."""

from slidejax.nnx.conversion import convert, map_weights
from slidejax.nnx.family import FAMILY, functional
from slidejax.nnx.layers import Packed, SlideEinsum, SlideLinear, SlideLinearGeneral
from slidejax.nnx.registered import SlideRegistered, register

__all__ = [
    "FAMILY",
    "Packed",
    "SlideEinsum",
    "SlideLinear",
    "SlideLinearGeneral",
    "SlideRegistered",
    "convert",
    "functional",
    "map_weights",
    "register",
]

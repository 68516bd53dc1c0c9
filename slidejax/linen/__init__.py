"""Flax Linen: the layer `SlideDense`, and converting and running unchanged models."""

from slidejax.linen.conversion import convert
from slidejax.linen.family import FAMILY, functional
from slidejax.linen.intercept import Interceptor, apply, interceptor, show_layers
from slidejax.linen.known import layer_of, own_kernel, split_input
from slidejax.linen.layer import SlideDense
from slidejax.linen.registered import register
from slidejax.variants.projections import fuse as fuse_projections
from slidejax.variants.projections import unfuse as unfuse_projections

__all__ = [
    "FAMILY",
    "Interceptor",
    "SlideDense",
    "apply",
    "convert",
    "functional",
    "fuse_projections",
    "interceptor",
    "layer_of",
    "own_kernel",
    "register",
    "show_layers",
    "split_input",
    "unfuse_projections",
]

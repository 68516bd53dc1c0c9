"""Flax Linen: `SlideDense`, and running and converting models whose code is not ours."""

from slidejax.linen.conversion import (
    SlideDense,
    apply,
    convert,
    fuse_projections,
    interceptor,
    layer_of,
    own_kernel,
    split_input,
    unfuse_projections,
)

__all__ = [
    "SlideDense",
    "apply",
    "convert",
    "fuse_projections",
    "interceptor",
    "layer_of",
    "own_kernel",
    "split_input",
    "unfuse_projections",
]

"""Hugging Face's Flax models: converting them, reading and writing their directories."""

from slidejax.huggingface.conversion import (
    HIDDEN_LAYERS,
    calibrated,
    convert,
    functional,
    fuse_projections,
    planned,
    with_params,
)

__all__ = [
    "HIDDEN_LAYERS",
    "calibrated",
    "convert",
    "functional",
    "fuse_projections",
    "planned",
    "with_params",
]

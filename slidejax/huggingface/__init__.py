"""Hugging Face's Flax models: converting them, reading and writing their directories."""

from slidejax.huggingface.conversion import HIDDEN_LAYERS, calibrated, convert, planned
from slidejax.huggingface.family import FAMILY, functional
from slidejax.huggingface.model import fuse_projections, with_params, with_rope_theta
from slidejax.huggingface.read import build, model_class, read_pretrained
from slidejax.huggingface.write import write_pretrained

__all__ = [
    "FAMILY",
    "HIDDEN_LAYERS",
    "build",
    "calibrated",
    "convert",
    "functional",
    "fuse_projections",
    "model_class",
    "planned",
    "read_pretrained",
    "with_params",
    "with_rope_theta",
    "write_pretrained",
]

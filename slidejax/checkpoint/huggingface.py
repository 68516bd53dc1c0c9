"""Reading and writing Hugging Face directories (`slidejax.huggingface`)."""

from slidejax.huggingface.model import with_rope_theta
from slidejax.huggingface.read import build, cast, model_class, read_pretrained
from slidejax.huggingface.write import write_pretrained

__all__ = [
    "build",
    "cast",
    "model_class",
    "read_pretrained",
    "with_rope_theta",
    "write_pretrained",
]

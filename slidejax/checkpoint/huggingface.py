"""Reading and writing Hugging Face directories (`slidejax.huggingface.files`)."""

from slidejax.huggingface.files import *  # noqa: F403
from slidejax.huggingface.files import __all__ as __all__

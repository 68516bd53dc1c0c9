"""A model for EleutherAI's evaluation harness: `SlideLM` (`slidejax.lm.harness`)."""

from slidejax.lm.harness import *  # noqa: F403
from slidejax.lm.harness import __all__ as __all__

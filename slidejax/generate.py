"""Writing text: `Generator` (`slidejax.lm.generate`)."""

from slidejax.lm.generate import *  # noqa: F403
from slidejax.lm.generate import __all__ as __all__

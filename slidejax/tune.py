"""The measured table of implementations (`slidejax.ops.tuning`)."""

from slidejax.ops.tuning import *  # noqa: F403
from slidejax.ops.tuning import __all__ as __all__

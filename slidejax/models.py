"""Reading language models: `load_model` (`slidejax.lm.models`)."""

from slidejax.lm.models import *  # noqa: F403
from slidejax.lm.models import __all__ as __all__

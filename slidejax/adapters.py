"""Low-rank adapters on packed weights: `add`, `merge`, `extract` (`slidejax.variants.adapters`)."""

from slidejax.variants.adapters import *  # noqa: F403
from slidejax.variants.adapters import __all__ as __all__

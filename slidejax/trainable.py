"""Training packed weights: `partition`, `combine`, `masters`, `deploy` (`slidejax.variants.trainable`)."""

from slidejax.variants.trainable import *  # noqa: F403
from slidejax.variants.trainable import __all__ as __all__

"""Another name of `slidejax.variants.trainable`: `partition`, `combine`, `masters`, `deploy`."""

from slidejax.variants.trainable import *  # noqa: F403
from slidejax.variants.trainable import __all__ as __all__

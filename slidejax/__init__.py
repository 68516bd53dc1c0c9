"""slidejax: (2N-2):2N sparse weights on 2:4 sparse tensor cores, for JAX and Flax."""

from slidejax import prune
from slidejax.pattern import Pattern
from slidejax.weight import SlideWeight, pack, quantize, unpack

__all__ = ["Pattern", "SlideWeight", "pack", "prune", "quantize", "unpack"]

"""Generation inside `jax.jit`: sampling, the two compiled programs, and the loop around them."""

from slidejax.lm.generation.generate import Completion, generate
from slidejax.lm.generation.programs import Programs
from slidejax.lm.generation.sampling import Sampling
from slidejax.lm.generation.stream import Stream

__all__ = ["Completion", "Programs", "Sampling", "Stream", "generate"]

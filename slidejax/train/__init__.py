"""Training what will run sparse: the loop (`fit`), what to learn from a dense model (`distillation_loss`, `sample`), and a
pruned Hugging Face model's recovery (`slidejax.recover`).

`fit` needs optax: ``pip install 'slidejax[train]'``.
"""

from slidejax.train.distill import distillation_loss, kl_divergence, sample
from slidejax.train.loop import Fitted, Shuffled, fit

__all__ = ["Fitted", "Shuffled", "distillation_loss", "fit", "kl_divergence", "sample"]

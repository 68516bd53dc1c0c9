"""Training models that will run sparse.

`fit` is the training loop. `distillation_loss` and `sample` let a pruned model learn from the
original one, and `slidejax.recover` puts all three together for a Hugging Face model. `fit` needs
optax: `pip install 'slidejax[train]'`.
"""

from slidejax.train.distill import distillation_loss, kl_divergence, sample
from slidejax.train.loop import Fitted, Shuffled, fit

__all__ = ["Fitted", "Shuffled", "distillation_loss", "fit", "kl_divergence", "sample"]

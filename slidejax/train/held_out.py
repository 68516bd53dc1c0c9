"""A batch that is not trained on keeps a training from ending worse than it began.

The loss on that batch is measured before the first step and at even intervals. The parameters with
the lowest loss are the result. A training that has lost more than half of what it had won goes back
to them, and goes on with half the learning rate: its rate was too high.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Guard", "Kept", "interval", "steps_beside_checks"]

_CHECKS = 20  # of a training, at most
_LEAST = 5  # steps between two checks
# A check runs both models forwards, where a step also runs the student backwards.
_COST = 0.5


def interval(total: int) -> int:
    """The number of steps from one check to the next.

    Args:
      total: the number of steps of the training.

    >>> interval(1000), interval(40), interval(3)
    (50, 5, 5)
    """
    return max(_LEAST, math.ceil(total / _CHECKS))


def steps_beside_checks(steps: float) -> int:
    """How many steps, with their checks, take the time of `steps` steps without.

    >>> steps_beside_checks(1000), steps_beside_checks(11)
    (989, 9)
    """
    return max(0, int((steps - _COST) / (1 + _COST / interval(int(steps)))))


@dataclasses.dataclass
class Kept:
    """The results of the checks.

    Attributes:
      best: a copy of the parameters with the lowest loss; None before the first check.
      checked: the step and the loss of each check, in order.
      scale: what the learning rate is multiplied by.
    """

    best: Any = None
    checked: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    scale: float = 1.0

    def lowest(self) -> tuple[int, float]:
        """The step and the loss of `best`."""
        return min(self.checked, key=lambda check: (check[1], check[0]))


class Guard:
    """Measures the loss on the held-out batch, and says with which parameters to go on."""

    def __init__(self, loss: Callable[[Any], jax.Array], back: bool):
        """
        Args:
          loss: from the trained parameters to their loss on the held-out batch.
          back: go back where the loss has risen. Without this the best parameters are only kept.
        """
        self._loss = loss
        self._back = back

    def due(self, kept: Kept, step: int, total: int | None) -> bool:
        """Whether a check is due.

        Args:
          kept: what the checks before have found.
          step: the number of steps that are done.
          total: the number of all steps; None while it is unknown.
        """
        if kept.checked and kept.checked[-1][0] == step:
            return False  # a training that was resumed
        return step == 0 or step == total or (total is not None and step % interval(total) == 0)

    def check(self, kept: Kept, step: int, train: Any) -> Any:
        """Notes the loss of `train` in `kept`; returns the parameters to go on with.

        >>> guard, kept = Guard(lambda x: x, back=True), Kept()
        >>> after = [guard.check(kept, i, x) for i, x in enumerate([9.0, 5.0, 6.5, 7.5])]
        >>> [float(x) for x in after], kept.scale, kept.lowest()
        ([9.0, 5.0, 6.5, 5.0], 0.5, (1, 5.0))
        """
        loss = float(self._loss(train))
        kept.checked.append((step, loss))
        first, (at, lowest) = kept.checked[0][1], kept.lowest()
        if at == step:
            kept.best = jax.tree.map(jnp.copy, train)  # each step overwrites `train`
        elif self._back and not loss <= lowest + (first - lowest) / 2:
            kept.scale /= 2
            return jax.tree.map(jnp.copy, kept.best)
        return train

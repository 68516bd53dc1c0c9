"""How sure shares of solved problems are: intervals by the bootstrap over problems.

Problems are drawn with replacement, and the share is computed on what was drawn, many times; the
interval holds the middle 95 % of the shares (the percentile interval: Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13). Two models are compared on the same draws, so that
a problem that is hard for both counts in neither's favour (the paired bootstrap: Koehn,
Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Difference", "Interval", "difference", "share"]

_DRAWS = 10_000
_LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A number, and the interval that holds it in 95 % of samples like this one.

    Attributes:
      value: the number.
      low, high: the ends of the interval.
    """

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """A model against another one on the same problems.

    Attributes:
      difference: of the shares, this model's minus the other's.
      kept: this model's share divided by the other's; nan and an interval of nan where the other
        solves nothing.
      better, worse: the number of problems at which this model does better, and worse.
    """

    difference: Interval
    kept: Interval
    better: int
    worse: int


def share(scores: ArrayLike, *, seed: int = 0) -> Interval:
    """The mean score of a model, with its interval.

    Args:
      scores: `[problems]`, the share of a problem's samples that passed, 0 to 1.
      seed: of the draws.

    Raises:
      ValueError: there are no scores, or they are not in 0..1.

    >>> share([1, 0, 1, 1])
    Interval(value=0.75, low=0.25, high=1.0)
    """
    ours = _checked(scores, "scores")
    return _interval(float(ours.mean()), _weights(len(ours), seed) @ ours)


def difference(scores: ArrayLike, others: ArrayLike, *, seed: int = 0) -> Difference:
    """Compares two models on the same problems.

    Args:
      scores: as for `share`, of the model.
      others: of the model that it is compared with, in the same order.
      seed: of the draws.

    Raises:
      ValueError: as `share`, or the numbers of problems differ.

    >>> found = difference([1, 0, 0, 1], [1, 1, 0, 1])
    >>> found.difference.value, round(found.kept.value, 3), found.better, found.worse
    (-0.25, 0.667, 0, 1)
    """
    ours, theirs = _checked(scores, "scores"), _checked(others, "others")
    if len(ours) != len(theirs):
        raise ValueError(f"scores and others must have one length, got {len(ours)}, {len(theirs)}")
    weights = _weights(len(ours), seed)
    drawn, drawn_theirs = weights @ ours, weights @ theirs
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(drawn_theirs > 0, drawn / drawn_theirs, np.nan)
        kept = ours.mean() / theirs.mean() if theirs.any() else np.nan
    known = ratios[np.isfinite(ratios)]
    return Difference(
        _interval(float(ours.mean() - theirs.mean()), drawn - drawn_theirs),
        _interval(float(kept), known) if len(known) else Interval(*[float("nan")] * 3),
        int((ours > theirs).sum()),
        int((ours < theirs).sum()),
    )


def _checked(scores: ArrayLike, name: str) -> np.ndarray:
    found = np.asarray(scores, np.float64)
    if found.ndim != 1 or not found.size or not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"{name} must be one number from 0 to 1 for each problem, got {scores!r}")
    return found


def _weights(problems: int, seed: int) -> np.ndarray:
    """float64 `[draws, problems]`: the share of a draw that is this problem."""
    random = np.random.default_rng(seed)
    return random.multinomial(problems, [1 / problems] * problems, size=_DRAWS) / problems


def _interval(value: float, drawn: np.ndarray) -> Interval:
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(value, float(low), float(high))

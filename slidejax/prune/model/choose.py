"""Choosing a pattern for each layer under a budget: a knapsack problem.

Each layer, or group of layers, is an item that takes one of several patterns. A price on the budget
(a Lagrange multiplier) solves the problem nearly, and the budget that is left goes to the layers
that gain most from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slidejax.prune.model.costs import Cost, multiplications
from slidejax.rules import Rule
from slidejax.weights.pattern import Pattern

__all__ = ["BudgetTooSmall", "choose"]


class BudgetTooSmall(ValueError):
    """The cheapest patterns cost more than the budget."""


def choose(
    sensitivity: Mapping[str, Mapping[Pattern, float]],
    shapes: Mapping[str, tuple[int, int]],
    budget: str | Pattern | float,
    *,
    groups: Sequence[str] = (),
    cost: Cost = multiplications,
    qdtype: Any = "int8",
) -> list[tuple[str, Rule]]:
    """Chooses the patterns that are estimated to raise the loss least within a budget.

    Args:
      sensitivity: path -> pattern -> how much it raises the model's loss. Only ratios matter.
      shapes: path -> `(in, out)`.
      budget: the largest summed cost. A pattern stands for its cost in all layers.
      groups: as in `slidejax.prune.mixed`.
      cost: `(shape, pattern) -> cost`: `multiplications`, `packed_bytes`, or
        `measured_times(rows)`.
      qdtype: dtype of the packed values, for the rules.

    Returns:
      A rule for each path.

    Raises:
      BudgetTooSmall: a ValueError, if the cheapest patterns cost more than the budget.
      ValueError: if a group matches no layer, or if its layers have no pattern in common.

    >>> half, most = Pattern(2, 4), Pattern(6, 8)
    >>> need = {"a": {half: 9.0, most: 3.0}, "b": {half: 1.0, most: 0.5}}
    >>> [str(rule) for _, rule in choose(need, {"a": (8, 8), "b": (8, 8)}, 64 * 0.75 + 64 * 0.5)]
    ['6:8 int8', '2:4 int8']
    """
    limit = (
        float(budget)
        if isinstance(budget, (int, float))
        else sum(cost(shape, Pattern.parse(budget)) for shape in shapes.values())
    )
    limit *= 1 + 1e-9  # the same costs summed in another order fit as well
    members = _members(sensitivity, groups)
    losses: dict[str, dict[Pattern, float]] = {}
    costs: dict[str, dict[Pattern, float]] = {}
    for item, paths in members.items():
        common = [p for p in sensitivity[paths[0]] if all(p in sensitivity[q] for q in paths)]
        if not common:
            raise ValueError(
                f"the layers {', '.join(paths)} of one group have no pattern in common"
            )
        losses[item] = {p: sum(sensitivity[path][p] for path in paths) for p in common}
        costs[item] = {p: sum(cost(shapes[path], p) for path in paths) for p in common}
    chosen = _Knapsack(losses, costs, limit).solved()
    pattern_of = {path: chosen[item] for item, paths in members.items() for path in paths}
    return [(re.escape(path), Rule(pattern_of[path], qdtype)) for path in sensitivity]


class _Knapsack:
    """One pattern for each item: the summed loss is small, the summed cost at most `limit`.

    Args:
      losses, costs: item -> pattern -> number.
      limit: the largest summed cost.
    """

    def __init__(
        self,
        losses: Mapping[str, Mapping[Pattern, float]],
        costs: Mapping[str, Mapping[Pattern, float]],
        limit: float,
    ):
        self._losses, self._costs, self._limit = losses, costs, limit

    def solved(self) -> dict[str, Pattern]:
        """The choice.

        Raises:
          BudgetTooSmall: if the cheapest patterns cost more than the limit.
        """
        # a price leaves some of the budget over, and one pattern for all layers may use more of it
        chosen = min([self._by_price(), *self._uniform()], key=self._loss)
        while (item := self._best_exchange(chosen)) is not None:
            chosen |= [item]
        return chosen

    def _cost(self, chosen: Mapping[str, Pattern]) -> float:
        return sum(self._costs[item][p] for item, p in chosen.items())

    def _loss(self, chosen: Mapping[str, Pattern]) -> float:
        return sum(self._losses[item][p] for item, p in chosen.items())

    def _by_price(self) -> dict[str, Pattern]:
        """The choice at the lowest price that keeps the limit."""
        cheapest = {item: min(of, key=of.__getitem__) for item, of in self._costs.items()}
        if self._cost(cheapest) > self._limit:
            raise BudgetTooSmall(
                f"budget {self._limit:g} is less than what the cheapest patterns cost, "
                f"{self._cost(cheapest):g}"
            )

        def at(log_price: float) -> dict[str, Pattern]:
            price = math.exp(log_price)
            return {item: self._best_at(item, price) for item in self._losses}

        low, high = -40.0, 40.0
        for _ in range(80):
            middle = (low + high) / 2
            fits = self._cost(at(middle)) <= self._limit
            low, high = (low, middle) if fits else (middle, high)
        chosen = at(high)
        return chosen if self._cost(chosen) <= self._limit else cheapest

    def _best_at(self, item: str, price: float) -> Pattern:
        """The pattern with the least sum of loss and price.

        Among equal ones the cheapest is taken.
        """
        losses, costs = self._losses[item], self._costs[item]
        return min(losses, key=lambda p: (losses[p] + price * costs[p], costs[p]))

    def _uniform(self) -> list[dict[str, Pattern]]:
        """Each choice of one pattern for all items that keeps the limit."""
        if not self._losses:
            return []
        shared = set.intersection(*(set(of) for of in self._losses.values()))
        uniform = [dict.fromkeys(self._losses, p) for p in shared]
        return [chosen for chosen in uniform if self._cost(chosen) <= self._limit]

    def _best_exchange(self, chosen: Mapping[str, Pattern]) -> tuple[str, Pattern] | None:
        """The item and new pattern that save most loss per unit of cost that is left, or None."""
        left = self._limit - self._cost(chosen)
        better = []
        for item, of in self._losses.items():
            for p, loss in of.items():
                saved = of[chosen[item]] - loss
                more = self._costs[item][p] - self._costs[item][chosen[item]]
                if saved > 0 and 0 < more <= left:
                    better.append((saved / more, item, p))
        return max(better, key=lambda entry: entry[:2])[1:] if better else None


def _members(paths: Iterable[str], groups: Sequence[str]) -> dict[str, list[str]]:
    """The first path of each group -> its paths.

    A layer that is in no group is a group by itself.
    """
    found: dict[Any, list[str]] = {}
    matched = set()
    for path in paths:
        for i, regex in enumerate(groups):
            if (match := re.fullmatch(regex, path)) is not None:
                found.setdefault((i, match.groups()), []).append(path)
                matched.add(i)
                break
        else:
            found[path] = [path]
    for i, regex in enumerate(groups):
        if i not in matched:
            raise ValueError(
                f"groups[{i}] ({regex!r}) matches no layer, or earlier groups took them all "
                f"(paths look like {next(iter(paths), '')!r})"
            )
    return {members[0]: members for members in found.values()}

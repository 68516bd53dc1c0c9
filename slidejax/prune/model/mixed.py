"""A pattern for each layer under a budget: layers that matter most keep more of their weights.

Kernels are pruned with one part of the calibration text. What this costs the model is measured on
the rest (`slidejax.prune.model.sensitivity`). Measured on the text that it was pruned with, a layer
seems to lose too little, and unequally so for different patterns and layers. A choice from such
numbers was worse than one pattern for all (docs/accuracy.md). The ratio between the losses of two
patterns is nearly the same in all layers. So it is measured in a sample of the layers, as one
number for all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bounds import Bound
from slidejax.contraction import from_matrix, to_matrix
from slidejax.functional import Functional
from slidejax.kinds import check_function, check_list, check_regex
from slidejax.prune.model.calibration import Calibration
from slidejax.prune.model.choose import choose
from slidejax.prune.model.convert import check_runs, planned_rules
from slidejax.prune.model.costs import Cost, parse_patterns
from slidejax.prune.model.divergence import divergences, scalar
from slidejax.prune.model.grams import collect
from slidejax.prune.model.program import named_leaves
from slidejax.prune.model.sensitivity import Estimate, drawn_loss, sensitivities, shrunk
from slidejax.prune.sparsegpt import sparsegpt
from slidejax.rules import Rule
from slidejax.weights.checks import check_one_process
from slidejax.weights.pattern import Pattern

__all__ = ["mixed_rules"]

_HELD_OUT = 4  # one of this many batches is held out to measure on
_SAMPLE = 32  # patterns are compared in this many layers


def mixed_rules(
    model: Functional,
    rule: str | Pattern | Rule,
    calibration: Any,
    *,
    patterns: Sequence[str | Pattern],
    groups: Sequence[str],
    cost: Cost,
    loss: Callable[[Any, Any], jax.Array] | None,
    speedup: float = 1.0,
) -> list[tuple[str, Rule]]:
    """Rules that give each linear layer its own pattern, at the cost of one pattern for all.

    Arguments, result and errors are those of `slidejax.prune.mixed`, for a model of any family.
    """
    calibration = Calibration.of(calibration)
    rule = Rule.of(rule)
    candidates = list(dict.fromkeys(parse_patterns(patterns)))
    groups = check_list(groups, "groups", "regular expressions", empty=True)
    for group in groups:
        check_regex(group, "groups")
    check_function(loss, "loss", optional=True)
    cost = _checked(cost)
    speedup = Bound(0, above=True).check(speedup, "speedup")
    check_one_process(model.params, "params")
    batches = calibration.as_batches()
    if hasattr(calibration.batches, "ndim"):
        # one by one, so that a quarter of a few sequences can be held out
        batches = list(np.asarray(calibration.batches)[:, None])
    check_runs(model, batches)
    fit, held_out = _parted(batches)
    kernels = _Kernels(model, planned_rules(model, rule), fit, calibration.damping)
    baseline = rule.pattern if rule.pattern.prunes else min(candidates, key=lambda p: p.density)
    others = [p for p in candidates if p != baseline]
    sample = dict.fromkeys(_sampled(list(kernels.shapes)), others)
    changes = {
        path: [kernels.change(path, p) for p in (baseline, *sample.get(path, ()))]
        for path in kernels.shapes
    }
    of_output = drawn_loss if loss is None else loss
    measured = sensitivities(
        lambda params, batch: scalar(of_output(model.run(params, batch), batch), "loss"),
        model.params,
        held_out,
        changes,
    )
    estimates = _estimated(measured, baseline, sample, candidates, kernels.shapes)
    budget = sum(cost(shape, rule.pattern) for shape in kernels.shapes.values()) / speedup
    rules = choose(estimates, kernels.shapes, budget, groups=groups, cost=cost, qdtype=rule.qdtype)
    uniform = [(regex, rule) for regex, _ in rules]
    comparable = loss is None and baseline == rule.pattern and baseline in candidates
    comparable = comparable and speedup <= 1  # else the uniform rules cost too much
    if not comparable or rules == uniform:
        return rules
    pruned = [
        kernels.pruned({path: one.pattern for path, (_, one) in zip(estimates, which, strict=True)})
        for which in (rules, uniform)
    ]
    kl_mixed, kl_uniform = divergences(model.run, model.params, pruned, held_out)
    return rules if kl_mixed < kl_uniform else uniform


def _checked(cost: Cost) -> Cost:
    """A cost whose results are checked: a wrong one would choose wrong patterns without a word."""
    check_function(cost, "cost")

    def checked(shape: tuple[int, int], pattern: Pattern) -> float:
        return Bound(0).check(cost(shape, pattern), f"cost({shape}, {pattern})")

    return checked


class _Kernels:
    """The kernels of a model `[in, out]`, and what pruning makes of them.

    Args:
      model: the model.
      paths: the kernels' paths. Kernels whose layers did not run are left out.
      batches: the batches to prune with.
      damping: as in `slidejax.prune.sparsegpt`.

    Attributes:
      shapes: path -> `(in, out)`.
    """

    def __init__(
        self, model: Functional, paths: Mapping[str, Any], batches: Sequence[Any], damping: float
    ):
        self._params, self._damping = model.params, damping
        self._grams = collect(model.run, model.params, batches)
        self._leaves, self._layers = named_leaves(model.params), model.layers(batches[0])
        self._kernels = {
            path: to_matrix(jnp.asarray(self._leaves[path]), self._layers[path].kernel)
            for path in paths
            if path in self._grams
        }
        self.shapes = {
            path: (kernel.shape[0], kernel.shape[1]) for path, kernel in self._kernels.items()
        }
        self.change = functools.cache(self._change)

    def _change(self, path: str, pattern: Pattern) -> jax.Array:
        """The pruned kernel minus the kernel."""
        kernel, gram = self._kernels[path], self._grams[path]
        return sparsegpt(kernel, pattern, gram, damping=self._damping, rounds=0)[1] - kernel

    def pruned(self, patterns: Mapping[str, Pattern]) -> Any:
        """The model's parameters with these kernels pruned."""
        leaves = dict(self._leaves)
        for path, pattern in patterns.items():
            kernel = self._kernels[path] + self.change(path, pattern)
            leaves[path] = from_matrix(kernel, leaves[path].shape, self._layers[path].kernel)
        return jax.tree.unflatten(jax.tree.structure(self._params), list(leaves.values()))


def _parted(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The batches to prune with and those to measure on, both from all parts of the text."""
    step = min(_HELD_OUT, len(batches))
    fit = [batch for i, batch in enumerate(batches) if (i + 1) % step]
    return fit or list(batches), list(batches[step - 1 :: step])


def _sampled(paths: Sequence[str]) -> list[str]:
    """A sample of the layers, always the same one."""
    return [paths[i] for i in np.sort(np.random.default_rng(0).permutation(len(paths))[:_SAMPLE])]


def _estimated(
    measured: Mapping[str, Sequence[Estimate]],
    baseline: Pattern,
    sample: Mapping[str, Sequence[Pattern]],
    candidates: Sequence[Pattern],
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, dict[Pattern, float]]:
    """Path -> pattern -> sensitivity.

    Args:
      measured: path -> estimates for `baseline`, and for the patterns that `sample` has for the
        path.
      baseline: the pattern that was measured in all layers.
      sample: path -> other patterns.
      candidates: the patterns to choose from.
      shapes: path -> `(in, out)`.
    """
    totals = dict.fromkeys([baseline, *candidates], 0.0)
    for path, others in sample.items():
        for pattern, estimate in zip((baseline, *others), measured[path], strict=True):
            totals[pattern] += estimate.value
    # the loss does not depend on some layers
    zero = {path: 0.0 for path, (first, *_) in measured.items() if not first.value > 0}
    sizes = {path: math.prod(shapes[path]) for path in measured if path not in zero}
    values = shrunk({path: measured[path][0] for path in sizes}, sizes) | zero
    base = totals[baseline]
    share = {p: totals[p] / base if base > 0 else 0.0 for p in candidates}
    return {path: {p: values[path] * share[p] for p in candidates} for path in measured}

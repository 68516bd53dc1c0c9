"""A pattern for each layer, under a budget: layers that the model depends on most keep more of their weights.

What pruning costs is measured by `slidejax.prune.sensitivity`, on part of the calibration text; kernels are pruned, for this, with the rest of it.
A layer pruned with little text loses twice as much on other text as on its own, and not all patterns and layers alike: measured on its own text the choice
was worse than one pattern for all (docs/accuracy.md). How much more or less a pattern costs than another is nearly the same in all layers, so it is measured in
some of them, and for all together.

The choice itself is a knapsack with one item from each layer, or group of layers, solved by a price on the budget.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.contraction import from_matrix, to_matrix
from slidejax.prune.model.calibration import Calibration, as_function, collect, planned
from slidejax.prune.model.inputs import contractions
from slidejax.prune.model.sensitivity import (
    Estimate,
    divergences,
    drawn_loss,
    sensitivities,
    shrunk,
)
from slidejax.prune.model.stages import named_leaves
from slidejax.prune.sparsegpt import sparsegpt
from slidejax.rules import Rule
from slidejax.weights.pattern import Pattern

__all__ = ["choose", "measured_times", "mixed", "multiplications", "packed_bytes"]

Cost = Callable[[tuple[int, int], Pattern], float]

_HELD_OUT = 4  # one batch of so many is measured on
_SAMPLE = 32  # layers in which patterns are compared


def multiplications(shape: tuple[int, int], pattern: Pattern) -> float:
    """What is computed for each token, in multiplications of a dense tensor core: a sparse one does half of the lifted product; with
    the pattern "dense" it is the whole of the plain one.

    >>> [multiplications((8, 8), Pattern.parse(p)) / 64 for p in ("2:4", "6:8", "14:16", "dense")]
    [0.5, 0.75, 0.875, 1.0]
    """
    return shape[0] * shape[1] * pattern.expansion / (2 if pattern.prunes else 1)


def packed_bytes(shape: tuple[int, int], pattern: Pattern) -> float:
    """Bytes of 8-bit values and of the places of the zeros, a byte for each group that has some.

    >>> [packed_bytes((8, 8), Pattern.parse(p)) / 64 for p in ("2:4", "6:8", "dense")]
    [0.75, 0.875, 1.0]
    """
    return shape[0] * shape[1] * (pattern.kept + pattern.prunes) / pattern.group


def measured_times(rows: int, qdtype: Any = "int8", device: str | None = None) -> Cost:
    """A cost in time: microseconds of `slidejax.linear` by the measured table (`slidejax tune`), with the implementation that is
    the fastest for a pattern, so that a pattern that does not pay costs what dense 8-bit products do.

    Args:
      rows: of x, for which the model is to be fast.
      qdtype: int8 or float8_e4m3fn.
      device: its kind, such as "NVIDIA H200"; None: of this process.

    Returns:
      For `mixed` and `choose`. It raises a ValueError for a shape or a pattern near which nothing was measured.

    >>> time = measured_times(4096, device="NVIDIA H200")
    >>> time((3584, 18944), Pattern.parse("2:4")) < time((3584, 18944), Pattern.parse("6:8")) <= time((3584, 18944), Pattern.parse("dense"))
    True
    """
    from slidejax.ops import tuning
    from slidejax.ops.problem import device_kind

    dtype = Rule("6:8", qdtype).qdtype
    kind = device_kind("cuda") if device is None else device

    def cost(shape: tuple[int, int], pattern: Pattern) -> float:
        time = tuning.time_of(kind, rows, shape, pattern, dtype)
        if time is None:
            raise ValueError(
                f"nothing was measured near {rows} rows of a kernel {shape} with {pattern} {dtype.name} on {kind}: run slidejax tune"
            )
        return time

    return cost


def mixed(
    model: Any,
    rule: str | Pattern | Rule,
    calibration: Any,
    *,
    patterns: Sequence[str | Pattern] = ("14:16", "6:8", "4:6"),
    groups: Sequence[str] = (),
    cost: Cost = multiplications,
    loss: Callable[[Any, Any], jax.Array] | None = None,
    params: Any = None,
) -> list[tuple[str, Rule]]:
    """Rules that give each linear layer its own pattern, at the cost of one pattern for all.

    Without `loss`, what was chosen is compared with the uniform pattern, if that is among `patterns`, by the divergence of both from the dense model on the
    text held out, and must be nearer, else the rules are uniform. The same arguments give the same rules. It takes less time than the conversion by SparseGPT
    and, beside the parameters, up to four times their memory.

    Args:
      model: a Flax model of transformers, a Linen or an NNX module.
      rule: the uniform rule whose summed cost is the budget, and whose dtype the rules have.
      calibration: a `Calibration`, or its batches; the dense model runs over them. A quarter of them, of token ids a quarter of the
        sequences, is held out from pruning to measure on; if there is but one batch, it serves for both.
      patterns: to choose from; with "dense" among them some layers may be quantised only. To leave layers as they are, unquantised, is
        for the rules: put (their path, None) before what is returned.
      groups: regular expressions for the whole path of a kernel: layers that match one of them with the same text in its groups get one
        pattern together. `r"(.*)/[qkv]_proj/kernel"` keeps q, k and v of a block together, so that one lift serves them;
        `r".*/(mlp|self_attn)/.*"` chooses for all MLPs and all attentions. Other layers choose for themselves.
      cost: `(shape, pattern) -> cost`: `multiplications`, `packed_bytes`, or `measured_times(rows)`.
      loss: `(the model's output, batch) -> scalar`, a sum over tokens; None: the cross-entropy of a language model of transformers with tokens
        drawn from its own predictions, which stands for the divergence from the dense model.
      params: as in `slidejax.prune.convert`.

    Returns:
      Rules for `slidejax.prune.convert` and the converters, one for each layer.

    Raises:
      ValueError: for a bad pattern, or none; bad batches; a loss that is needed; and as `choose`.
    """
    how = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    rule = rule if isinstance(rule, Rule) else Rule(rule)
    among = list(dict.fromkeys(map(Pattern.parse, patterns)))
    if not among:
        raise ValueError("patterns must name at least one pattern")
    batches = how.as_batches()
    if hasattr(how.batches, "ndim"):
        batches = list(
            np.asarray(how.batches)[:, None]
        )  # sequence by sequence, so that a quarter of few can be held out
    run, params, pack = as_function(model, params, batches[0])
    plan = planned(lambda params, **options: pack(params, rule, **options), params)
    fit, held_out = _parted(batches)
    grams = collect(run, params, fit)
    leaves, layers = named_leaves(params), contractions(run, params, batches[0])
    kernels = {
        path: to_matrix(jnp.asarray(leaves[path]), layers[path].kernel)
        for path in plan
        if path in grams
    }

    @functools.cache
    def change(path: str, pattern: Pattern) -> jax.Array:
        return (
            sparsegpt(kernels[path], pattern, grams[path], damping=how.damping, rounds=0)[1]
            - kernels[path]
        )

    usual = rule.pattern if rule.pattern.prunes else min(among, key=lambda p: p.density)
    sample = {path: [p for p in among if p != usual] for path in _sampled(list(kernels))}
    changes = {path: [change(path, p) for p in (usual, *sample.get(path, ()))] for path in kernels}
    of_output = drawn_loss if loss is None else loss
    heard = sensitivities(
        lambda params, batch: of_output(run(params, batch), batch), params, held_out, changes
    )
    shapes = {path: (kernel.shape[0], kernel.shape[1]) for path, kernel in kernels.items()}
    found = _estimated(heard, usual, sample, among, shapes)
    rules = choose(found, shapes, rule.pattern, groups=groups, cost=cost, qdtype=rule.qdtype)
    uniform = [(regex, rule) for regex, _ in rules]
    if loss is not None or usual != rule.pattern or usual not in among or rules == uniform:
        return rules

    def pruned(rules: Sequence[tuple[str, Rule]]) -> Any:
        new = {
            path: kernels[path] + change(path, one.pattern)
            for path, (_, one) in zip(found, rules, strict=True)
        }
        new = {
            path: from_matrix(kernel, leaves[path].shape, layers[path].kernel)
            for path, kernel in new.items()
        }
        return jax.tree.unflatten(
            jax.tree.structure(params), [new.get(path, leaf) for path, leaf in leaves.items()]
        )

    apart, together = divergences(run, params, [pruned(rules), pruned(uniform)], held_out)
    return rules if apart < together else uniform


def _parted(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The batches to prune with and those to measure on, of all of the text."""
    step = min(_HELD_OUT, len(batches))
    fit = [batch for i, batch in enumerate(batches) if (i + 1) % step]
    return fit or list(batches), list(batches[step - 1 :: step])


def _sampled(paths: Sequence[str]) -> list[str]:
    """Some of the layers, drawn always alike."""
    return [paths[i] for i in np.sort(np.random.default_rng(0).permutation(len(paths))[:_SAMPLE])]


def _estimated(
    heard: Mapping[str, Sequence[Estimate]],
    usual: Pattern,
    sample: Mapping[str, Sequence[Pattern]],
    among: Sequence[Pattern],
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, dict[Pattern, float]]:
    """Path -> pattern -> sensitivity.

    Args:
      heard: path -> estimates for `usual`, and where `sample` has the path for its patterns.
      usual: the pattern that was measured in all layers.
      sample: path -> other patterns.
      among: the patterns to choose from.
      shapes: path -> `(in, out)`.
    """
    totals = dict.fromkeys([usual, *among], 0.0)
    for path, others in sample.items():
        for pattern, estimate in zip((usual, *others), heard[path], strict=True):
            totals[pattern] += estimate.value
    silent = {
        path: 0.0 for path, (first, *_) in heard.items() if not first.value > 0
    }  # the loss does not depend on them
    sizes = {path: math.prod(shapes[path]) for path in heard if path not in silent}
    found = shrunk({path: heard[path][0] for path in sizes}, sizes) | silent
    share = {p: totals[p] / totals[usual] if totals[usual] > 0 else 0.0 for p in among}
    return {path: {p: found[path] * share[p] for p in among} for path in heard}


def choose(
    sensitivity: Mapping[str, Mapping[Pattern, float]],
    shapes: Mapping[str, tuple[int, int]],
    budget: str | Pattern | float,
    *,
    groups: Sequence[str] = (),
    cost: Cost = multiplications,
    qdtype: Any = "int8",
) -> list[tuple[str, Rule]]:
    """The patterns that are estimated to cost the loss least within a budget, as rules.

    Args:
      sensitivity: path -> pattern -> what it costs the model; only ratios mean anything.
      shapes: path -> `(in, out)`.
      budget: of the summed cost; a pattern means what it would cost for all layers.
      groups: as in `mixed`.
      cost: `(shape, pattern) -> cost`: `multiplications`, `packed_bytes`, or `measured_times(rows)`.
      qdtype: of the rules.

    Returns:
      A rule for each path.

    Raises:
      ValueError: if the cheapest patterns cost more than the budget, a group matches no layer, or its layers have no pattern in common.

    >>> need = {"a": {Pattern(2, 4): 9.0, Pattern(6, 8): 3.0}, "b": {Pattern(2, 4): 1.0, Pattern(6, 8): 0.5}}
    >>> [str(rule) for _, rule in choose(need, {"a": (8, 8), "b": (8, 8)}, 64 * 0.75 + 64 * 0.5)]
    ['6:8 int8', '2:4 int8']
    """
    limit = (
        float(budget)
        if isinstance(budget, (int, float))
        else sum(cost(shape, Pattern.parse(budget)) for shape in shapes.values())
    )
    limit *= 1 + 1e-9  # sums of the same costs in another order fit as well
    members = _members(sensitivity, groups)
    of_layers, sensitivity = sensitivity, {}
    costs: dict[str, dict[Pattern, float]] = {}
    for item, paths in members.items():
        common = [p for p in of_layers[paths[0]] if all(p in of_layers[path] for path in paths)]
        if not common:
            raise ValueError(
                f"the layers {', '.join(paths)} of one group have no pattern in common"
            )
        sensitivity[item] = {p: sum(of_layers[path][p] for path in paths) for p in common}
        costs[item] = {p: sum(cost(shapes[path], p) for path in paths) for p in common}

    def at(price: float) -> dict[str, Pattern]:
        return {
            path: min(of, key=lambda p: (of[p] + price * costs[path][p], costs[path][p]))
            for path, of in sensitivity.items()
        }

    def total(chosen: Mapping[str, Pattern]) -> float:
        return sum(costs[path][p] for path, p in chosen.items())

    cheapest = {path: min(of, key=lambda p: costs[path][p]) for path, of in sensitivity.items()}
    if total(cheapest) > limit:
        raise ValueError(
            f"budget {limit:g} is less than what the cheapest patterns cost, {total(cheapest):g}"
        )
    low, high = -40.0, 40.0  # logarithms of the price
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if total(at(math.exp(middle))) <= limit else (middle, high)
    chosen = at(math.exp(high)) if total(at(math.exp(high))) <= limit else cheapest
    # a price leaves some of the budget over: one pattern for all may use it better
    shared = set.intersection(*(set(of) for of in sensitivity.values())) if sensitivity else set()
    uniform = [
        dict.fromkeys(sensitivity, p)
        for p in shared
        if total(dict.fromkeys(sensitivity, p)) <= limit
    ]
    chosen = min(
        [chosen, *uniform], key=lambda one: sum(sensitivity[path][p] for path, p in one.items())
    )
    while True:  # what is left, where it does most
        left = limit - total(chosen)
        better = [
            (
                (sensitivity[path][chosen[path]] - value)
                / (costs[path][p] - costs[path][chosen[path]]),
                path,
                p,
            )
            for path, of in sensitivity.items()
            for p, value in of.items()
            if value < sensitivity[path][chosen[path]]
            and 0 < costs[path][p] - costs[path][chosen[path]] <= left
        ]
        if not better:
            pattern_of = {path: chosen[item] for item, paths in members.items() for path in paths}
            return [(re.escape(path), Rule(pattern_of[path], qdtype)) for path in of_layers]
        _, path, pattern = max(better, key=lambda item: item[:2])
        chosen[path] = pattern


def _members(paths: Iterable[str], groups: Sequence[str]) -> dict[str, list[str]]:
    """The first path of each group of layers -> its paths; a layer of no group is one by itself."""
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
                f"groups[{i}] ({regex!r}) matches no layer, or earlier groups took them all (paths look like {next(iter(paths), '')!r})"
            )
    return {members[0]: members for members in found.values()}

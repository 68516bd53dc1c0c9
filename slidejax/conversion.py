"""One door for models of every family: `convert` prunes and packs, `mixed` chooses patterns.

The families are Flax Linen, Flax NNX and Hugging Face's Flax models; `register` adds another. A
model's family makes a `Functional` of it (`slidejax.functional`), and everything else is the same
for all families.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from slidejax import huggingface, linen, nnx
from slidejax.functional import Family, Functional, arguments_of
from slidejax.kinds import check_kind, shown
from slidejax.ops.meshes import on_mesh
from slidejax.prune.model import convert as functional_conversion
from slidejax.prune.model.calibration import Calibration
from slidejax.prune.model.costs import Cost, multiplications
from slidejax.prune.model.methods import Method
from slidejax.prune.model.mixed import mixed_rules
from slidejax.rules import Prune, Report, Rule
from slidejax.weights.pattern import Pattern

__all__ = ["convert", "functional", "mixed", "register"]

_families: list[Family] = [linen.FAMILY, nnx.FAMILY, huggingface.FAMILY]


def register(family: Family) -> None:
    """Adds a model family.

    Families that were added later are asked first whether they own a model.

    Raises:
      TypeError: if it is no `Family`.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family must be a Family, got {shown(family)}")
    _families.insert(0, family)


def functional(model: Any, params: Any = None, example: tuple = ()) -> Functional:
    """A model of any family as a function of its parameters.

    Args:
      model: the model.
      params: the variables of a Linen module; or parameters that take the place of another model's
        own.
      example: the arguments of one call of a Linen module.

    Raises:
      TypeError: if no family owns the model.
    """
    check_kind(example, (tuple, list), "example", "a tuple of the model's arguments")
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, (str, bytes)) or callable(leaf):
            raise TypeError(f"params must be a tree of arrays, got {shown(leaf)} in it")
    for family in _families:
        if family.owns(model):
            return family.functional(model, params, example)
    known = [family.name for family in _families]
    raise TypeError(
        f"model must be {', '.join(known[:-1])} or {known[-1]}, got {type(model).__name__}"
    )


def convert(
    model: Any,
    rules: Any,
    calibration: Any = None,
    *,
    params: Any = None,
    method: str | Method | Prune | None = None,
    example: tuple = (),
    report: Report | None = None,
) -> Any:
    """Prunes and packs a model of any family.

    Args:
      model: a `flax.linen` module, an `flax.nnx` module, a Flax model of transformers, or one of a
        family that was registered. It stays as it is.
      rules: see `slidejax.rules`.
      calibration: a `slidejax.prune.Calibration`, or its batches; None for a method that needs
        none.
      params: the variables of a Linen module; or parameters that take the place of another model's
        own.
      method: "magnitude", "wanda", "sparsegpt", a `slidejax.prune.Method`, or a function
        (`slidejax.rules.Prune`). None means "sparsegpt" with calibration and "magnitude" without.
      example: the arguments of one call of a Linen module. With calibration they are not needed:
        its first batch is used.
      report: an empty `slidejax.Report`, which is filled in.

    Returns:
      The result of the family's own `convert`: the variables of a Linen module
      (`slidejax.linen.convert`), or a model (`slidejax.nnx.convert`,
      `slidejax.huggingface.convert`).

    Raises:
      ValueError: for bad rules, an unknown method, calibration that is missing or not used, or bad
        batches; if the calibration's `work` folder holds another conversion.
      TypeError: for a model of another kind.
      NotImplementedError: naming a layer that is to be calibrated and cannot be: it runs inside a
        loop of unknown length or a branch. Those inside `nn.scan`, `nnx.scan`, `nn.vmap` and
        `nn.remat` are calibrated.

    >>> import flax.linen as nn
    >>> model, x = nn.Dense(4), jax.random.normal(jax.random.key(0), (64, 16))
    >>> variables = convert(model, "6:8", [x], params=model.init(jax.random.key(1), x))
    >>> variables["params"]["kernel"].shape
    (16, 4)
    """
    if method is None:
        method = "magnitude" if calibration is None else "sparsegpt"
    if calibration is not None:
        calibration = Calibration.of(calibration)
        example = example or arguments_of(calibration.as_batches()[0])
    made = functional(model, params, example)
    return functional_conversion.convert(made, rules, method, calibration, report)


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
    speedup: float = 1.0,
) -> list[tuple[str, Rule]]:
    """Rules that give each linear layer its own pattern, at the cost of one pattern for all.

    The patterns are chosen by how much they are estimated to raise the loss
    (`slidejax.prune.model.mixed`). Without `loss` the choice is then compared with the uniform
    rule, if its pattern is among `patterns`: both models run on text that was held out, and if the
    chosen patterns are not nearer to the original model, the rules are uniform. The same arguments
    give the same rules. It takes less time than a conversion by SparseGPT. It needs, beside the
    parameters, up to four times their memory.

    Args:
      model: as in `convert`.
      rule: the uniform rule. Its summed cost is the budget, and the rules have its dtype.
      calibration: a `slidejax.prune.Calibration`, or its batches. A quarter of them (with token
        ids, a quarter of the sequences) is held out from pruning to measure on. A single batch
        serves for both.
      patterns: the patterns to choose from. With "dense" among them some layers may be quantised
        only. To leave layers unquantised, put (their path, None) before the returned rules.
      groups: regular expressions for the whole path of a kernel. Layers that match one of them with
        the same text in the expression's groups get the same pattern. `r"(.*)/[qkv]_proj/kernel"`
        keeps q, k and v of a block together, so that one lift serves them.
        `r".*/(mlp|self_attn)/.*"` chooses one pattern for all MLPs and one for all attentions. Each
        other layer gets a pattern of its own.
      cost: `(shape, pattern) -> cost`: `multiplications`, `packed_bytes`
        (`slidejax.prune.model.costs`), `slidejax.prune.measured_times(rows)`, or
        `slidejax.prune.Times(rows, patterns)`, which also estimates.
      loss: `(the model's output, batch) -> scalar`, a sum over tokens. None takes the cross-entropy
        of a language model of transformers with tokens that are drawn from its own predictions. It
        measures the divergence from the original model.
      params: as in `convert`.
      speedup: the budget is the cost of the uniform rule divided by this. So `rule="dense"`, a cost
        in time and 1.1 ask for linear layers that are 1.1 times as fast as dense 8-bit ones.

    Returns:
      Rules for `convert`, one for each layer.

    Raises:
      ValueError: for a bad pattern, or none; for bad batches; if a loss is needed; if the cheapest
        patterns cost more than the budget; if a group matches no layer, or its layers have no
        pattern in common.
    """
    calibration = Calibration.of(calibration)
    made = functional(model, params, arguments_of(calibration.as_batches()[0]))
    with on_mesh(made.params):
        return mixed_rules(
            made,
            rule,
            calibration,
            patterns=patterns,
            groups=groups,
            cost=cost,
            loss=loss,
            speedup=speedup,
        )

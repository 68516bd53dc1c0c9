"""One door for models of every family: `convert` prunes and packs them, `mixed` chooses a pattern for each layer.

The families are Flax Linen, Flax NNX and Hugging Face's Flax models; `register` adds another. What the door does with a
model, it does with the `Functional` that the model's family makes of it (`slidejax.functional`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from slidejax import huggingface, linen, nnx
from slidejax.functional import Family, Functional, arguments_of
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
    """Adds a model family. The family that was added last is asked first whether a model is its own."""
    _families.insert(0, family)


def functional(model: Any, params: Any = None, example: tuple = ()) -> Functional:
    """A model of any family as a function of its parameters.

    Args:
      model: the model.
      params: the variables of a Linen module; parameters to use in place of another model's own.
      example: arguments of one call of a Linen module.

    Raises:
      TypeError: if no family knows the model.
    """
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
      model: a `flax.linen` module, an `flax.nnx` module, a Flax model of transformers, or one of a family that was
        registered. It stays as it is.
      rules: see `slidejax.rules`.
      calibration: a `slidejax.prune.Calibration`, or its batches; None for a method that needs none.
      params: the variables of a Linen module; parameters to use in place of another model's own.
      method: "magnitude", "wanda", "sparsegpt", a `slidejax.prune.Method`, or a function (`slidejax.rules.Prune`). None
        means "sparsegpt" with calibration and "magnitude" without.
      example: arguments of one call of a Linen module. They are needed only without calibration, whose first batch will do.
      report: an empty `slidejax.Report`, filled in.

    Returns:
      What the family's own `convert` returns: the variables of a Linen module (`slidejax.linen.convert`), or a model
      (`slidejax.nnx.convert`, `slidejax.huggingface.convert`).

    Raises:
      ValueError: for bad rules, an unknown method, calibration that is missing or not used, or bad batches; if the
        calibration's `work` folder holds another conversion.
      TypeError: for a model of another kind.
      NotImplementedError: if layers that are to be calibrated run inside a loop or under `vmap`.

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
    calibration = Calibration.of(calibration)
    made = functional(model, params, arguments_of(calibration.as_batches()[0]))
    return mixed_rules(
        made, rule, calibration, patterns=patterns, groups=groups, cost=cost, loss=loss
    )

"""The decoder as a model family (`slidejax.functional.Family`), and converting it.

The layers of a decoder show their inputs when they are watched, so that calibration, pruning stage
by stage and mixed patterns work as for every family.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from slidejax import conversion, nnx
from slidejax.functional import Family, Functional, arguments_of
from slidejax.lm.decoder.apply import apply
from slidejax.lm.decoder.config import DecoderConfig
from slidejax.lm.decoder.model import Decoder
from slidejax.ops.meshes import automatic
from slidejax.prune.model.calibration import Calibration
from slidejax.prune.model.methods import Method
from slidejax.rules import Prune, Report, Rule, RuleSet, Skipped
from slidejax.token_ids import check_rows, int32_ids
from slidejax.weights.pattern import Pattern

__all__ = ["FAMILY", "HIDDEN_LAYERS", "Output", "convert", "eight_bit", "functional"]

# All linear layers but the output embedding.
HIDDEN_LAYERS = r"(?!lm_head(?:/kernel)?$).*"
# The layers that read the product of a gate and another projection.
_GATED_INPUTS = r".*down_proj(?:/kernel)?"


class Output(NamedTuple):
    """The result of a decoder as a function of its parameters; losses for `mixed` get it.

    Attributes:
      logits: float32 `[batch, tokens, vocab]`.
    """

    logits: jax.Array


def functional(model: Decoder, params: Any = None, example: tuple = ()) -> Functional:
    """A decoder as a function of its parameters.

    `run` returns an `Output`. `pack` takes a single pattern or `Rule` for all linear layers but the
    output embedding.

    Args:
      model: the decoder; it stays as it is.
      params: parameters that take the place of its own.
      example: not needed.

    >>> from slidejax.lm.decoder.examples import tiny
    >>> made = functional(tiny())
    >>> converted = made.pack(made.params, "6:8")
    >>> converted.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].shape
    (32, 48)
    """

    params = automatic(model.params if params is None else params)
    return functional_of(model.config, params, model.with_params)


def functional_of(
    config: DecoderConfig, params: Any, make: Callable[[Any], Decoder] | None = None
) -> Functional:
    """A decoder of a configuration as a function of its parameters.

    Args:
      config: the configuration.
      params: the parameters, or their shapes and dtypes.
      make: makes a decoder of parameters. None: one without files.
    """

    def run(params: Mapping[str, Any], batch: Any) -> Output:
        return Output(apply(config, params, *arguments_of(batch))[0])

    def pack(params: Any, rules: Any, *, prune: Any = None, report: Any = None) -> Decoder:
        if isinstance(rules, (str, Pattern, Rule)):
            rules = [(HIDDEN_LAYERS, rules)]
        model = Decoder(config, params) if make is None else make(params)
        converted = nnx.convert(model, rules, prune=prune, report=report)
        assert isinstance(converted, Decoder)  # a clone
        return converted

    return Functional(run, params, pack, functools.partial(_check_batch, config))


FAMILY = Family("a slidejax.lm.Decoder", lambda model: isinstance(model, Decoder), functional)
conversion.register(FAMILY)


def eight_bit(pattern: str | Pattern) -> list[tuple[str, Rule]]:
    """The rules for 8-bit layers that lose least: int8, and e4m3 where a gate makes the input.

    A gate's product has spikes: single channels of a token are 13 to 40 times its root mean square
    in Qwen2.5-Coder-0.5B, and 4 to 5 times in the inputs of other layers. int8 has one step for a
    whole token, so that a spike leaves coarse steps to all other channels. e4m3 has fine steps
    beside a spike (docs/accuracy.md). The two take the same memory.

    Args:
      pattern: the pattern of all layers, such as "6:8" or "dense".

    Returns:
      Rules for `convert`: the down projections of MLPs, then all other layers but the output
      embedding. The first is optional: a model need not have down projections.

    Raises:
      ValueError: for a bad pattern.

    >>> for path, rule in eight_bit("6:8"):
    ...     print(path, rule)
    .*down_proj(?:/kernel)? 6:8 float8_e4m3fn
    (?!lm_head(?:/kernel)?$).* 6:8 int8
    """
    return [
        (_GATED_INPUTS, Rule(pattern, qdtype="float8_e4m3fn", optional=True)),
        (HIDDEN_LAYERS, Rule(pattern, qdtype="int8")),
    ]


def convert(
    model: Decoder,
    rules: Any,
    method: str | Method | Prune | None = None,
    calibration: Any = None,
    *,
    report: Report | None = None,
) -> Decoder:
    """Prunes and packs the linear layers of a decoder.

    Args:
      model: the decoder. It stays as it is.
      rules: see `slidejax.rules`, with paths such as `model/layers/0/mlp/up_proj/kernel`. A single
        pattern or `Rule` is for all linear layers but the output embedding. A tied model gets an
        output embedding of its own if a rule converts `lm_head/kernel`.
      method: "magnitude", "wanda", "sparsegpt", a `slidejax.prune.Method`, or a function
        (`slidejax.rules.Prune`). None means "sparsegpt" with calibration and "magnitude" without.
      calibration: for "wanda" and "sparsegpt": token ids `[sequences, length]`, or a
        `slidejax.prune.Calibration`.
      report: an empty `slidejax.Report`, which is filled in.

    Returns:
      A new decoder with packed weights, and the same files.

    Raises:
      ValueError: for bad rules, an unknown method, or calibration that is missing or not used, or
        has tokens that the model does not have, or rows that are longer than its context.
      TypeError: if `model` is no decoder, or `report` no report.

    >>> import slidejax as sj
    >>> from slidejax.lm.decoder.examples import tiny
    >>> tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 64)
    >>> report = sj.Report()
    >>> model = convert(tiny(), "6:8", "wanda", tokens, report=report)
    >>> len(report.converted), model(tokens).shape
    (14, (2, 32, 64))
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model must be a slidejax.lm.Decoder, got {type(model).__name__}")
    if calibration is not None:
        check_tokens(calibration, model.config)
    if report is not None and not isinstance(report, Report):
        raise TypeError(f"report must be a slidejax.Report, got {type(report).__name__}")
    if model.config.tied and converts_head(rules):
        model = _with_own_head(model)
    return conversion.convert(model, rules, calibration, method=method, report=report)


def check_tokens(calibration: Any, config: DecoderConfig) -> None:
    """Raises ValueError for ids outside the vocabulary, other values, and rows too long."""
    for batch in Calibration.of(calibration).as_batches():
        _check_batch(config, batch)


def _check_batch(config: DecoderConfig, batch: Any) -> None:
    ids, *rest = arguments_of(batch)
    if rest and rest[0] is not None:  # padding, at position -1, may have any id
        positions = np.asarray(rest[0])
        if positions.shape == np.shape(ids):
            ids = np.where(positions < 0, 0, int32_ids(ids, "calibration"))
            ids = ids[:, (positions >= 0).any(0)]
    check_rows(ids, config.vocab_size, config.max_positions)


def converts_head(rules: Any) -> bool:
    """Whether a rule is for the output embedding."""
    if isinstance(rules, (str, Pattern, Rule)):
        return False
    try:
        RuleSet(rules).match("lm_head/kernel")
    except Skipped:
        return False
    return True


def _with_own_head(model: Decoder) -> Decoder:
    """The decoder with its output embedding as a layer beside the input embedding."""
    config = dataclasses.replace(model.config, tied=False)
    params = model.params
    embedding = params["model"]["embed_tokens"]["embedding"]
    params = {**params, "lm_head": {"kernel": embedding.T}}
    return type(model)(config, params, files=model.files, about=model.about)

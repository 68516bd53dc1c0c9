"""Hugging Face's Flax models as a model family (`slidejax.functional.Family`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import flax.linen as nn
import numpy as np

from slidejax import linen
from slidejax.functional import Family, Functional, arguments_of
from slidejax.huggingface.model import check_model, init_arguments, is_model, params_of, with_params
from slidejax.kinds import check_kind
from slidejax.rules import HEADS, Rule
from slidejax.token_ids import check_rows
from slidejax.weights.pattern import Pattern

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

__all__ = ["FAMILY", "HIDDEN_LAYERS", "functional"]

# All linear layers but output embeddings. These are the heads of language models, often tied to the
# input embedding.
HIDDEN_LAYERS = f"(?!{HEADS}$).*"


def functional(
    flax_model: FlaxPreTrainedModel, params: Mapping | None = None, example: tuple = ()
) -> Functional:
    """A Hugging Face Flax model as a function of its parameters.

    `pack` takes a single pattern or `Rule` for all linear layers but the output embedding
    (`HIDDEN_LAYERS`).

    Args:
      flax_model: a model of any Flax class of transformers.
      params: parameters that take the place of the model's own.
      example: not needed, because the model knows an example of its input.

    Raises:
      TypeError: if it is not a Flax model of transformers.
      ValueError: if it holds no parameters and none are given.
    """
    check_model(flax_model)
    if params is not None:
        check_kind(params, Mapping, "params", "nested dicts of the model's parameters")
    rngs, args, kwargs = init_arguments(flax_model)

    def run(params, batch):
        with nn.intercept_methods(linen.show_layers):
            if isinstance(batch, Mapping):  # as tokenizers of transformers return it
                return flax_model(**batch, params=params)
            return flax_model(*arguments_of(batch), params=params)

    def pack(params, rules, *, prune=None, report=None):
        if isinstance(rules, (str, Pattern, Rule)):
            rules = [(HIDDEN_LAYERS, rules)]
        module = flax_model.module
        packed = linen.convert(
            params, rules, module, *args, rngs=rngs, prune=prune, report=report, **kwargs
        )
        return with_params(flax_model, packed)

    def check(batch):
        given = batch.get("input_ids") if isinstance(batch, Mapping) else arguments_of(batch)[0]
        ids, config = np.asarray(given), flax_model.config
        vocab = getattr(config, "vocab_size", None)
        if vocab is not None and ids.ndim == 2 and np.issubdtype(ids.dtype, np.integer):
            check_rows(ids, vocab, getattr(config, "max_position_embeddings", None))

    return Functional(run, params_of(flax_model) if params is None else params, pack, check)


FAMILY = Family("a Flax model of transformers", is_model, functional)

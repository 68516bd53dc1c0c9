"""Models as they serve on this device: conversion, a summary of the weights, samples of text."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax

from slidejax.lm.decoder.apply import apply
from slidejax.lm.decoder.family import convert as convert_decoder
from slidejax.lm.decoder.fuse import serving as serving_params
from slidejax.lm.decoder.model import Decoder
from slidejax.lm.generate import Generator
from slidejax.rules import Report, Rule
from slidejax.variants.prepared import weights_of
from slidejax.variants.serving import serving

__all__ = ["Called", "Sample", "Summary", "called", "convert", "ready", "summary", "with_params"]


class _Sizes(NamedTuple):
    """The sizes of a decoder under the names of transformers."""

    vocab_size: int
    max_position_embeddings: int


class _Output(NamedTuple):
    logits: jax.Array


class Called:
    """A decoder that is called as a Flax model of transformers is, so that both can be evaluated.

    Args:
      decoder: the decoder.
      params: its parameters, in any layout and form that `slidejax.lm.decoder.apply` takes.

    Attributes:
      decoder, params: as given.
      config: `vocab_size` and `max_position_embeddings`.
    """

    def __init__(self, decoder: Decoder, params: Any):
        self.decoder, self.params = decoder, params
        self.config = _Sizes(decoder.config.vocab_size, decoder.config.max_positions)

    def __call__(self, ids: jax.Array, params: Any = None) -> _Output:
        """`logits`, float32 `[batch, tokens, vocab]`."""
        params = self.params if params is None else params
        return _Output(apply(self.decoder.config, params, ids)[0])


def called(model: Any) -> Any:
    """A model that can be called with ids and parameters; a Flax model is one already."""
    return Called(model, model.params) if isinstance(model, Decoder) else model


@dataclasses.dataclass(frozen=True)
class Summary:
    """The packed weights of a model in three words.

    Attributes:
      pattern: the patterns, joined with "+"; "original" if there are no packed weights.
      dtype: the dtypes, joined with "+"; "original" if there are no packed weights.
      bytes: the bytes of the packed weights, without prepared forms.
    """

    pattern: str
    dtype: str
    bytes: int


def summary(params: Any) -> Summary:
    """Sums up the `SlideWeight`s of a tree.

    >>> import numpy as np, slidejax as sj
    >>> summary({"kernel": sj.pack(np.ones((64, 32), np.float32), "6:8", dtype="int8")})
    Summary(pattern='6:8', dtype='int8', bytes=1920)
    """
    weights = weights_of(params)
    patterns = sorted({w.pattern for w in weights}, key=lambda p: -p.density)
    return Summary(
        "+".join(map(str, patterns)) or "original",
        "+".join(sorted({w.dtype.name for w in weights})) or "original",
        sum(w.replace(prepared={}).nbytes for w in weights),
    )


def convert(
    model: Any, rule: Rule | list, method: Any, calibration: Any
) -> tuple[Any, Report, float]:
    """Converts a decoder or a Flax model of transformers.

    Returns:
      The converted model, the report, and the seconds until the weights were there.
    """
    report = Report()
    begin = time.perf_counter()
    if isinstance(model, Decoder):
        sparse = convert_decoder(model, rule, method, calibration, report=report)
    else:
        from slidejax import huggingface

        sparse = huggingface.convert(model, rule, method, calibration, report=report)
    jax.block_until_ready(sparse.params)
    return sparse, report, time.perf_counter() - begin


def with_params(model: Any, params: Any) -> Any:
    """A copy of a decoder or a Flax model with other parameters."""
    if isinstance(model, Decoder):
        return model.with_params(params)
    from slidejax import huggingface

    return huggingface.with_params(model, params)


def ready(model: Any) -> Any:
    """The model in the form in which this device serves it.

    On a GPU the projections of a Flax model are fused, and elsewhere its weights are replaced by
    those that `slidejax.variants.serving` makes. A decoder becomes a `Called` with the parameters
    of `slidejax.lm.decoder.fuse.serving`.
    """
    if isinstance(model, Decoder):
        return Called(model, serving_params(model.params))
    from slidejax import huggingface

    if jax.default_backend() == "gpu":
        return huggingface.fuse_projections(model)
    return huggingface.with_params(model, serving(model.params))


class Sample:
    """The continuation of a prompt by a model that always takes the likeliest token.

    It is computed in the background from the start, and `text` waits for it.

    Args:
      model: the model that writes, as `ready` made it.
      loaded: the model that it was made from, for its tokenizer.
      prompt: the text to continue. It begins with the start of a text where the tokenizer adds one.
      max_new_tokens: the largest number of tokens to write.
      pool: the executor that compiles and writes.

    Raises:
      ValueError: if there is no tokenizer, or the prompt does not fit.
    """

    def __init__(self, model: Any, loaded: Any, prompt: str, max_new_tokens: int, pool: Executor):
        ids = loaded.encode(prompt, start=True)
        if isinstance(model, Called):
            decoder, options = model.decoder, {"max_new_tokens": max_new_tokens}
            stream = decoder.stream(ids, params=model.params, **options)
            self._text = pool.submit("".join, stream)
            return
        generator = Generator(model, max_new_tokens)
        generator.check(ids)
        self._text = pool.submit(lambda: loaded.tokenizer.decode(generator(ids).tokens))

    def text(self) -> str:
        """The continuation, without the prompt."""
        return self._text.result()

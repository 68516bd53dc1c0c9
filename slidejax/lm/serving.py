"""Models as they serve on this device: conversion, a summary of the weights, samples of text."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import Executor
from typing import Any

import jax

from slidejax.lm.generate import Generator
from slidejax.lm.models import LoadedModel
from slidejax.rules import Report, Rule
from slidejax.variants.prepared import weights_of
from slidejax.variants.serving import serving

__all__ = ["Sample", "Summary", "convert", "ready", "summary"]


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
    """Calls `slidejax.huggingface.convert`.

    Returns:
      The converted model, the report, and the seconds until the weights were there.
    """
    from slidejax import huggingface

    report = Report()
    begin = time.perf_counter()
    sparse = huggingface.convert(model, rule, method=method, calibration=calibration, report=report)
    jax.block_until_ready(sparse.params)
    return sparse, report, time.perf_counter() - begin


def ready(model: Any) -> Any:
    """The model in the form in which this device serves it.

    On a GPU its projections are fused. Elsewhere its weights are replaced by those that
    `slidejax.variants.serving` makes.
    """
    from slidejax import huggingface

    if jax.default_backend() == "gpu":
        return huggingface.fuse_projections(model)
    return huggingface.with_params(model, serving(model.params))


class Sample:
    """The continuation of a prompt by a model that always takes the likeliest token.

    The program compiles in the background from the start, and `text` waits for it.

    Args:
      model: the model that writes.
      loaded: the model that it was made from, for its tokenizer.
      prompt: the text to continue.
      max_new_tokens: the largest number of tokens to write.
      pool: the executor that compiles.

    Raises:
      ValueError: if there is no tokenizer, or the prompt does not fit.
    """

    def __init__(
        self, model: Any, loaded: LoadedModel, prompt: str, max_new_tokens: int, pool: Executor
    ):
        self._prompt, self._loaded = loaded.encode(prompt), loaded
        self._generator = Generator(model, max_new_tokens)
        self._generator.check(self._prompt)
        self._compiled = pool.submit(self._generator.compile, len(self._prompt))

    def text(self) -> str:
        """The continuation, without the prompt."""
        self._compiled.result()
        assert self._loaded.tokenizer is not None  # encode has raised otherwise
        return self._loaded.tokenizer.decode(self._generator(self._prompt).tokens)

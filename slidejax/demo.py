"""`slidejax demo`: one model, dense and with every pattern, measured on one text; then a sample of its writing.

Each row runs the deployed path: the model is converted, its own ``__call__`` is evaluated under `jax.jit` and its own
``.generate`` is timed under `jax.jit`. Programs for generating are compiled in a thread while the model is evaluated; nothing
else runs while generation is timed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from slidejax.evaluate import default_batch, evaluate
from slidejax.generate import Generator
from slidejax.models import LoadedModel
from slidejax.pattern import Pattern
from slidejax.prepared import prepare, weights_of
from slidejax.rules import Report, Rule

__all__ = ["Row", "Sample", "Summary", "convert", "rows", "summary"]

# Tokens timed in each row; the prompt is one token, so that what is compiled and timed is the decoding loop alone.
_TIMED_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      pattern: "dense" or a pattern.
      dtype: of the weights of the linear layers.
      perplexity, next_token_accuracy, tokens: from `slidejax.evaluate`.
      bytes: of the linear layers' weights, as they are: packed, with padding and scales.
      prepared_bytes: of what an implementation prepared beside them on this device (0: nothing).
      tokens_per_second: decoding one sequence under `jax.jit`, compilation excluded.
      convert_seconds: pruning, packing and quantising the model, compilation included; None for the dense model.
    """

    pattern: str
    dtype: str
    perplexity: float
    next_token_accuracy: float
    tokens: int
    bytes: int
    prepared_bytes: int
    tokens_per_second: float
    convert_seconds: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the packed weights of a model are; `pattern` and `dtype` join several with "+", or are "dense"."""

    pattern: str
    dtype: str
    bytes: int
    prepared_bytes: int


def summary(params: Any) -> Summary:
    """Sums up the `SlideWeight`s of a tree.

    >>> import slidejax as sj
    >>> summary({"kernel": sj.pack(np.ones((64, 32), np.float32), "6:8", dtype="int8")})
    Summary(pattern='6:8', dtype='int8', bytes=1920, prepared_bytes=0)
    """
    weights = weights_of(params)
    patterns = sorted({w.pattern for w in weights}, key=lambda p: -p.group)
    prepared = sum(leaf.nbytes for w in weights for leaf in jax.tree.leaves(dict(w.prepared)))
    return Summary(
        "+".join(map(str, patterns)) or "dense",
        "+".join(sorted({w.dtype.name for w in weights})) or "dense",
        sum(w.nbytes for w in weights) - prepared,
        prepared,
    )


def convert(model: Any, rule: Rule | list, method: Any, calibration: Any) -> tuple[Any, Report, float]:
    """`slidejax.huggingface.convert`, with its report and the seconds until the weights are there."""
    from slidejax import huggingface

    report = Report()
    begin = time.perf_counter()
    sparse = huggingface.convert(model, rule, method=method, calibration=calibration, report=report)
    jax.block_until_ready(sparse.params)
    return sparse, report, time.perf_counter() - begin


def ready(model: Any) -> Any:
    """The model with what this device prepares outside the loop: on a CPU the dense form, so that no step unpacks."""
    from slidejax import huggingface

    return huggingface.with_params(model, prepare(model.params))


def rows(
    loaded: LoadedModel,
    tokens: np.ndarray,
    pool: Executor,
    *,
    patterns: Sequence[str] = ("14:16", "6:8", "4:6", "2:4"),
    dtypes: Sequence[str | None] = ("int8", None),
    method: Any = "magnitude",
    calibration: Any = None,
    window: int = 512,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Iterator[tuple[Row, Any]]:
    """Converts and measures, row by row.

    Args:
      loaded: a dense model: first row, then one for each pattern and dtype. A model that is converted already gives
        one row.
      tokens: the text.
      pool: one worker, which compiles beside other work.
      patterns: what to convert to.
      dtypes: of the weights; None leaves them unquantised.
      method, calibration: how to prune (`slidejax.huggingface.convert`).
      window: predictions in one sequence.
      progress: called with a line that says what is being done and the share of the row that is done.

    Yields:
      The row and the model that it was measured on.

    Raises:
      ValueError: a bad pattern, dtype, method or text; before anything is measured where that can be known.
    """
    from slidejax import huggingface
    from slidejax.prune.calibration import CALIBRATED

    rules = [Rule(Pattern.parse(p), qdtype=d) for p in patterns for d in dtypes]
    model = loaded.model
    found = summary(model.params)
    if found.pattern != "dense":
        model = ready(model)
        yield _measure(model, tokens, pool, window, found.dtype, None, progress), model
        return
    first = _measure(model, tokens, pool, window, np.dtype(model.dtype).name, None, progress)
    yield dataclasses.replace(first, bytes=huggingface.planned(model, "2:4").bytes_before), model
    if method in CALIBRATED and rules:  # once for all rows
        tell = lambda done, total: progress(f"calibrating: {done} of {total} sequences", 0.0)  # noqa: E731
        method, calibration = huggingface.calibrated(model, method, calibration, progress=tell), None
    for rule in rules:
        name = f"{rule.pattern} {np.dtype(model.dtype).name if rule.qdtype is None else np.dtype(rule.qdtype).name}"
        progress(f"{name}: converting", 0.0)
        sparse, _, seconds = convert(model, rule, method, calibration)
        sparse = ready(sparse)
        yield _measure(sparse, tokens, pool, window, name.split()[1], seconds, progress), sparse


def _measure(
    model: Any, tokens: Any, pool: Executor, window: int, dtype: str, seconds: float | None, progress: Any
) -> Row:
    found = summary(model.params)
    name = f"{found.pattern} {dtype}"
    progress(f"{name}: compiling", 0.1)
    positions = getattr(model.config, "max_position_embeddings", window)
    generator = Generator(model, min(_TIMED_TOKENS, positions - 1), stop=False)
    compiled = pool.submit(generator.compile, 1)
    quality = evaluate(
        model,
        tokens,
        window=min(window, positions),
        batch=default_batch(),
        progress=lambda done, total: progress(f"{name}: {done} of {total} tokens", 0.2 + 0.4 * done / total),
    )
    progress(f"{name}: generating", 0.6)
    compiled.result()
    start = [int(tokens[0])]
    generator(start)  # the first run still pays for memory that the next one finds ready
    speed = generator(start).tokens_per_second
    progress(f"{name}: done", 1.0)
    return Row(
        found.pattern,
        dtype,
        quality.perplexity,
        quality.next_token_accuracy,
        quality.tokens,
        found.bytes,
        found.prepared_bytes,
        speed,
        seconds,
    )


class Sample:
    """What a model writes after a prompt, the likeliest token each time.

    Args:
      model: to generate with.
      loaded: whose tokenizer to use.
      prompt: text.
      max_new_tokens: how many tokens to write at most.
      pool: where to compile, from now on.

    Raises:
      ValueError: there is no tokenizer, or the prompt does not fit.
    """

    def __init__(self, model: Any, loaded: LoadedModel, prompt: str, max_new_tokens: int, pool: Executor):
        self._prompt, self._loaded = loaded.encode(prompt), loaded
        self._generator = Generator(model, max_new_tokens)
        self._generator.check(self._prompt)
        self._compiled = pool.submit(self._generator.compile, len(self._prompt))

    def text(self) -> str:
        self._compiled.result()
        assert self._loaded.tokenizer is not None  # encode has raised otherwise
        return self._loaded.tokenizer.decode(self._generator(self._prompt).tokens)

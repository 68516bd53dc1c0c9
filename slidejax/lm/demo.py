"""`slidejax demo`: one model, dense and with every pattern, measured on one text; then a sample of its writing.

Each row runs the deployed path: the model is converted, its own ``__call__`` is evaluated under `jax.jit` and its own
``.generate`` is timed under `jax.jit`. Parameters are arguments of both programs, so that rows whose parameters have one
structure share them: on a CPU those of one dtype (`slidejax.prepared.serving`). Programs for generating are compiled in a
thread while the model is evaluated; nothing else runs while generation is timed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from slidejax.lm.evaluate import Evaluator, default_batch
from slidejax.lm.generate import Generator
from slidejax.lm.models import LoadedModel
from slidejax.rules import Report, Rule
from slidejax.variants.prepared import DenseWeight, map_weights, serving, weights_of
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight, quantize
from slidejax.weights.pattern import Pattern

__all__ = ["Row", "Sample", "Summary", "convert", "rows", "summary"]

# Tokens timed in each row, twice; the prompt is one token, so that what is compiled and timed is the decoding loop alone.
_TIMED_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      pattern: of the packed weights; "dense" for the model as it was, too.
      dtype: of the weights of the linear layers.
      perplexity, next_token_accuracy, tokens: from `slidejax.evaluate`.
      bytes: of the linear layers' weights, as they are: packed, with padding and scales.
      prepared_bytes: of the form in which this device serves them, beside the packed one or in its place (0: there is none).
      tokens_per_second: decoding one sequence under `jax.jit`, compilation excluded.
      convert_seconds: pruning and packing the model, once for all dtypes, and quantising it, compilation included; None for
        the dense model.
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
    """What the packed weights of a model are; `pattern` and `dtype` join several with "+", and `pattern` is "dense" too where there are none."""

    pattern: str
    dtype: str
    bytes: int


def summary(params: Any) -> Summary:
    """Sums up the `SlideWeight`s of a tree.

    >>> import slidejax as sj
    >>> summary({"kernel": sj.pack(np.ones((64, 32), np.float32), "6:8", dtype="int8")})
    Summary(pattern='6:8', dtype='int8', bytes=1920)
    """
    weights = weights_of(params)
    patterns = sorted({w.pattern for w in weights}, key=lambda p: -p.density)
    return Summary(
        "+".join(map(str, patterns)) or "dense",
        "+".join(sorted({w.dtype.name for w in weights})) or "dense",
        sum(w.replace(prepared={}).nbytes for w in weights),
    )


def _prepared_bytes(params: Any) -> int:
    """Of the prepared forms in a tree that serves."""
    forms: list[Any] = [dict(w.prepared) for w in weights_of(params)]
    forms += [w for w in jax.tree.leaves(params, is_leaf=_is_dense_form) if _is_dense_form(w)]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(forms))


def _is_dense_form(node: Any) -> bool:
    return isinstance(node, DenseWeight)


def convert(
    model: Any, rule: Rule | list, method: Any, calibration: Any
) -> tuple[Any, Report, float]:
    """`slidejax.huggingface.convert`, with its report and the seconds until the weights are there."""
    from slidejax import huggingface

    report = Report()
    begin = time.perf_counter()
    sparse = huggingface.convert(model, rule, method=method, calibration=calibration, report=report)
    jax.block_until_ready(sparse.params)
    return sparse, report, time.perf_counter() - begin


def ready(model: Any) -> Any:
    """The model as it serves on this device: on a GPU with its projections fused, else as `slidejax.prepared.serving` makes it."""
    from slidejax import huggingface

    if jax.default_backend() == "gpu":
        return huggingface.fuse_projections(model)
    return huggingface.with_params(model, serving(model.params))


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
    from slidejax.prune.model.calibration import CALIBRATED

    rules = [
        Rule(Pattern.parse(p), qdtype=d) for p in patterns for d in dtypes
    ]  # what is wrong with them is said first
    model, found = loaded.model, summary(loaded.model.params)
    meter = _Meter(huggingface.with_params(model, model.params), tokens, pool, window, progress)
    if found.bytes:
        served = ready(model)
        yield meter(found, served, None), served
        return
    dtype = np.dtype(model.dtype).name
    dense = Summary("dense", dtype, huggingface.planned(model, "2:4").bytes_before)
    yield meter(dense, model, None), model
    if method in CALIBRATED and rules:  # once for all rows
        tell = lambda done, total: progress(f"calibrating: {done} of {total} sequences", 0.0)  # noqa: E731
        method, calibration = (
            huggingface.calibrated(model, method, calibration, progress=tell),
            None,
        )
    for pattern in patterns:
        progress(f"{pattern}: converting", 0.0)
        packed, _, shared = convert(
            model, Rule(pattern, qdtype=None), method, calibration
        )  # once for all dtypes
        for dtype in dtypes:
            sparse, seconds = _in_dtype(packed, dtype)
            served = ready(sparse)
            yield meter(summary(sparse.params), served, shared + seconds), served


def _in_dtype(model: Any, dtype: str | None) -> tuple[Any, float]:
    """A float-packed model with values of another dtype, as if it had been converted to it; and the seconds that took."""
    from slidejax import huggingface

    if dtype is None:
        return model, 0.0
    resolved, begin = numerics.check_dtype(dtype), time.perf_counter()

    def turn(w: SlideWeight) -> SlideWeight:
        return (
            quantize(w, resolved)
            if numerics.is_quantized(resolved)
            else w.replace(values=w.values.astype(resolved), prepared={})
        )

    params = jax.block_until_ready(map_weights(turn, model.params))
    return huggingface.with_params(model, params), time.perf_counter() - begin


class _Meter:
    """Measures a model with one set of parameters after another; what was compiled for one serves the next if it can."""

    def __init__(
        self,
        model: Any,
        tokens: np.ndarray,
        pool: Executor,
        window: int,
        progress: Callable[[str, float], None],
    ):
        positions = getattr(model.config, "max_position_embeddings", window)
        self._evaluator = Evaluator(model, window=min(window, positions), batch=default_batch())
        self._generator = Generator(model, min(_TIMED_TOKENS, positions - 1), stop=False)
        self._tokens, self._pool, self._progress = tokens, pool, progress

    def __call__(self, found: Summary, served: Any, seconds: float | None) -> Row:
        """The row of a model as it serves; `found` says what it is, `seconds` how long its conversion took."""
        name, params, progress = f"{found.pattern} {found.dtype}", served.params, self._progress
        progress(f"{name}: compiling", 0.1)
        compiled = self._pool.submit(self._generator.compile, 1, params=params)

        def tell(done, total):
            return progress(f"{name}: {done} of {total} tokens", 0.2 + 0.4 * done / total)

        quality = self._evaluator(self._tokens, params, progress=tell)
        progress(f"{name}: generating", 0.6)
        compiled.result()
        start = [int(self._tokens[0])]
        # the faster of two: the first may still pay for memory that the next one finds ready, either may be disturbed
        speed = max(self._generator(start, params=params).tokens_per_second for _ in range(2))
        progress(f"{name}: done", 1.0)
        return Row(
            found.pattern,
            found.dtype,
            quality.perplexity,
            quality.next_token_accuracy,
            quality.tokens,
            found.bytes,
            _prepared_bytes(params),
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

    def __init__(
        self, model: Any, loaded: LoadedModel, prompt: str, max_new_tokens: int, pool: Executor
    ):
        self._prompt, self._loaded = loaded.encode(prompt), loaded
        self._generator = Generator(model, max_new_tokens)
        self._generator.check(self._prompt)
        self._compiled = pool.submit(self._generator.compile, len(self._prompt))

    def text(self) -> str:
        self._compiled.result()
        assert self._loaded.tokenizer is not None  # encode has raised otherwise
        return self._loaded.tokenizer.decode(self._generator(self._prompt).tokens)

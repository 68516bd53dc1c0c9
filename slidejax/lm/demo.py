"""The rows of `slidejax demo`: a model and its conversions to every pattern, measured on one text.

Each row runs the deployed path: the model is converted, its own `__call__` is evaluated under
`jax.jit`, and its own `generate`, whose programs are compiled, is timed. Parameters are arguments
of the programs, so that rows whose parameters have one structure share them: on a CPU those of one
dtype (`slidejax.variants.serving`). Programs for generating are compiled in a thread while the
model is evaluated; nothing else runs while generation is timed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from slidejax.lm.decoder.model import Decoder
from slidejax.lm.evaluate import Evaluator, default_batch, fitting
from slidejax.lm.generate import Generator
from slidejax.lm.reading import Loaded
from slidejax.lm.serving import Called, Summary, called, convert, ready, summary, with_params
from slidejax.lm.texts import WINDOW
from slidejax.prune.model.convert import calibrated
from slidejax.rules import Rule
from slidejax.variants.prepared import map_weights, weights_of
from slidejax.variants.serving import ServingWeight
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight, quantize
from slidejax.weights.pattern import Pattern

__all__ = ["Row", "rows"]

# Tokens timed in each row, twice. The prompt is one token, so that little but the loop that writes
# is timed: a decoder reads it padded to 16.
_TIMED_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      pattern: of the packed weights; "original" for the original model.
      dtype: of the weights of the linear layers.
      perplexity, next_token_accuracy, tokens: from `slidejax.lm.evaluate`.
      bytes: of the linear layers' weights, as they are: packed, with padding and scales.
      prepared_bytes: of the form in which this device serves them, beside the packed one or in its
        place (0: there is none).
      tokens_per_second: writing after a prompt of one token, which is read in the same time;
        compilation excluded.
      convert_seconds: pruning and packing the model, once for all dtypes, and quantising it,
        compilation included; None for the original model.
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


def _prepared_bytes(params: Any) -> int:
    """The bytes of the prepared forms and serving weights in a tree of parameters."""
    forms: list[Any] = [dict(w.prepared) for w in weights_of(params)]
    forms += [w for w in jax.tree.leaves(params, is_leaf=_is_dense_form) if _is_dense_form(w)]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(forms))


def _is_dense_form(node: Any) -> bool:
    return isinstance(node, ServingWeight)


def rows(
    loaded: Loaded,
    tokens: np.ndarray,
    pool: Executor,
    *,
    patterns: Sequence[str] = ("14:16", "6:8", "4:6", "2:4"),
    dtypes: Sequence[str | None] = ("int8", None),
    method: Any = "magnitude",
    calibration: Any = None,
    window: int = WINDOW,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Iterator[tuple[Row, Any]]:
    """Converts and measures, row by row.

    Args:
      loaded: an original model: first row, then one for each pattern and dtype. A model that is
        converted already gives one row.
      tokens: the text.
      pool: one worker, which compiles beside other work.
      patterns: what to convert to.
      dtypes: of the weights; None leaves them unquantised.
      method, calibration: how to prune (`slidejax.prune.convert`).
      window: predictions in one sequence.
      progress: called with a line that says what is being done and the share of the row that is
        done.

    Yields:
      The row and the model that it was measured on.

    Raises:
      ValueError: a bad pattern, dtype, method or text; before anything is measured where that can
        be known.
    """
    from slidejax import conversion
    from slidejax.prune.model.methods import CALIBRATED

    # Errors in the patterns and dtypes come before anything is measured.
    rules = [Rule(Pattern.parse(p), qdtype=d) for p in patterns for d in dtypes]
    model, found = loaded.model, summary(loaded.model.params)
    meter = _Meter(loaded, tokens, pool, window, progress)
    if found.bytes:
        served = ready(model)
        yield meter(found, served, None), served
        return
    size = conversion.functional(model).planned("2:4").bytes_before
    served = ready(model) if isinstance(model, Decoder) else model
    yield meter(Summary("original", np.dtype(model.dtype).name, size), served, None), served
    if method in CALIBRATED and rules:  # once for all rows

        def tell(done: int, total: int) -> None:
            progress(f"calibrating: {done} of {total} sequences", 0.0)

        method, calibration = (
            calibrated(conversion.functional(model), method, calibration, progress=tell),
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
    """A float-packed model as if it had been converted to that dtype, and the seconds it took."""
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
    return with_params(model, params), time.perf_counter() - begin


class _Meter:
    """Measures a model with several sets of parameters, which share programs if they can."""

    def __init__(
        self,
        loaded: Loaded,
        tokens: np.ndarray,
        pool: Executor,
        window: int,
        progress: Callable[[str, float], None],
    ):
        start = loaded.start
        window = fitting(window + len(start), loaded.model) - len(start)
        model = called(with_params(loaded.model, loaded.model.params))
        self._evaluator = Evaluator(model, window=window, batch=default_batch(), start=start)
        count = min(_TIMED_TOKENS, fitting(_TIMED_TOKENS + 1, loaded.model) - 1)
        self._writer = _Written(model, count) if isinstance(model, Called) else _Flax(model, count)
        self._tokens, self._pool, self._progress = tokens, pool, progress

    def __call__(self, found: Summary, served: Any, seconds: float | None) -> Row:
        """The row of a model as it serves, with its summary and the seconds of its conversion."""
        name, params, progress = f"{found.pattern} {found.dtype}", served.params, self._progress
        progress(f"{name}: compiling", 0.1)
        compiled = self._pool.submit(self._writer.compile, params)

        def tell(done, total):
            return progress(f"{name}: {done} of {total} tokens", 0.2 + 0.4 * done / total)

        quality = self._evaluator(self._tokens, params, progress=tell)
        progress(f"{name}: generating", 0.6)
        compiled.result()
        first = int(self._tokens[0])
        # the faster of two: the first may still pay for memory that the next one finds ready,
        # either may be disturbed
        speed = max(self._writer.tokens_per_second(first, params) for _ in range(2))
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


class _Flax:
    """How fast a Flax model writes."""

    def __init__(self, model: Any, count: int):
        self._generator = Generator(model, count, stop=False)

    def compile(self, params: Any) -> None:
        self._generator.compile(1, params=params)

    def tokens_per_second(self, first: int, params: Any) -> float:
        return self._generator([first], params=params).tokens_per_second


class _Written:
    """How fast a decoder writes."""

    def __init__(self, model: Called, count: int):
        self._decoder, self._count = model.decoder, count

    def compile(self, params: Any) -> None:
        # Programs are compiled when they first run.
        self.tokens_per_second(0, params)

    def tokens_per_second(self, first: int, params: Any) -> float:
        options = {"max_new_tokens": self._count, "ends": (), "params": params}
        begin = time.perf_counter()
        self._decoder.generate([first], **options)
        return self._count / (time.perf_counter() - begin)

"""`slidejax eval`: models side by side on one text, as a table and a picture, and their samples."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from slidejax.lm import serving
from slidejax.lm.evaluate import Evaluation, default_batch, evaluate, fitting
from slidejax.lm.reading import Loaded
from slidejax.lm.texts import WINDOW

__all__ = ["Compared", "check_vocabularies", "compare", "plot", "table"]

# Positions that are averaged in the picture; their loss falls fast at first and slowly later.
_BINS = 16


@dataclasses.dataclass(frozen=True)
class Compared:
    """One model and its results.

    Attributes:
      name: what the model was called.
      pattern: the patterns of its packed weights, "original" if it has none.
      dtype: of these weights, or of the model.
      result: the `Evaluation`.
      prompt, text: what it was asked to continue and what it wrote, the likeliest token each time;
        None: it was not asked.
    """

    name: str
    pattern: str
    dtype: str
    result: Evaluation
    prompt: str | None = None
    text: str | None = None

    @property
    def weights(self) -> str:
        """Pattern and dtype: "original float32" was not converted, "dense int8" only quantised."""
        return f"{self.pattern} {self.dtype}"

    def figures(self, text: str, reference: str | None) -> dict[str, Any]:
        """The figures as plain JSON."""
        value = {
            "model": self.name,
            "pattern": self.pattern,
            "dtype": self.dtype,
            "text": text,
            "perplexity": self.result.perplexity,
            "next_token_accuracy": self.result.next_token_accuracy,
            "tokens": self.result.tokens,
        }
        if self.result.agreement is not None:
            value |= {
                "reference": reference,
                "top1_agreement": self.result.agreement.top1,
                "kl": self.result.agreement.kl,
            }
        if self.text is not None:
            value |= {"prompt": self.prompt, "written": self.text}
        return value


def compare(
    models: Sequence[tuple[str, Loaded]],
    tokens: np.ndarray,
    *,
    window: int = WINDOW,
    batch: int | None = None,
    reference: Loaded | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 40,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Compared]:
    """Evaluates models on the same tokens, each as it will serve (`slidejax.lm.evaluate`).

    Args:
      models: names and models, original or converted.
      tokens: token ids of the text.
      window: predictions in one sequence; at most what the model with the fewest positions has.
      batch: sequences at a time; None: 2 on a CPU, 8 elsewhere.
      reference: measure agreement with this one.
      prompt: let each model continue it.
      max_new_tokens: at most this many tokens.
      progress: called with the model's name, the tokens predicted and all of them.

    Raises:
      ValueError: the models differ in their vocabulary, or the prompt does not fit.
    """
    named = {name: loaded.model for name, loaded in models}
    check_vocabularies(named if reference is None else named | {reference.name: reference.model})
    begun = max(len(loaded.start) for _, loaded in models)
    window = fitting(window + begun, *(loaded.model for _, loaded in models)) - begun
    rows = []
    with ThreadPoolExecutor(1) as pool:
        for name, loaded in models:
            model = serving.ready(loaded.model)
            # what writes compiles while the text is predicted
            sample = (
                None
                if prompt is None
                else serving.Sample(model, loaded, prompt, max_new_tokens, pool)
            )
            result = evaluate(
                model,
                tokens,
                window=window,
                batch=batch or default_batch(),
                reference=None if reference is None else serving.called(reference.model),
                start=loaded.start,
                progress=functools.partial(progress, name),
            )
            text = None if sample is None else sample.text()
            found = serving.summary(loaded.model.params)
            dtype = found.dtype if found.bytes else np.dtype(loaded.model.dtype).name
            rows.append(Compared(name, found.pattern, dtype, result, prompt, text))
    return rows


def check_vocabularies(models: Mapping[str, Any]) -> None:
    """Raises a ValueError if models, by their names, differ in the size of their vocabulary."""
    sizes = {name: model.config.vocab_size for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"models must share one vocabulary to be compared, got {sizes}")


def table(rows: Sequence[Compared], reference: str | None) -> Any:
    """The models side by side, for a terminal; the others are compared with the first one."""
    from rich.table import Table

    made = Table()
    for name in ("model", "weights"):
        made.add_column(name, overflow="fold")
    titles = ["perplexity", "next token right"]
    if len(rows) > 1:
        titles += ["perplexity, times the first", "of the first's accuracy"]
    if reference is not None:
        titles += [f"same choice as {reference}", "KL, nats"]
    first, lines = rows[0].result, []
    for row in rows:
        r = row.result
        cells = [f"{r.perplexity:.3f}", f"{100 * r.next_token_accuracy:.2f} %"]
        if len(rows) > 1:
            kept = (
                r.next_token_accuracy / first.next_token_accuracy
                if first.next_token_accuracy
                else float("nan")
            )
            cells += [f"{r.perplexity / first.perplexity:.4f}", f"{100 * kept:.2f} %"]
        if r.agreement is not None:
            cells += [f"{100 * r.agreement.top1:.2f} %", f"{r.agreement.kl:.4f}"]
        lines.append(cells)
    for i, title in enumerate(titles):
        made.add_column(
            title, justify="right", min_width=max(len(cells[i]) for cells in lines)
        )  # figures stay in one line
    for row, cells in zip(rows, lines, strict=True):
        made.add_row(row.name, row.weights, *cells)
    return made


def plot(rows: Sequence[Compared], path: str | os.PathLike[str], window: int) -> None:
    """Two pictures in one file: where in a window models lose, and how much single tokens suffer.

    Both show how much more than the first model the others lose (one model alone: what it loses).
    Left is the mean loss against the position in the window. It shows models that lose their first
    tokens, and models that forget a long context. Right is the share of tokens whose loss is above
    a threshold, against the threshold in nats. A model that is a little worse everywhere can have
    the same perplexity as one that is far worse on a few tokens. Here they look different.

    Args:
      rows: from `compare`.
      path: a file; its ending names the format (.png, .svg, .pdf).
      window: predictions in one sequence, as given to `compare`.

    Raises:
      ImportError: matplotlib is missing.
      ValueError: the ending is no format that it knows.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("pictures need the extra: pip install 'slidejax[plot]'") from e
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    alone = len(rows) == 1
    base = 0.0 if alone else rows[0].result.losses
    more = "nats" if alone else f"nats more than {_short(rows[0].name)}"
    for row in rows if alone else rows[1:]:
        lost = row.result.losses - base
        label = f"{_short(row.name)} ({row.weights}): {row.result.perplexity:.2f}"
        left.plot(*_by_position(lost, window), marker="o", label=label)
        right.plot(np.sort(lost)[::-1], 100 * np.arange(1, len(lost) + 1) / len(lost), label=label)
    left.set(
        xlabel="position in the window",
        ylabel=f"mean loss, {more}",
        title="loss by length of the context",
        xscale="log",
    )
    right.set(xlabel=more, ylabel="tokens above, %", title="loss of a token")
    if not alone:
        left.axhline(0, color="0.7", linewidth=1)
        right.axvline(0, color="0.7", linewidth=1)
        right.set_xlim(-2, 2)
    right.legend(
        title="perplexity"
        if alone
        else f"perplexity ({_short(rows[0].name)}: {rows[0].result.perplexity:.2f})"
    )
    for axes in (left, right):
        axes.grid(color="0.9")
    figure.savefig(path, dpi=150)


def _short(name: str) -> str:
    return os.path.basename(name.rstrip("/")) or name


def _by_position(losses: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of bins of positions, which are wider for long contexts, and mean losses there."""
    position = np.arange(len(losses)) % window
    edges = (
        np.unique(np.geomspace(1, min(window, len(losses)) + 1, _BINS + 1).round().astype(int)) - 1
    )
    centres, means = [], []
    for low, high in itertools.pairwise(edges):
        here = (position >= low) & (position < high)
        centres.append((low + high + 1) / 2)
        means.append(losses[here].mean())
    return np.asarray(centres), np.asarray(means)

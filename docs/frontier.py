"""Draws docs/frontier.svg: what each pattern loses, against what it gains.

    python docs/frontier.py

Losses and bytes are those of docs/frontier.json, which the tables of docs/accuracy.md have, too
(tests/test_docs.py holds them together). Times are those of the table of an H200 that ships with
the package. Nothing is estimated. Crosses are mixes of patterns, chosen by layer; a star is a
model that was recovered. The picture needs the extra `plot`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slidejax.bench.shapes import PRESETS
from slidejax.prune import measured_times
from slidejax.prune.model.costs import packed_bytes
from slidejax.weights.pattern import Pattern

DOCS = Path(__file__).parent
DEVICE, ROWS, PRESET = "NVIDIA H200", 4096, "qwen2.5-7b"
PATTERNS = ("dense", "14:16", "6:8", "4:6", "2:4")


def speeds() -> dict[str, float]:
    """How many times as fast as `dense` the linear layers of one block are, by pattern.

    The fastest implementation counts, so a pattern is as fast as its dense codes at least.
    """
    cost = measured_times(ROWS, device=DEVICE)
    times = {
        pattern: sum(cost((k, n), Pattern.parse(pattern)) for n, k in PRESETS[PRESET])
        for pattern in PATTERNS
    }
    return {pattern: times["dense"] / time for pattern, time in times.items()}


def sizes(quality: dict[str, Any], megabytes: dict[str, float]) -> dict[str, float]:
    """How many times as small as with `dense` the packed layers of a model are, by pattern.

    Where no bytes were recorded for a model, its layers fill whole groups of every pattern: then
    their bytes follow from the pattern.
    """
    if "mixes" in quality:
        megabytes = {p: packed_bytes((1, 1), Pattern.parse(p)) for p in PATTERNS}
    return {pattern: megabytes["dense"] / size for pattern, size in megabytes.items()}


def recorded() -> dict[str, Any]:
    """What docs/frontier.json holds."""
    return json.loads((DOCS / "frontier.json").read_text(encoding="utf-8"))


def draw(path: Path) -> None:
    """Draws the picture: speed on the left, bytes on the right."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    found = recorded()
    megabytes = found["megabytes"]["values"]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, kind, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("speed", "size"),
        (
            f"times as fast as dense int8, {ROWS:,} rows\n(layers of Qwen2.5-7B, H200)",
            "times as small as dense int8\n(packed layers)",
        ),
        strict=True,
    ):
        for i, quality in enumerate(found["quality"]):
            values = quality["values"]
            gain = speeds() if kind == "speed" else sizes(quality, megabytes)
            axes.plot(
                [gain[p] for p in PATTERNS],
                [values[p] for p in PATTERNS],
                marker="o",
                color=f"C{i}",
                label=quality["name"],
            )
            mixes = quality.get("mixes", {}).get(kind, {})
            if mixes:
                axes.plot(
                    [float(at) for at in mixes],
                    [*mixes.values()],
                    "x",
                    color=f"C{i}",
                    markersize=8,
                    label="the same, patterns chosen by layer",
                )
            for pattern, value in quality.get("recovered", {}).items():
                named = {"color": f"C{i}", "label": f"the same, {pattern} recovered"}
                axes.plot([gain[pattern]], [value], "*", markersize=12, **named)
        worst = found["quality"][0]["values"]
        gain = speeds() if kind == "speed" else sizes(found["quality"][0], megabytes)
        for p in PATTERNS:
            beside = (6, -4) if p == "dense" else (-6, 2)
            side = "left" if p == "dense" else "right"
            axes.annotate(
                p, (gain[p], worst[p]), xytext=beside, textcoords="offset points", ha=side
            )
        axes.margins(0.12, 0.08)
        axes.set(xlabel=label, yscale="log")
        axes.yaxis.set_major_locator(FixedLocator([1, 1.1, 1.25, 1.5, 2, 2.5]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("perplexity, times the original's")
    figure.axes[1].legend(loc="upper left", fontsize="small")
    # without a date and random names, so that the file changes with the numbers only
    with matplotlib.rc_context({"svg.hashsalt": "slidejax", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(DOCS / "frontier.svg")

"""The output that the races share: the machine they ran on, tables, and figures as text."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from slidejax.bench.timing import Clock

__all__ = ["grid", "machine", "machine_line", "microseconds", "ratio", "times_as"]


def machine(clock: Clock) -> dict[str, Any]:
    """The facts about the machine in every result: device, versions, XLA's flags, date, clock."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "slidejax": _version(),
        "date": datetime.date.today().isoformat(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "clock": {"warmup_s": clock.warmup, "seconds": clock.seconds, "rounds": clock.rounds},
    }


def _version() -> str:
    try:
        return version("slidejax")
    except PackageNotFoundError:
        return f"not installed ({Path(__file__).parents[1]})"


def machine_line(results: dict[str, Any]) -> str:
    """The results of `machine` in one line."""
    clock = results["clock"]
    return (
        f"{results['device']}, jax {results['jax']}, slidejax {results['slidejax']}, "
        f"{results['date']}; each measured for {clock['seconds']} s after {clock['warmup_s']} s, "
        f"{clock['rounds']} round(s); bfloat16 x to bfloat16 y, microseconds"
    )


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, or None if one of them is None."""
    return None if a is None or b is None else a / b


def microseconds(value: float | None) -> str:
    """A number with one decimal, or "-" for None.

    >>> microseconds(12.34), microseconds(None)
    ('12.3', '-')
    """
    return "-" if value is None else f"{value:.1f}"


def times_as(value: float | None) -> str:
    """A ratio with two decimals, or "-" for None."""
    return "-" if value is None else f"{value:.2f}"


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose cells are flush right.

    >>> grid(["a", "bc"], [["10", "2"]])
    [' a  bc', '10   2']
    """
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (head, *lines)
    ]

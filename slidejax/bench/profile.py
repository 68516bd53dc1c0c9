"""Where the time of a compiled program goes on a GPU: its kernels, and the gaps between them.

JAX's own profiler records the kernels, also those of recorded graphs.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from slidejax.bench import report
from slidejax.bench.timing import Timed

__all__ = ["Event", "events", "profile", "summary", "table"]


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel or copy that ran.

    Attributes:
      name: of the kernel.
      start, end: nanoseconds.
    """

    name: str
    start: float
    end: float


def events(run: Callable[[], Any]) -> list[Event]:
    """The events of the first GPU during `run`, by their start. Empty without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        found = sorted(Path(folder).rglob("*.xplane.pb"))
        if not found:
            return []
        planes = jax.profiler.ProfileData.from_file(str(found[-1])).planes
        gpus = sorted((p for p in planes if "/device:GPU" in p.name), key=lambda p: p.name)
        lines = [line for plane in gpus[:1] for line in plane.lines if "Stream" in line.name]
        return sorted(
            (
                Event(e.name, e.start_ns, e.start_ns + e.duration_ns)
                for x in lines
                for e in x.events
            ),
            key=lambda event: event.start,
        )


def summary(found: Iterable[Event], applications: int) -> dict[str, Any]:
    """The kernels by name, and what lies between them.

    Args:
      found: the events of a run, in the order of their start.
      applications: how often the run did what is profiled.

    Returns:
      - "us": of one application, from the beginning of the first kernel to the end of the last;
        "busy_us" of it some kernel ran, and "gaps_us" none;
      - "launches" of one application;
      - "kernels": by `name` how many `launches` one application has, the `us` of each launch, the
        `us_in_all` of one application, and the median of the `gap_us` before a launch. The
        greatest `us_in_all` comes first.

    >>> found = [Event("a", 0, 2000), Event("b", 3000, 4000), Event("a", 4000, 8000)]
    >>> both = summary(found, 1)
    >>> both["us"], both["busy_us"], both["gaps_us"]
    (8.0, 7.0, 1.0)
    >>> [(k["name"], k["launches"], k["us"], k["gap_us"]) for k in both["kernels"]]
    [('a', 2.0, 3.0, 0.0), ('b', 1.0, 1.0, 1.0)]
    """
    times, gaps = defaultdict(list), defaultdict(list)
    first = last = None
    busy = 0.0
    for event in found:
        times[event.name].append(event.end - event.start)
        if last is None or first is None:
            first, begin = event.start, event.start
        else:
            gaps[event.name].append(max(0.0, event.start - last))
            begin = max(last, event.start)
        busy += max(0.0, event.end - begin)
        last = event.end if last is None else max(last, event.end)
    whole = 0.0 if first is None or last is None else last - first
    scale = 1e-3 / applications
    kernels = [
        {
            "name": name,
            "launches": len(ns) / applications,
            "us": 1e-3 * sum(ns) / len(ns),
            "us_in_all": scale * sum(ns),
            "gap_us": 1e-3 * statistics.median(gaps[name] or [0.0]),
        }
        for name, ns in times.items()
    ]
    return {
        "us": scale * whole,
        "busy_us": scale * busy,
        "gaps_us": scale * (whole - busy),
        "launches": sum(len(ns) for ns in times.values()) / applications,
        "kernels": sorted(kernels, key=lambda k: -k["us_in_all"]),
    }


def profile(program: Timed) -> dict[str, Any] | None:
    """The `summary` of a call of a compiled program; None where no GPU was recorded."""
    results = program(program.room())  # what happens only once is not recorded
    jax.block_until_ready(results)
    found = events(lambda: program(results))
    return summary(found, program.applications) if found else None


_HEAD = ("", "launches", "us each", "us in all", "of all", "gap before")
_WIDEST = 60  # characters of a kernel's name


def table(found: dict[str, Any], most: int = 20) -> list[str]:
    """A summary as lines of text, with the kernels that take the longest."""
    shown = found["kernels"][:most]
    rest = found["kernels"][most:]
    cells = [
        [
            kernel["name"][:_WIDEST],
            f"{kernel['launches']:.1f}",
            f"{kernel['us']:.2f}",
            f"{kernel['us_in_all']:.1f}",
            f"{kernel['us_in_all'] / found['us']:.1%}",
            f"{kernel['gap_us']:.2f}",
        ]
        for kernel in shown
    ]
    if rest:
        us = sum(kernel["us_in_all"] for kernel in rest)
        launches = sum(kernel["launches"] for kernel in rest)
        name, share = f"{len(rest)} more", f"{us / found['us']:.1%}"
        cells.append([name, f"{launches:.1f}", "", report.microseconds(us), share, ""])
    return [
        f"{found['us']:.1f} us with the profiler: in {found['busy_us']:.1f} us a kernel runs, "
        f"{found['gaps_us']:.1f} us are gaps; {found['launches']:.1f} launches",
        *report.grid(_HEAD, cells),
    ]

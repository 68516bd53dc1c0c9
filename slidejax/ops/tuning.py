"""The measured table: which implementation is fastest for a shape on a device.

A table is one JSON file for each kind of device. Those in `slidejax/data/tuning` ship with the package; what `slidejax
tune` measures on this machine goes to `$SLIDEJAX_CACHE` (default `~/.cache/slidejax`) and wins over them. An entry is

    {"in": 3584, "out": 18944, "pattern": "6:8", "dtype": "int8", "rows": 4096, "us": {"hopper+prepared": 80.1, "dense": 95.0}}

with the time of a whole `linear`, bfloat16 x to bfloat16 y, for each implementation, `+prepared` with its prepared form.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slidejax.files import write_json
from slidejax.ops.problem import Problem, device_kind
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import Pattern

__all__ = ["entries", "forms", "lookup", "record", "table_path", "time_of"]

_SHIPPED = Path(__file__).parents[1] / "data" / "tuning"
_FORMAT = 1
# How far, in factors of two summed over rows, inputs and outputs, an entry may be from the problem to speak for it.
_REACH = 3.0
# With how many times the shortest time a weight does without another prepared form, and what the form that is as large as the weight has to gain
# over the others, which are a fifth of it.
_NEARLY, _LARGE_GAINS = 1.2, 1.05


def device_slug(device: str) -> str:
    """A device's kind as a file name; memory sizes and form factors of one chip share a table.

    >>> device_slug("NVIDIA H100 80GB HBM3"), device_slug("NVIDIA H200")
    ('nvidia-h100', 'nvidia-h200')
    """
    name = re.sub(r"\s+\d+GB.*|\s+(PCIe|SXM|HBM\d).*", "", device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table_path(device: str) -> Path:
    """Where measurements made on this machine for that kind of device are kept."""
    root = os.environ.get("SLIDEJAX_CACHE") or Path.home() / ".cache" / "slidejax"
    return Path(root) / "tuning" / f"{device_slug(device)}.json"


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a tuning table: {error}") from error
    if (
        not isinstance(table, dict)
        or table.get("format") != _FORMAT
        or not isinstance(table.get("entries"), list)
    ):
        raise ValueError(
            f"{path} is not a tuning table of format {_FORMAT}; delete it and run slidejax tune"
        )
    return table["entries"]


@functools.cache
def _entries(shipped: Path, local: Path, stamp: int) -> tuple[dict[str, Any], ...]:
    merged: dict[tuple, dict[str, Any]] = {}
    for entry in (*_read(shipped), *_read(local)):
        key = tuple(entry[name] for name in ("in", "out", "pattern", "dtype", "rows"))
        merged[key] = entry
    return tuple(merged.values())


def entries(device: str) -> tuple[dict[str, Any], ...]:
    """All measurements for a kind of device, local ones over shipped ones.

    Raises:
      ValueError: if a table is damaged.
    """
    local = table_path(device)
    shipped = _SHIPPED / local.name
    if not shipped.exists() and device_slug(device) in ("nvidia-h100", "nvidia-h200"):
        shipped = _SHIPPED / "nvidia-h200.json"  # the same processor with other memory
    stamp = local.stat().st_mtime_ns if local.exists() else 0
    return _entries(shipped, local, stamp)


def record(device: str, measured: Iterable[dict[str, Any]]) -> Path:
    """Adds measurements to this machine's table; the file is replaced as a whole."""
    path = table_path(device)
    merged = {
        tuple(e[name] for name in ("in", "out", "pattern", "dtype", "rows")): e
        for e in (*_read(path), *measured)
    }
    write_json(
        path,
        {
            "format": _FORMAT,
            "device": device,
            "jax": jax.__version__,
            "entries": list(merged.values()),
        },
    )
    return path


def _distance(entry: dict[str, Any], rows: int, in_features: int, out_features: int) -> float:
    pairs = ((entry["rows"], rows), (entry["in"], in_features), (entry["out"], out_features))
    return sum(_log_ratio(a, b) for a, b in pairs)


def _log_ratio(a: int, b: int) -> float:
    return abs(math.log2(max(a, 1) / max(b, 1)))


def _alike(device: str, of: Problem | SlideWeight) -> list[dict[str, Any]]:
    """The measurements on a device with the pattern of a problem or a weight and its dtype; if there are none, with the other 8-bit dtype."""
    same = [e for e in entries(device) if e["pattern"] == str(of.pattern)]
    mine = [e for e in same if e["dtype"] == of.dtype.name]
    return mine or (same if numerics.is_quantized(of.dtype) else [])


def _nearest(problem: Problem) -> dict[str, Any] | None:
    def far(entry: dict[str, Any]) -> float:
        return _distance(entry, problem.rows, problem.in_features, problem.out_features)

    return min(
        (e for e in _alike(problem.device, problem) if far(e) <= _REACH), key=far, default=None
    )


def lookup(problem: Problem, candidates: list[str]) -> tuple[str, str] | None:
    """The fastest of `candidates` by the nearest measurement, and the reason in words; None where nothing near is known."""
    entry = _nearest(problem)
    if entry is None:
        return None
    times = {}
    for name in candidates:
        variant = f"{name}+prepared" if name in problem.prepared else name
        if variant in entry["us"]:
            times[name] = entry["us"][variant]
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    figures = ", ".join(
        f"{name} {us:.0f} us" for name, us in sorted(times.items(), key=lambda item: item[1])
    )
    where = f"M={entry['rows']} K={entry['in']} N={entry['out']}" + (
        f" {entry['dtype']}" if entry["dtype"] != problem.dtype.name else ""
    )
    return best, f"measured at {where}: {figures}"


def time_of(
    device: str, rows: int, shape: tuple[int, int], pattern: Pattern, dtype: np.dtype
) -> float | None:
    """Microseconds of one linear of shape `(in, out)` with the fastest implementation, by the nearest measurement and in proportion to
    the products; None where nothing near is known. With the pattern "dense" it is the time of dense products, whatever pattern they were measured with."""
    times: list[tuple[float, float]] = []  # how far the entry is, and the time
    for e in entries(device):
        if e["dtype"] != dtype.name or (pattern.prunes and e["pattern"] != str(pattern)):
            continue
        us = [
            time
            for name, time in e["us"].items()
            if pattern.prunes or name.removesuffix("+prepared") == "dense"
        ]
        if us and (far := _distance(e, rows, *shape)) <= _REACH:
            times.append(
                (far, min(us) * rows * math.prod(shape) / (e["rows"] * e["in"] * e["out"]))
            )
    return min(times, key=lambda one: one[0])[1] if times else None


def forms(w: SlideWeight) -> tuple[str, ...]:
    """The prepared forms for a weight of this shape: as few as let every number of rows that was measured run nearly as fast as with all;
    of as many, those that are faster on the whole. "dense" where nothing near was measured, as the choice then falls on it."""
    near = [
        e["us"] for e in _alike(device_kind("cuda"), w)
        if _log_ratio(e["in"], w.in_features) + _log_ratio(e["out"], w.out_features) <= _REACH
    ]  # fmt: skip
    if not near:
        return ("dense",)
    names = sorted({form for us in near for name in us if (form := _form(name)) is not None})

    def times_best(us: dict[str, float], held: tuple[str, ...]) -> float:
        possible = (t for name, t in us.items() if (form := _form(name)) is None or form in held)
        return min(possible, default=math.inf) / min(us.values())

    def cost(held: tuple[str, ...]) -> float:
        return sum(math.log(times_best(us, held)) for us in near) / len(near) + (
            "dense" in held
        ) * math.log(_LARGE_GAINS)

    for count in range(len(names)):
        enough = [
            held
            for held in itertools.combinations(names, count)
            if all(times_best(us, held) <= _NEARLY for us in near)
        ]
        if enough:
            return min(enough, key=cost)
    return tuple(names)


def _form(variant: str) -> str | None:
    """The prepared form that a variant of an entry has, or None."""
    return variant.removesuffix("+prepared") if variant.endswith("+prepared") else None

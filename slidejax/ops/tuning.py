"""The measured table: the times of all implementations, by shape and device.

A table is one JSON file for each kind of device. Those in `slidejax/data/tuning` are shipped.
`slidejax tune` measures on this machine and writes to `$SLIDEJAX_CACHE` (by default
`~/.cache/slidejax`). Its entries replace the shipped ones. An entry is

    {"in": 3584, "out": 18944, "pattern": "6:8", "dtype": "int8", "rows": 4096, "times": [
        {"implementation": "hopper", "form": "hopper", "us": 80.1},
        {"implementation": "dense", "form": null, "us": 95.0}]}

A time is that of a whole `linear`, from bfloat16 x to bfloat16 y, without or with the prepared form
of the implementation. In memory an entry has `"us": {Variant: microseconds}` instead of `"times"`.
Files of format 1 are read too. They name a variant by a string such as "hopper+prepared".
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slidejax.files import write_json
from slidejax.weights import numerics
from slidejax.weights.pattern import Pattern

__all__ = ["Variant", "alike", "distance", "entries", "log_ratio", "record", "table_path"]

_SHIPPED = Path(__file__).parents[1] / "data" / "tuning"
_FORMAT = 2


class Variant(NamedTuple):
    """A key of the table: an implementation, and the prepared form that the weight has for it.

    >>> str(Variant("dense")), str(Variant("hopper", "hopper"))
    ('dense', 'hopper+prepared')
    """

    implementation: str
    form: str | None = None

    def __str__(self) -> str:
        return self.implementation if self.form is None else f"{self.implementation}+prepared"

    @classmethod
    def of(cls, key: str | tuple[str, str | None]) -> Variant:
        """Reads a key. A string is one of format 1, where a form has its implementation's name.

        >>> Variant.of("hopper+prepared")
        Variant(implementation='hopper', form='hopper')
        """
        if not isinstance(key, str):
            return cls(*key)
        name = key.removesuffix("+prepared")
        return cls(name, name if name != key else None)


def device_slug(device: str) -> str:
    """A device's kind as a file name, without memory size and form factor.

    >>> device_slug("NVIDIA H100 80GB HBM3"), device_slug("NVIDIA H200")
    ('nvidia-h100', 'nvidia-h200')
    """
    name = re.sub(r"\s+\d+GB.*|\s+(PCIe|SXM|HBM\d).*", "", device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table_path(device: str) -> Path:
    """The file of this machine's measurements for a kind of device."""
    root = os.environ.get("SLIDEJAX_CACHE") or Path.home() / ".cache" / "slidejax"
    return Path(root) / "tuning" / f"{device_slug(device)}.json"


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a tuning table: {error}") from error
    form = table.get("format") if isinstance(table, dict) else None
    if form not in (1, _FORMAT) or not isinstance(table.get("entries"), list):
        raise ValueError(
            f"{path} is not a tuning table of format {_FORMAT}; delete it and run slidejax tune"
        )
    try:
        return [_normal(e) if form == 1 else _from_file(e) for e in table["entries"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} has a damaged entry ({error!r}); delete it and run slidejax tune"
        ) from error


def _normal(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with `Variant`s as its keys."""
    return {**entry, "us": {Variant.of(key): us for key, us in entry["us"].items()}}


def _from_file(entry: dict[str, Any]) -> dict[str, Any]:
    times = {Variant(t["implementation"], t["form"]): t["us"] for t in entry["times"]}
    return {name: value for name, value in entry.items() if name != "times"} | {"us": times}


def _to_file(entry: dict[str, Any]) -> dict[str, Any]:
    times = [{**variant._asdict(), "us": us} for variant, us in entry["us"].items()]
    return {name: value for name, value in entry.items() if name != "us"} | {"times": times}


def _key(entry: dict[str, Any]) -> tuple:
    return tuple(entry[name] for name in ("in", "out", "pattern", "dtype", "rows"))


# Devices of one processor with different memory. Each also has the other's shipped measurements,
# where it has none of its own.
_ALIKE = {"nvidia-h100": "nvidia-h200", "nvidia-h200": "nvidia-h100"}


@functools.cache
def _entries(tables: tuple[Path, ...], stamp: int) -> tuple[dict[str, Any], ...]:
    return tuple({_key(e): e for table in tables for e in _read(table)}.values())


def entries(device: str) -> tuple[dict[str, Any], ...]:
    """All measurements for a kind of device. Local ones replace shipped ones.

    Raises:
      ValueError: if a table is damaged.
    """
    local = table_path(device)
    slugs = (_ALIKE.get(local.stem), local.stem)
    shipped = tuple(_SHIPPED / f"{slug}.json" for slug in slugs if slug is not None)
    stamp = local.stat().st_mtime_ns if local.exists() else 0
    return _entries((*shipped, local), stamp)


def record(device: str, measured: Iterable[dict[str, Any]]) -> Path:
    """Adds measurements to this machine's table. The file is replaced as a whole.

    Args:
      device: kind of the device.
      measured: entries as they are in memory.

    Returns:
      The path of the file.
    """
    path = table_path(device)
    merged = {_key(e): e for e in (*_read(path), *map(_normal, measured))}
    write_json(
        path,
        {
            "format": _FORMAT,
            "device": device,
            "jax": jax.__version__,
            "entries": [_to_file(e) for e in merged.values()],
        },
    )
    return path


def distance(entry: dict[str, Any], rows: int, in_features: int, out_features: int) -> float:
    """The distance of an entry from other sizes, in factors of two.

    It is summed over rows, inputs and outputs.
    """
    pairs = ((entry["rows"], rows), (entry["in"], in_features), (entry["out"], out_features))
    return sum(log_ratio(a, b) for a, b in pairs)


def log_ratio(a: int, b: int) -> float:
    """The distance between two sizes, in factors of two."""
    return abs(math.log2(max(a, 1) / max(b, 1)))


def alike(device: str, pattern: Pattern, dtype: np.dtype) -> list[dict[str, Any]]:
    """The measurements on a device with a pattern and a dtype.

    If there are none for an 8-bit dtype, they are those for the other 8-bit dtype.
    """
    same = [e for e in entries(device) if e["pattern"] == str(pattern)]
    mine = [e for e in same if e["dtype"] == dtype.name]
    return mine or (same if numerics.is_quantized(dtype) else [])

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
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import jax
import numpy as np

from slidejax.files import (
    CHECKSUM,
    check_json,
    exclusive,
    json_checksum,
    read_whole,
    write_json,
)
from slidejax.kinds import check_text, shown
from slidejax.weights import numerics
from slidejax.weights.pattern import Pattern

__all__ = [
    "Variant",
    "alike",
    "check_record",
    "distance",
    "entries",
    "log_ratio",
    "record",
    "table_path",
]

_SHIPPED = Path(__file__).parents[1] / "data" / "tuning"
_FORMAT = 3  # the first with a checksum
_LARGEST = 1 << 26  # bytes of a table


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

        Raises:
          TypeError: if it is none.

        >>> Variant.of("hopper+prepared")
        Variant(implementation='hopper', form='hopper')
        """
        if not isinstance(key, str):
            good = isinstance(key, (tuple, list)) and len(key) in (1, 2)
            if not good or not isinstance(key[0], str) or not isinstance(key[-1], (str, NoneType)):
                raise TypeError(f"key must be (implementation, form) or a text, got {shown(key)}")
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


def device_name(device: Any) -> str:
    """The name of a kind of device, such as "NVIDIA H100".

    Raises:
      TypeError, ValueError: if it is none.
    """
    if not device_slug(check_text(device, "device", "the name of a kind of device")):
        raise ValueError(f"device must be the name of a kind of device, got {device!r}")
    return device


def table_path(device: str) -> Path:
    """The file of this machine's measurements for a kind of device.

    Raises:
      TypeError, ValueError: `device` names no kind of device.
      ValueError: `SLIDEJAX_CACHE` is not set and there is no home directory.
    """
    device = device_name(device)
    root = os.environ.get("SLIDEJAX_CACHE")
    if not root:
        try:
            root = str(Path.home() / ".cache" / "slidejax")
        except RuntimeError as error:
            raise ValueError(
                f"SLIDEJAX_CACHE must name a folder for measurements: {error}"
            ) from error
    return Path(root) / "tuning" / f"{device_slug(device)}.json"


def _read(path: Path) -> list[dict[str, Any]]:
    """The entries of a table; none if there is no file.

    Raises:
      ValueError: naming the file and the entry, if the file is no table.
    """
    hint = "delete it and run slidejax tune"
    try:
        table = json.loads(read_whole(path, _LARGEST))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a tuning table: {error}; {hint}") from error
    form = table.get("format") if isinstance(table, dict) else None
    if type(form) is not int or form < 1 or not isinstance(table.get("entries"), list):
        raise ValueError(f"{path} is not a tuning table: {hint}")
    if form > _FORMAT:
        raise ValueError(f"{path} has format {form}; this version of slidejax reads 1 to {_FORMAT}")
    if (CHECKSUM in table) != (form > 2):  # older tables had none
        raise ValueError(f"{path} is damaged: key {CHECKSUM!r}, format {form}; {hint}")
    if form > 2:
        check_json(table, str(path))
    return [_checked(path, index, form, entry) for index, entry in enumerate(table["entries"])]


def _checked(path: Path, index: int, form: int, entry: Any) -> dict[str, Any]:
    """An entry of a file as it is in memory."""
    try:
        return _memory(form, entry)
    except ValueError as error:
        raise ValueError(
            f"{path} has a damaged entry (entries[{index}]: {error}); delete it and run "
            "slidejax tune"
        ) from error


def _memory(form: int, entry: Any) -> dict[str, Any]:
    """An entry as it is in memory.

    Raises:
      ValueError: saying what is wrong with it.
    """
    try:
        entry = _normal(entry) if form == 1 else _from_file(entry)
        sizes = [entry[name] for name in ("in", "out", "rows")]
        if not all(type(n) is int and n > 0 for n in sizes):
            raise ValueError(f"in, out and rows must be positive, got {sizes}")
        Pattern.parse(entry["pattern"])
        numerics.check_dtype(str(entry["dtype"]))
        if not isinstance(entry["us"], dict):
            raise ValueError("it has no times")
        for variant, us in entry["us"].items():
            form_name = variant.form
            if not isinstance(variant.implementation, str) or not isinstance(form_name, str | None):
                raise ValueError(f"{variant!r} is no name")
            if type(us) not in (int, float) or not 0 < us < math.inf:
                raise ValueError(f"the time of {variant} must be positive and finite, got {us!r}")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(what) from error
    return entry


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
def _entries(
    tables: tuple[Path, ...], local: Path | None, stamp: int | None
) -> tuple[dict[str, Any], ...]:
    found = [entry for table in tables for entry in _read(table)]
    if local is not None and stamp is not None:
        try:
            found += _read(local)
        except ValueError as error:
            _warn(str(error))
    return tuple({_key(entry): entry for entry in found}.values())


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"this machine's measurements are not used: {reason}", stacklevel=2)


def entries(device: str) -> tuple[dict[str, Any], ...]:
    """All measurements for a kind of device. Local ones replace shipped ones.

    Local ones are a help and no need: where they cannot be read, a warning says so once.

    Raises:
      TypeError, ValueError: `device` names no kind of device.
    """
    device = device_name(device)
    local, stamp = None, None
    try:
        local = table_path(device)
        stamp = local.stat().st_mtime_ns
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _warn(str(error))
    slug = device_slug(device)
    shipped = tuple(_SHIPPED / f"{s}.json" for s in (_ALIKE.get(slug), slug) if s is not None)
    return _entries(shipped, local, stamp)


def check_record(device: str) -> None:
    """Makes sure, before measuring, that `record` can add to this machine's table.

    Raises:
      ValueError: if the table is damaged, or of a newer version.
      OSError: if it cannot be written.
    """
    path = table_path(device)
    with exclusive(path.with_suffix(".lock")):
        _read(path)


def record(device: str, measured: Iterable[dict[str, Any]]) -> Path:
    """Adds measurements to this machine's table, one process at a time.

    The file is replaced as a whole.

    Args:
      device: kind of the device.
      measured: entries as they are in memory.

    Returns:
      The path of the file.

    Raises:
      ValueError, OSError: as `check_record`; or naming a bad entry by its index.
      TypeError: `measured` is no series of entries.
    """
    path = table_path(device)
    if isinstance(measured, (str, bytes, Mapping)) or not isinstance(measured, Iterable):
        raise TypeError(f"measured must be a series of entries, got {shown(measured)}")
    new = []
    for index, entry in enumerate(measured):
        try:
            new.append(_memory(1, entry))
            if not new[-1]["us"]:
                raise ValueError("it has no times")
            for name in ("pattern", "dtype"):
                check_text(entry[name], name, "a text, as files have it")
        except (TypeError, ValueError) as error:
            raise ValueError(f"measured[{index}] is no entry: {error}") from error
    with exclusive(path.with_suffix(".lock")):
        merged = {_key(e): e for e in (*_read(path), *new)}
        table = {
            "format": _FORMAT,
            "device": device,
            "jax": jax.__version__,
            "entries": [_to_file(e) for e in merged.values()],
        }
        write_json(path, table | {CHECKSUM: json_checksum(table)})
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

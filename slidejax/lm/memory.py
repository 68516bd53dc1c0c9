"""Whether models fit into memory, before they are read.

A process that asks for more memory than there is may be killed without a word, or late. What a
model needs at least is known from its head. Only what certainly cannot work is refused: the least
that is needed is compared with the most that there may be, swap included.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["available", "check_fits", "shown_bytes", "size_of"]

_VARIABLE = "SLIDEJAX_MEMORY"


def size_of(shapes: Any, dtype: Any, *, codes: bool = False) -> int:
    """The bytes of a decoder's parameters at least.

    Args:
      shapes: a tree of arrays or `jax.ShapeDtypeStruct`s, with packed weights perhaps.
      dtype: in which the decoder computes: floating arrays are cast to it, 8-bit codes are not.
      codes: kernels will be 8-bit codes, and are counted so.

    >>> size_of({"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}, "bfloat16")
    64
    """
    size = 1 if codes else np.dtype(jnp.dtype(dtype)).itemsize

    def bytes_of(leaf: Any) -> int:
        floats = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > 1
        return math.prod(leaf.shape) * (size if floats else leaf.dtype.itemsize)

    return sum(map(bytes_of, jax.tree.leaves(shapes)))


def available(device: Any = None) -> int | None:
    """The most bytes that new arrays can have on a device, or None if that is not known.

    On a CPU these are what Linux can give without ending a process, within the limits of the
    process's control group. On a GPU they are what JAX's allocator may still take.

    Args:
      device: a device of JAX; None: the one that arrays are put on.
    """
    said = os.environ.get(_VARIABLE)
    if said is not None:
        return None if said.strip() == "0" else _parsed(said)
    device = jax.local_devices()[0] if device is None else device
    if device.platform == "cpu":
        return _of_host(Path("/proc"), Path("/sys/fs/cgroup"))
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return limit - stats.get("bytes_in_use", 0) if limit else None


def _parsed(said: str) -> int:
    """The bytes that `SLIDEJAX_MEMORY` names.

    >>> _parsed("2e9")
    2000000000
    """
    try:
        size = float(said)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise ValueError(f"{_VARIABLE} must be a number of bytes, or 0 for no check, got {said!r}")
    return int(size)


def _of_host(proc: Path, groups: Path) -> int | None:
    """`available` on a CPU, from the files of Linux.

    Args:
      proc: the folder `/proc`.
      groups: the folder `/sys/fs/cgroup`.
    """
    info = _table(proc / "meminfo")
    if "MemAvailable" not in info:  # another system
        return None
    swap = 1024 * info.get("SwapFree", 0)
    found = [1024 * info["MemAvailable"] + swap]
    for folder in _folders(proc, groups):
        limit = _number(folder / "memory.max")
        used = _table(folder / "memory.stat").get("anon")
        if limit is not None and used is not None:
            most = _number(folder / "memory.swap.max")
            found.append(limit - used + (swap if most is None else min(swap, most)))
    return max(0, min(found))


def _folders(proc: Path, groups: Path) -> list[Path]:
    """The folders of the control group of this process (version 2) and of those around it."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    name = next((line[3:] for line in lines if line.startswith("0::")), None)
    if name is None:
        return []
    mine = groups / name.strip("/")
    return [folder for folder in (mine, *mine.parents) if folder.is_relative_to(groups)]


def _table(file: Path) -> dict[str, int]:
    """The numbers of a file with lines such as `MemFree: 12 kB` or `anon 12`; empty without it."""
    try:
        rows = [line.split() for line in file.read_text().splitlines()]
        return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) > 1}
    except (OSError, ValueError):
        return {}


def _number(file: Path) -> int | None:
    """The number in a file; None for "max", or without the file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def shown_bytes(size: int) -> str:
    """Bytes for users.

    >>> shown_bytes(3 << 29), shown_bytes(5 << 20)
    ('1.5 GiB', '5.0 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def check_fits(sizes: Mapping[str, int], hint: str) -> None:
    """Raises a MemoryError if arrays of these sizes together do not fit into memory.

    Args:
      sizes: what takes memory -> its bytes at least.
      hint: what a user can do, for the error.
    """
    there, needed = available(), sum(sizes.values())
    if there is None or needed <= there:
        return
    parts = ", ".join(f"{name} {shown_bytes(size)}" for name, size in sizes.items())
    together = f" ({shown_bytes(needed)} together)" if len(sizes) > 1 else ""
    raise MemoryError(
        f"not enough memory: {parts}{together}, and {shown_bytes(there)} are there. {hint}. "
        f"{_VARIABLE}=0 tries it all the same"
    )

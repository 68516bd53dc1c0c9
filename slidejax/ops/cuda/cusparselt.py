"""cuSPARSELt as a library: finding it, and the search for its fastest way to compute a product.

The library has many algorithms, and its default can take twice as long as the fastest. A search
times them all for a shape and remembers the fastest in a file beside the tuning table, for each
kind of device and each release of the library. Calls that are lowered afterwards use it.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.files import (
    CHECKSUM,
    check_json,
    exclusive,
    json_checksum,
    read_whole,
    write_json,
)
from slidejax.ops.cuda import calls, library
from slidejax.ops.tuning import table_path

__all__ = [
    "DEFAULT",
    "ROWS",
    "WORKSPACE",
    "Product",
    "layout",
    "missing",
    "nearest",
    "search",
    "searched",
    "shapes",
    "version",
]


# --- the library ----------------------------------------------------------------------------------


def _wheel_libraries() -> list[str]:
    """Paths of cuSPARSELt in NVIDIA's wheels, if these are installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    return sorted(
        path
        for root in roots
        for path in glob.glob(os.path.join(glob.escape(root), "*", "lib", "libcusparseLt.so*"))
    )


@functools.cache
def missing() -> str | None:
    """The reason why cuSPARSELt cannot be used on this machine, or None."""
    if reason := library.missing():
        return reason
    system = ["libcusparseLt.so.0", "/usr/local/cuda/lib64/libcusparseLt.so.0"]
    reason = library.load()[0].load_cusparselt([*_wheel_libraries(), *system])
    return f"cuSPARSELt: {reason} (pip install nvidia-cusparselt-cu13)" if reason else None


def version() -> tuple[int, int, int] | None:
    """The version of cuSPARSELt that is loaded, or None. `missing` says why there is none."""
    return None if missing() else library.load()[0].cusparselt_version()


@functools.cache
def layout(dtype: str, out: int, columns: int) -> tuple[int, ...]:
    """The order of the library's compressed form, as an attribute of the call that makes it.

    It is learned from the library, once for a shape in a process. That takes less than a second.

    Args:
      dtype: name of the values' dtype.
      out: outputs of the weight.
      columns: lifted columns K'.

    Returns:
      Numbers for the call; none where the library has to make the form itself: ahead of time, or
      where its order was not understood.
    """
    if not library.on_gpu() or missing() is not None:
        return ()
    try:
        return tuple(library.load()[0].cusparselt_layout(dtype, out, columns) or ())
    except RuntimeError:  # too little memory
        return ()


# --- the search -----------------------------------------------------------------------------------

# Bytes of workspace that an algorithm may use. The library knows its needs only when the program
# runs, and memory is planned before.
WORKSPACE = 64 << 20
# The attributes of a call that takes the library's default.
DEFAULT = {
    "algorithm": -1,
    "split_k": 1,
    "split_k_mode": 0,
    "parts": 1,
    "beside": 1,
    "workspace_bytes": WORKSPACE,
}
# The numbers of rows that `prepare` searches for. A search serves half as many rows to twice as
# many, and these serve all from 32 to 32768.
ROWS = (64, 256, 1024, 4096, 16384)
_MAX_DISTANCE = 1.0  # the same in factors of two


class Product(NamedTuple):
    """A product as the library sees it.

    Attributes:
      dtype: of the operands.
      result: the dtype that the library writes.
      out: outputs of the weight.
      columns: lifted columns K'.
    """

    dtype: np.dtype
    result: np.dtype
    out: int
    columns: int

    @classmethod
    def of(cls, dtype: Any, out_dtype: Any, out: int, columns: int) -> Product:
        """The product behind a result of `out_dtype`; None stands for raw accumulators.

        >>> [Product.of(jnp.int8, d, 64, 96).result.name for d in (jnp.bfloat16, jnp.float32, None)]
        ['bfloat16', 'int32', 'int32']
        """
        accumulators = calls.accumulator(dtype)
        rounds = out_dtype is not None and np.dtype(out_dtype) == jnp.bfloat16
        result = np.dtype(jnp.bfloat16) if rounds and accumulators.itemsize == 4 else accumulators
        return cls(np.dtype(dtype), result, out, columns)

    def __str__(self) -> str:
        return f"{self.dtype.name}->{self.result.name} {self.out}x{self.columns}"


def _path() -> Path:
    """The file of searches for this kind of device and this release of the library.

    Another release gives other meanings to the algorithms' numbers.
    """
    release = version() or (0, 0, 0)
    table = table_path(jax.devices()[0].device_kind)
    return table.with_name(f"{table.stem}-cusparselt-{'.'.join(map(str, release))}.json")


@functools.cache
def _read(path: Path, stamp: int) -> dict[str, dict[str, Any]]:
    # This is a cache: an algorithm that cannot be read is searched again.
    try:
        entries = json.loads(read_whole(path))
        check_json(entries, str(path))
        del entries[CHECKSUM]
        for found in entries.values():
            if not all(int(rows) > 0 and isinstance(one, dict) for rows, one in found.items()):
                return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, KeyError):
        return {}
    return entries


# Searches that could not be written: product -> rows -> the fastest choice.
_UNKEPT: dict[str, dict[str, Any]] = {}


def _entries() -> dict[str, dict[str, Any]]:
    """The searches of this machine and of this process."""
    try:
        path = _path()
        kept = _read(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        kept = {}
    return kept | {name: kept.get(name, {}) | found for name, found in _UNKEPT.items()}


def searched(product: Product) -> dict[int, dict[str, Any]]:
    """The searches for a product on this kind of device: by rows, the fastest choice."""
    if not library.on_gpu() or missing() is not None:
        return {}
    return {int(rows): found for rows, found in _entries().get(str(product), {}).items()}


def shapes() -> int | None:
    """How many products have been searched on this kind of device; None without a GPU."""
    return None if not library.on_gpu() or missing() is not None else len(_entries())


def nearest(product: Product, rows: int) -> tuple[int, dict[str, Any]] | None:
    """The nearest search within reach: its rows, and the fastest choice. None without one.

    Up to 32 rows are one problem to the library. The largest of `ROWS` stands for all larger ones.
    """
    found = searched(product)
    rows = max(32, min(rows, ROWS[-1]))
    near = min(found, key=lambda r: abs(math.log2(r / rows)), default=None)
    if near is None or abs(math.log2(near / rows)) > _MAX_DISTANCE:
        return None
    return near, found[near]


def search(product: Product, rows: int, *, finish: bool = True) -> list[dict[str, Any]]:
    """Times the library's algorithms for a product of `rows` rows.

    The fastest is kept in a JSON file beside the tuning table, by device, version of the library
    and shape. Calls that are lowered from now on use it.

    Args:
      product: what to compute.
      rows: of x.
      finish: whether scales are applied too, as in a call. Without, the library is timed alone and
        nothing is kept.

    Returns:
      Those that ran and are near the fastest, the fastest first. Each has `algorithm`, `split_k`,
      `split_k_mode`, `parts`, `beside`, `microseconds` and `workspace_bytes`.

    Raises:
      NotImplementedError: without a GPU or the library, with the reason.
      RuntimeError: if the library has no algorithm, or there is too little memory.
    """
    reason = "there is no CUDA GPU" if not library.on_gpu() else missing()
    if reason is not None:
        raise NotImplementedError(f"cusparselt.search: {reason}")
    timings = library.load()[0].cusparselt_tune(
        product.dtype.name,
        product.result.name,
        product.out,
        rows,
        product.columns,
        workspace_limit=WORKSPACE,
        finish=finish,
    )
    if finish:
        _keep(str(product), str(rows), timings[0])
    return timings


def _keep(product: str, rows: str, fastest: dict[str, Any]) -> None:
    """Adds a search to the file of this machine. It serves this process if that cannot be done."""
    try:
        path = _path()
        with exclusive(path.with_suffix(".lock")):
            entries = _entries()
            table = entries | {product: entries.get(product, {}) | {rows: fastest}}
            write_json(path, table | {CHECKSUM: json_checksum(table)})
    except (OSError, ValueError) as error:
        _UNKEPT.setdefault(product, {})[rows] = fastest
        warnings.warn(f"searches of cuSPARSELt are not kept for later: {error}", stacklevel=2)

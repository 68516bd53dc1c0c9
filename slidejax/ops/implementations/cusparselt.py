"""The implementation "cusparselt": products by cuSPARSELt, NVIDIA's library for 2:4 weights.

The library has many algorithms. `search` finds the fastest one for a shape and remembers it in a
file beside the tuning table. Calls that are lowered afterwards use it.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.files import write_json
from slidejax.ops.cuda import calls, library
from slidejax.ops.implementations.base import (
    Form,
    Implementation,
    cuda_refusal,
    nothing_to_skip,
)
from slidejax.ops.tuning import table_path
from slidejax.weights.numerics import is_quantized
from slidejax.weights.packed import SlideWeight

__all__ = ["CUSPARSELT", "compressed", "search"]


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


# --- the product ----------------------------------------------------------------------------------


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _multiple(dtype) -> int:
    """The number that the library wants rows and outputs to be multiples of."""
    return 32 if is_quantized(dtype) else 16


def _compressed_bytes(w: SlideWeight) -> int:
    out, columns = _round_up(w.out_features, _multiple(w.dtype)), w.lifted_columns
    if library.on_gpu() and missing() is None:
        return library.load()[0].cusparselt_compressed_bytes(w.dtype.name, out, columns)
    # Ahead of time: half of the values, and a nibble for each window of whole 128 columns, as in
    # version 0.8. The call checks this.
    return out * columns // 2 * w.dtype.itemsize + out * _round_up(columns, 128) // 8


def compressed(w: SlideWeight) -> jax.Array:
    """The library's own form of a weight, uint8."""
    out_type = jax.ShapeDtypeStruct((_compressed_bytes(w),), jnp.uint8)
    return calls.call("slidejax_compress_cusparselt", out_type, w.values, w.zeros)


def matmul_call(
    lifted: jax.Array,
    scale_x: jax.Array,
    compressed: jax.Array,
    scale_w: jax.Array,
    bias: jax.Array,
    *,
    dtype,
    workspace_bytes: int,
    raw: bool = False,
    algorithm: int = -1,
    split_k: int = 1,
    split_k_mode: int = 0,
) -> jax.Array:
    """The custom call of the product.

    Args:
      lifted: `[M, K']`.
      scale_x: float32 `[M]`.
      compressed: uint8, from `compressed`.
      scale_w: float32 `[out]`.
      bias: float32 `[out]`, or `[0]` if there is none.
      dtype: of the result.
      workspace_bytes: bytes that the call may use.
      raw: whether the result is the accumulators, int32 or float32, without scales and bias.
      algorithm, split_k, split_k_mode: an entry of `search`. -1, 1 and 0 are the library's default.

    Returns:
      `[M, out]`.
    """
    out_types = (
        jax.ShapeDtypeStruct((lifted.shape[0], scale_w.shape[0]), dtype),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    y, _ = calls.call(
        "slidejax_sparse_matmul_cusparselt", out_types, lifted, scale_x, compressed, scale_w, bias,
        raw=np.bool_(raw), alpha_vector=np.bool_(False),
        algorithm=np.int32(algorithm), split_k=np.int32(split_k),
        split_k_mode=np.int32(split_k_mode),
    )  # fmt: skip
    return y


# --- the search for its fastest algorithm ---------------------------------------------------------

# Bytes of workspace that an algorithm may use. The library knows its needs only when the program
# runs, and memory is planned before.
_WORKSPACE = 64 << 20
_DEFAULT_CHOICE = {"algorithm": -1, "split_k": 1, "split_k_mode": 0, "workspace_bytes": _WORKSPACE}
# The largest distance, in factors of two, between the rows of a search and those of a call.
_MAX_DISTANCE = 1.0


def _search_path() -> Path:
    """The file of searches for this kind of device and this release of the library.

    Another release gives other meanings to the algorithms' numbers.
    """
    release = version() or (0, 0, 0)
    table = table_path(jax.devices()[0].device_kind)
    return table.with_name(f"{table.stem}-cusparselt-{'.'.join(map(str, release))}.json")


@functools.cache
def _searches(path: Path, stamp: int) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # This is a cache: an algorithm that cannot be read is searched again.
    return entries if isinstance(entries, dict) else {}


def _read_searches() -> tuple[Path, dict[str, dict[str, Any]]]:
    path = _search_path()
    return path, _searches(path, path.stat().st_mtime_ns if path.exists() else 0)


def _search_key(dtype, result, out: int, columns: int) -> str:
    return f"{np.dtype(dtype).name}->{np.dtype(result).name} {out}x{columns}"


def _nearest_search(
    dtype, result, out: int, rows: int, columns: int
) -> tuple[str, dict[str, Any]] | None:
    """The nearest search within reach: its rows, and its fastest algorithm. None without one."""
    if not library.on_gpu() or missing() is not None:
        return None
    found = _read_searches()[1].get(_search_key(dtype, result, out, columns), {})
    near = min(found, key=lambda r: abs(math.log2(int(r) / max(rows, 1))), default=None)
    if near is None or abs(math.log2(int(near) / max(rows, 1))) > _MAX_DISTANCE:
        return None
    return near, found[near]


def _choice(dtype, result, out: int, rows: int, columns: int) -> dict[str, Any]:
    """The algorithm of the nearest search, or the library's default.

    If the library refuses the algorithm for this number of rows, the call takes the default.
    """
    found = _nearest_search(dtype, result, out, rows, columns)
    return (
        dict(_DEFAULT_CHOICE)
        if found is None
        else {name: int(found[1][name]) for name in _DEFAULT_CHOICE}
    )


def search(w: SlideWeight, rows: int) -> list[dict[str, Any]]:
    """Times the library's algorithms for a weight's shape and `rows` rows.

    The fastest is kept in a JSON file beside the tuning table, by device, version of the library
    and shape. Calls that are lowered from now on use it.

    Returns:
      All algorithms that ran, the fastest first. Each has `algorithm`, `split_k`, `split_k_mode`,
      `microseconds` and `workspace_bytes`.

    Raises:
      NotImplementedError: without a GPU or the library, with the reason.
    """
    reason = "there is no CUDA GPU" if not library.on_gpu() else missing()
    if reason is not None:
        raise NotImplementedError(f"cusparselt.search: {reason}")
    result, columns = calls.accumulator(w.dtype), w.lifted_columns
    timings = library.load()[0].cusparselt_tune(
        w.dtype.name, result.name, w.out_features, rows, columns, workspace_limit=_WORKSPACE
    )
    path, entries = _read_searches()
    key = _search_key(w.dtype, result, w.out_features, columns)
    write_json(path, entries | {key: entries.get(key, {}) | {str(rows): timings[0]}})
    return timings


class Cusparselt(Implementation):
    """16- and 8-bit values of all patterns but "dense"."""

    name = "cusparselt"
    form = Form("cusparselt", compressed)
    cuda_only = True

    def refuses(self, problem):
        reason = nothing_to_skip(problem) or cuda_refusal(problem)
        if reason is None and library.on_gpu():
            reason = missing()
        if reason is None and problem.dtype == jnp.float32:
            reason = "float32 values are not supported"
        if reason is None and problem.out_dtype is None and not is_quantized(problem.dtype):
            reason = (
                "K is split over a mesh, and the library gives no float32 accumulators of "
                f"{problem.dtype.name} values"
            )
        return reason

    def matmul(self, lifted, scale_x, w, bias, out_dtype, platform="default"):
        raw = out_dtype is None
        accumulator = calls.accumulator(w.dtype)
        if raw and accumulator.itemsize < 4:
            raise NotImplementedError(
                f"cuSPARSELt gives no float32 accumulators of {w.dtype.name} values"
            )
        dtype = accumulator if raw else np.dtype(out_dtype)
        form = w.prepared["cusparselt"] if "cusparselt" in w.prepared else compressed(w)
        bias = jnp.zeros(0, jnp.float32) if bias is None or raw else bias.astype(jnp.float32)
        rows, columns = lifted.shape
        tokens, out = (
            _round_up(rows, _multiple(w.dtype)),
            _round_up(w.out_features, _multiple(w.dtype)),
        )
        choice = _choice(w.dtype, accumulator, w.out_features, rows, columns)
        direct = accumulator == dtype and tokens == rows and out == w.out_features
        parts = (
            0 if direct else tokens * out * accumulator.itemsize,
            0 if tokens == rows else tokens * columns * w.dtype.itemsize,
            choice.pop("workspace_bytes"),
        )
        workspace = calls.ALIGN + sum(_round_up(part, calls.ALIGN) for part in parts)
        return matmul_call(
            lifted,
            scale_x[:, 0],
            form,
            w.scale,
            bias,
            dtype=dtype,
            workspace_bytes=workspace,
            raw=raw,
            **choice,
        )

    def available(self):
        return missing()

    def facts(self):
        release = version()
        return {"cusparselt_version": None if release is None else ".".join(map(str, release))}

    def settings(self, w, rows):
        found = _nearest_search(
            w.dtype, calls.accumulator(w.dtype), w.out_features, rows, w.lifted_columns
        )
        if found is None:
            return "the library's default; slidejax tune searches for the fastest"
        near, choice = found
        return (
            f"{choice['algorithm']}, the fastest of a search at M={near} "
            f"({choice['microseconds']:.1f} us for the product alone)"
        )

    def search(self, w, rows):
        best = search(w, rows)[0]
        return (
            f"cuSPARSELt's fastest algorithm is {best['algorithm']}: {best['microseconds']:.1f} us"
        )


CUSPARSELT = Cusparselt()

"""The compiled CUDA library: loading it, saying why it is missing, and one thin function for each of its custom calls.

Nothing here is needed to import slidejax, and lowering a call needs its name only: a program can be lowered for CUDA on a
machine that has neither a GPU nor the library.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.files import write_json
from slidejax.numerics import is_quantized

if TYPE_CHECKING:
    from slidejax.ops.prologue import Prologue
    from slidejax.weight import SlideWeight

__all__ = [
    "available",
    "build_info",
    "cusparselt_algorithm",
    "cusparselt_compress_call",
    "cusparselt_compressed",
    "cusparselt_linear",
    "cusparselt_matmul_call",
    "cusparselt_search",
    "cusparselt_version",
    "hopper_dense_linear",
    "hopper_dense_matmul_call",
    "hopper_linear",
    "hopper_matmul_call",
    "hopper_metadata",
    "hopper_metadata_call",
    "lift_quantize_call",
    "lift_quantize_fused_call",
    "memcpy_call",
    "missing",
    "register",
]

_TARGETS = "CUDA"  # the platform's name in XLA's registry
_ALIGN = 256  # of the parts of a workspace
_AHEAD_OF_TIME_MULTIPROCESSORS = 132  # a program lowered without a GPU is taken to run on an H100


# --- loading ----------------------------------------------------------------------------------------------------------


def _ffi_interface() -> tuple[int, int]:
    """Version of the FFI interface of the jaxlib that is running, read from the headers that it ships."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    found = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR"))
    major, minor = (int(m[1]) if m else 0 for m in found)
    return major, minor


def _runs_on(architectures: str, capability: str) -> bool:
    """Whether code for these architectures (CMake's words) runs on a device of this compute capability.

    >>> [_runs_on("80-real,90a-real,120", c) for c in ("8.0", "8.6", "9.0", "10.0", "12.1")]
    [True, True, True, False, True]
    """
    major, minor = (int(part) for part in capability.split("."))
    for text in architectures.split(","):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", text)
        if match is None:
            continue
        of = (int(match[1]), int(match[2]))
        same_major = of[0] == major and of[1] <= minor
        if of == (major, minor) or (match[3] != "a" and (same_major or (match[4] != "-real" and of <= (major, minor)))):
            return True
    return False


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The compiled module, its handlers registered; or None and the reason."""
    if importlib.util.find_spec("slidejax._cuda") is None:
        return None, "slidejax was installed without its CUDA library: reinstall with nvcc on PATH and SLIDEJAX_CUDA=1"
    try:
        from slidejax import _cuda
    except ImportError as error:
        return None, f"the CUDA library cannot be loaded: {error}"
    built, running = _cuda.build_info()["ffi_api"], _ffi_interface()
    if built > running:
        return None, (
            f"the CUDA library was built against FFI {built[0]}.{built[1]} (jaxlib {_cuda.build_info()['jaxlib']}), and this "
            f"jaxlib has FFI {running[0]}.{running[1]}: reinstall slidejax with this jaxlib"
        )
    for name, kind in _cuda.types().items():
        jax.ffi.register_ffi_type(name, kind, platform=_TARGETS)
    for name, handler in _cuda.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform=_TARGETS)
    return _cuda, None


def register() -> None:
    """Registers the custom calls with XLA, once; without the compiled library it does nothing."""
    _load()


@functools.cache
def _library_reason() -> str | None:
    module, reason = _load()
    if module is None or jax.default_backend() not in ("gpu", "cuda"):
        return reason
    architectures, capability = module.build_info()["architectures"], jax.devices()[0].compute_capability
    if not _runs_on(architectures, capability):
        return f"the CUDA library was built for architectures {architectures}, not for compute capability {capability}"
    return None


def _wheel_libraries() -> list[str]:
    """Paths of cuSPARSELt in NVIDIA's wheels, where these are installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    return sorted(path for root in roots for path in glob.glob(os.path.join(glob.escape(root), "*", "lib", "libcusparseLt.so*")))


@functools.cache
def _cusparselt_reason() -> str | None:
    if reason := _library_reason():
        return reason
    system = ["libcusparseLt.so.0", "/usr/local/cuda/lib64/libcusparseLt.so.0"]
    reason = _load()[0].load_cusparselt([*_wheel_libraries(), *system])
    return f"cuSPARSELt: {reason} (pip install nvidia-cusparselt-cu13)" if reason else None


@functools.cache
def _hopper_reason() -> str | None:
    if reason := _library_reason():
        return reason
    return None if _load()[0].build_info()["hopper"] else "the CUDA library was built without architecture 90a"


_REASONS = {"library": _library_reason, "cusparselt": _cusparselt_reason, "hopper": _hopper_reason}


def missing(part: str) -> str | None:
    """Why a part of the compiled library cannot be used on this machine, or None.

    Args:
      part: "library" (all of it), "cusparselt" or "hopper".
    """
    return _REASONS[part]()


def available() -> tuple[bool, str]:
    """Whether the compiled library can be used here, and the reason why not (empty if it can)."""
    reason = missing("library")
    return reason is None, reason or ""


def build_info() -> dict[str, Any] | None:
    """What the compiled library was built with: CUDA, architectures, jaxlib, FFI interface; None without it."""
    module, _ = _load()
    return None if module is None else module.build_info()


def cusparselt_version() -> tuple[int, int, int] | None:
    """The version of the cuSPARSELt that is used, or None without one (`missing("cusparselt")` says why)."""
    return None if missing("cusparselt") else _load()[0].cusparselt_version()


# --- the calls --------------------------------------------------------------------------------------------------------


def _call(target: str, out_types, *operands: jax.Array, **attributes):
    register()
    return jax.ffi.ffi_call(target, out_types)(*operands, **attributes)


def lift_quantize_call(
    x: jax.Array, absmax: jax.Array, *, group: int, lifted_columns: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """`x` `[M, K]`, `absmax` float32 `[M]` or `[0]` -> `(lifted [M, lifted_columns], scale float32 [M])`.

    `group` 0 quantises without lifting.
    """
    rows = x.shape[0]
    out_types = (
        jax.ShapeDtypeStruct((rows, lifted_columns), dtype),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    return _call("slidejax_lift_quantize", out_types, x, absmax, group=np.int32(group))


# slidejax/ops/prologue.py's names, numbered as in cuda/lift_quantize.h
_PROLOGUES = {"RMSNorm": 1, "LayerNorm": 2, "Activation": 3, "GLU": 4}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
# Bytes of a row of x (and up) that fit beside the codes in the shared memory of a block, by the GPU's compute capability (lift_ring.cuh); 64 KB fit everywhere.
_FUSED_ROW = {"8.0": 130 << 10, "9.0": 190 << 10, "10.0": 190 << 10, "10.3": 190 << 10}


def fused(x: jax.Array, dtype, prologue: Prologue | None) -> bool:
    """Whether the lift kernel computes this prologue itself: for 8-bit results, of rows that fit in shared memory."""
    if prologue is None or not is_quantized(dtype):
        return False
    capability = jax.devices()[0].compute_capability if _on_gpu() else "9.0"
    row = x.shape[1] * x.dtype.itemsize * (2 if prologue.ROWS else 1)
    return row <= _FUSED_ROW.get(capability, 64 << 10)


def lift_quantize_fused_call(
    x: jax.Array, prologue: Prologue, *, group: int, lifted_columns: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """`lift_quantize_call` of `prologue.apply(x)` for 8-bit `dtype`, in one pass over x."""
    rows = x.shape[0]
    out_types = (
        jax.ShapeDtypeStruct((rows, lifted_columns), dtype),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    none = jnp.zeros(0, jnp.float32)

    def parameter(name: str) -> jax.Array:
        value = getattr(prologue, name, None)
        return none if value is None else value.astype(jnp.float32)

    up = getattr(prologue, "up", jnp.zeros(0, x.dtype))
    return _call(
        "slidejax_lift_quantize_fused", out_types, x, up, parameter("weight"), parameter("bias"), group=np.int32(group),
        prologue=np.int32(_PROLOGUES[type(prologue).__name__]),
        activation=np.int32(_ACTIVATIONS[getattr(prologue, "activation", "silu")]), eps=np.float32(getattr(prologue, "eps", 0)),
    )  # fmt: skip


def memcpy_call(x: jax.Array) -> jax.Array:
    """A copy of x by the driver, the yardstick of `slidejax bench`."""
    return _call("slidejax_memcpy", jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def cusparselt_compress_call(values: jax.Array, zeros: jax.Array, *, compressed_bytes: int) -> jax.Array:
    """`values` `[out, groups, kept]`, `zeros` uint8 `[out, groups]` -> uint8 `[compressed_bytes]`."""
    return _call("slidejax_cusparselt_compress", jax.ShapeDtypeStruct((compressed_bytes,), jnp.uint8), values, zeros)


def cusparselt_matmul_call(
    lifted: jax.Array,
    scale_x: jax.Array,
    compressed: jax.Array,
    scale_w: jax.Array,
    bias: jax.Array,
    *,
    dtype,
    workspace_bytes: int,
    raw: bool = False,
    alpha_vector: bool = False,
    algorithm: int = -1,
    split_k: int = 1,
    split_k_mode: int = 0,
) -> jax.Array:
    """`lifted` `[M, K']`, `scale_x` `[M]`, `compressed` uint8, `scale_w` `[out]`, `bias` `[out]` or `[0]` -> `[M, out]`.

    `raw` gives the accumulators (int32 or float32); `alpha_vector` applies `scale_w` inside the product (int8 to
    bfloat16: a second rounding, less memory moved); algorithm and split are those of `cusparselt_search`.
    """
    out_types = (
        jax.ShapeDtypeStruct((lifted.shape[0], scale_w.shape[0]), dtype),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    y, _ = _call(
        "slidejax_sparse_matmul_cusparselt", out_types, lifted, scale_x, compressed, scale_w, bias,
        raw=np.bool_(raw), alpha_vector=np.bool_(alpha_vector),
        algorithm=np.int32(algorithm), split_k=np.int32(split_k), split_k_mode=np.int32(split_k_mode),
    )  # fmt: skip
    return y


def hopper_metadata_call(zeros: jax.Array, *, group: int, metadata_bytes: int) -> jax.Array:
    """`zeros` uint8 `[out, groups]` -> the 2:4 metadata in the kernel's order, uint8 `[metadata_bytes]`."""
    out_type = jax.ShapeDtypeStruct((metadata_bytes,), jnp.uint8)
    return _call("slidejax_hopper_metadata", out_type, zeros, group=np.int32(group))


def hopper_matmul_call(
    lifted: jax.Array,
    scale_x: jax.Array,
    values: jax.Array,
    zeros: jax.Array,
    scale_w: jax.Array,
    bias: jax.Array,
    metadata: jax.Array,
    *,
    dtype,
    workspace_bytes: int,
    config: int = -1,
    token_group: int = 0,
    split: int = -1,
) -> jax.Array:
    """`lifted` `[M, K']`, `scale_x` `[M]`, the packed weight, `bias` `[out]` or `[0]`, `metadata` or `[0]` -> `[M, out]`.

    `config`, `token_group` and `split` choose the tile and the schedule; the defaults leave it to the cost model.
    """
    out_types = (
        jax.ShapeDtypeStruct((lifted.shape[0], values.shape[0]), dtype),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    y, _ = _call(
        "slidejax_sparse_matmul_hopper", out_types, lifted, scale_x, values, zeros, scale_w, bias, metadata,
        config=np.int32(config), token_group=np.int32(token_group), split=np.int32(split),
    )  # fmt: skip
    return y


def hopper_dense_matmul_call(
    codes: jax.Array, scale_x: jax.Array, kernel: jax.Array, scale_w: jax.Array, bias: jax.Array, *, dtype, workspace_bytes: int
) -> jax.Array:
    """`codes` `[M, K]`, `scale_x` `[M]`, `kernel` `[out, K]`, `scale_w` `[out]`, `bias` `[out]` or `[0]` -> `[M, out]`."""
    out_types = (
        jax.ShapeDtypeStruct((codes.shape[0], kernel.shape[0]), dtype),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    y, _ = _call("slidejax_dense_matmul_hopper", out_types, codes, scale_x, kernel, scale_w, bias)
    return y


# --- cuSPARSELt -------------------------------------------------------------------------------------------------------


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _multiple(dtype) -> int:
    """What the library wants rows and outputs to be multiples of."""
    return 32 if is_quantized(dtype) else 16


def _lifted_columns(w: SlideWeight) -> int:
    return w.groups * w.pattern.windows * 4


def _accumulator(dtype) -> np.dtype:
    """The library's result type for operands of `dtype`: it has no float32 results for 16-bit operands."""
    wide = {np.dtype(np.int8): np.int32, np.dtype(jnp.float8_e4m3fn): np.float32}
    return np.dtype(wide.get(np.dtype(dtype), dtype))


def _compressed_bytes(w: SlideWeight) -> int:
    out, columns = _round_up(w.out_features, _multiple(w.dtype)), _lifted_columns(w)
    if _on_gpu() and missing("cusparselt") is None:
        return _load()[0].cusparselt_compressed_bytes(w.dtype.name, out, columns)
    # Ahead of time: half of the values, and a nibble for each window of whole 128 columns, as 0.8 has it. The call checks it.
    return out * columns // 2 * w.dtype.itemsize + out * _round_up(columns, 128) // 8


def _on_gpu() -> bool:
    return jax.default_backend() in ("gpu", "cuda")


def cusparselt_compressed(w: SlideWeight) -> jax.Array:
    """The library's own form of a weight, uint8; `sj.prepare` keeps it."""
    return cusparselt_compress_call(w.values, w.zeros, compressed_bytes=_compressed_bytes(w))


def cusparselt_linear(lifted: jax.Array, scale_x: jax.Array, w: SlideWeight, bias: jax.Array | None, out_dtype) -> jax.Array:
    """`sparse_matmul` through cuSPARSELt: `lifted` `[M, K']`, `scale_x` `[M, 1]`; `out_dtype` None: raw accumulators.

    Raises:
      NotImplementedError: for raw accumulators of 16-bit values, which the library does not give.
    """
    raw = out_dtype is None
    accumulator = _accumulator(w.dtype)
    if raw and accumulator.itemsize < 4:
        raise NotImplementedError(f"cuSPARSELt gives no float32 accumulators of {w.dtype.name} values")
    dtype = accumulator if raw else np.dtype(out_dtype)
    compressed = w.prepared["cusparselt"] if "cusparselt" in w.prepared else cusparselt_compressed(w)
    bias = jnp.zeros(0, jnp.float32) if bias is None or raw else bias.astype(jnp.float32)
    rows, columns = lifted.shape
    tokens, out = _round_up(rows, _multiple(w.dtype)), _round_up(w.out_features, _multiple(w.dtype))
    choice = _choice(w.dtype, accumulator, w.out_features, rows, columns)
    direct = accumulator == dtype and tokens == rows and out == w.out_features
    parts = (
        0 if direct else tokens * out * accumulator.itemsize,
        0 if tokens == rows else tokens * columns * w.dtype.itemsize,
        choice.pop("workspace_bytes"),
    )
    workspace = _ALIGN + sum(_round_up(part, _ALIGN) for part in parts)
    return cusparselt_matmul_call(
        lifted, scale_x[:, 0], compressed, w.scale, bias, dtype=dtype, workspace_bytes=workspace, raw=raw, **choice
    )


# What an algorithm may use as workspace: the library is asked only when the program runs.
_WORKSPACE = 64 << 20
_DEFAULT_CHOICE = {"algorithm": -1, "split_k": 1, "split_k_mode": 0, "workspace_bytes": _WORKSPACE}
# How far, in factors of two, the rows of a search may be from those of a call.
_REACH = 1.0


def _search_path() -> Path:
    """The file of the searches made on this kind of device with this release: ids mean nothing to another one."""
    from slidejax.tune import table_path

    version = cusparselt_version() or (0, 0, 0)
    table = table_path(jax.devices()[0].device_kind)
    return table.with_name(f"{table.stem}-cusparselt-{'.'.join(map(str, version))}.json")


@functools.cache
def _searches(path: Path, stamp: int) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # a cache: what cannot be read is searched again
    return entries if isinstance(entries, dict) else {}


def _read_searches() -> tuple[Path, dict[str, dict[str, Any]]]:
    path = _search_path()
    return path, _searches(path, path.stat().st_mtime_ns if path.exists() else 0)


def _search_key(dtype, result, out: int, columns: int) -> str:
    return f"{np.dtype(dtype).name}->{np.dtype(result).name} {out}x{columns}"


def _nearest_search(dtype, result, out: int, rows: int, columns: int) -> tuple[str, dict[str, Any]] | None:
    """The nearest search within reach: its rows, and the algorithm that was fastest."""
    if not _on_gpu() or missing("cusparselt") is not None:
        return None
    found = _read_searches()[1].get(_search_key(dtype, result, out, columns), {})
    near = min(found, key=lambda r: abs(math.log2(int(r) / max(rows, 1))), default=None)
    if near is None or abs(math.log2(int(near) / max(rows, 1))) > _REACH:
        return None
    return near, found[near]


def _choice(dtype, result, out: int, rows: int, columns: int) -> dict[str, Any]:
    """The algorithm of the nearest search, else the library's default. The call falls back to the default by itself where
    the library refuses the algorithm for this number of rows."""
    found = _nearest_search(dtype, result, out, rows, columns)
    return dict(_DEFAULT_CHOICE) if found is None else {name: int(found[1][name]) for name in _DEFAULT_CHOICE}


def cusparselt_algorithm(w: SlideWeight, rows: int) -> str:
    """Which of the library's algorithms `linear` of so many rows uses, in words."""
    found = _nearest_search(w.dtype, _accumulator(w.dtype), w.out_features, rows, _lifted_columns(w))
    if found is None:
        return "the library's default; slidejax tune searches for the fastest"
    near, choice = found
    return f"{choice['algorithm']}, the fastest of a search at M={near} ({choice['microseconds']:.1f} us for the product alone)"


def cusparselt_search(w: SlideWeight, rows: int) -> list[dict[str, Any]]:
    """Times the library's algorithms for one weight's shape and a number of rows, and remembers the fastest.

    The choice is kept in memory and in a small JSON file beside the tuning table, for the device, the library's version
    and the shape; calls lowered from now on use it.

    Returns:
      Every algorithm that ran, fastest first: `algorithm`, `split_k`, `split_k_mode`, `microseconds`, `workspace_bytes`.

    Raises:
      NotImplementedError: without a GPU or the library, with the reason.
    """
    reason = "there is no CUDA GPU" if not _on_gpu() else missing("cusparselt")
    if reason is not None:
        raise NotImplementedError(f"cusparselt_search: {reason}")
    result, columns = _accumulator(w.dtype), _lifted_columns(w)
    timings = _load()[0].cusparselt_tune(
        w.dtype.name, result.name, False, w.out_features, rows, columns, workspace_limit=_WORKSPACE
    )
    path, entries = _read_searches()
    key = _search_key(w.dtype, result, w.out_features, columns)
    write_json(path, entries | {key: entries.get(key, {}) | {str(rows): timings[0]}})
    return timings


# --- Hopper -----------------------------------------------------------------------------------------------------------


def _metadata_bytes(w: SlideWeight) -> int:
    module, _ = _load()
    if module is not None and module.build_info()["hopper"]:
        return module.hopper_metadata_bytes(w.out_features, w.groups, w.pattern.group)
    # ahead of time: 1 KB for 64 outputs and 128 lifted columns, whole pairs of the latter; the call checks it
    return -(-w.out_features // 64) * 2 * -(-_lifted_columns(w) // 256) * 1024


def hopper_metadata(w: SlideWeight) -> jax.Array:
    """The 2:4 metadata of a weight in the order in which the kernel's lanes read it, uint8; `sj.prepare` keeps it."""
    return hopper_metadata_call(w.zeros, group=w.pattern.group, metadata_bytes=_metadata_bytes(w))


def _hopper_workspace(rows: int, out: int, groups: int, group: int, dtype, metadata_bytes: int) -> int:
    """Of a weight with so many groups, or with `groups` columns if `group` is 0; `metadata_bytes`: of what is not prepared."""
    module, _ = _load()
    if module is None or not module.build_info()["hopper"]:  # ahead of time: enough for the metadata, K is not split
        return _ALIGN + metadata_bytes
    multiprocessors = jax.devices()[0].core_count if _on_gpu() else _AHEAD_OF_TIME_MULTIPROCESSORS
    return _ALIGN + module.hopper_workspace_bytes(rows, out, groups, group, np.dtype(dtype).name, metadata_bytes == 0, multiprocessors)


def hopper_linear(lifted: jax.Array, scale_x: jax.Array, w: SlideWeight, bias: jax.Array | None, out_dtype) -> jax.Array:
    """`sparse_matmul` through the Hopper kernel: `lifted` `[M, K']`, `scale_x` `[M, 1]`; `out_dtype` None: raw accumulators,
    int32 of int8 values and float32 of e4m3."""
    raw = out_dtype is None
    metadata = w.prepared.get("hopper")
    has_metadata = metadata is not None
    rows = lifted.shape[0]
    return hopper_matmul_call(
        lifted,
        jnp.ones(rows, jnp.float32) if raw else scale_x[:, 0],
        w.values,
        w.zeros,
        jnp.ones(w.out_features, jnp.float32) if raw else w.scale,
        jnp.zeros(0, jnp.float32) if bias is None or raw else bias.astype(jnp.float32),
        metadata if metadata is not None else jnp.zeros(0, jnp.uint8),
        dtype=_accumulator(w.dtype) if raw else out_dtype,
        workspace_bytes=_hopper_workspace(
            rows, w.out_features, w.groups, w.pattern.group, w.dtype, 0 if has_metadata else _metadata_bytes(w)
        ),
    )


def hopper_dense_linear(
    codes: jax.Array, scale_x: jax.Array, kernel: jax.Array, scale_w: jax.Array, bias: jax.Array | None, out_dtype
) -> jax.Array:
    """The product of 8-bit codes `[M, K]` and a dense kernel `[out, K]` with the scales `[M, 1]` and `[out]`, through the same kernel;
    K is a multiple of 16."""
    (rows, k), out = codes.shape, kernel.shape[0]
    return hopper_dense_matmul_call(
        codes, scale_x[:, 0], kernel, scale_w, jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32),
        dtype=out_dtype, workspace_bytes=_hopper_workspace(rows, out, k, 0, kernel.dtype, 0),
    )  # fmt: skip

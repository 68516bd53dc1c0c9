"""The compiled CUDA library: loading it, saying why it is missing, and one thin function for each of its custom calls.

Nothing here is needed to import slidejax, and lowering a call needs its name only: a program can be lowered for CUDA on a
machine that has neither a GPU nor the library.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.weights.numerics import is_quantized

if TYPE_CHECKING:
    from slidejax.ops.prologue import Prologue
    from slidejax.weights.packed import SlideWeight

__all__ = [
    "ALIGN",
    "accumulator",
    "available",
    "build_info",
    "cusparselt_compress_call",
    "cusparselt_matmul_call",
    "cusparselt_version",
    "hopper_linear_call",
    "hopper_matmul_call",
    "hopper_metadata_call",
    "lift_quantize_call",
    "lift_quantize_fused_call",
    "lifted_columns",
    "load",
    "memcpy_call",
    "missing",
    "on_gpu",
    "register",
]

_TARGETS = "CUDA"  # the platform's name in XLA's registry
ALIGN = 256  # of the parts of a workspace


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
        if of == (major, minor) or (
            match[3] != "a" and (same_major or (match[4] != "-real" and of <= (major, minor)))
        ):
            return True
    return False


@functools.cache
def load() -> tuple[Any, str | None]:
    """The compiled module, its handlers registered; or None and the reason."""
    if importlib.util.find_spec("slidejax._cuda") is None:
        return (
            None,
            "slidejax was installed without its CUDA library: reinstall with nvcc on PATH and SLIDEJAX_CUDA=1",
        )
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
    load()


@functools.cache
def _library_reason() -> str | None:
    module, reason = load()
    if module is None or jax.default_backend() not in ("gpu", "cuda"):
        return reason
    architectures, capability = (
        module.build_info()["architectures"],
        jax.devices()[0].compute_capability,
    )
    if not _runs_on(architectures, capability):
        return f"the CUDA library was built for architectures {architectures}, not for compute capability {capability}"
    return None


def _wheel_libraries() -> list[str]:
    """Paths of cuSPARSELt in NVIDIA's wheels, where these are installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    return sorted(
        path
        for root in roots
        for path in glob.glob(os.path.join(glob.escape(root), "*", "lib", "libcusparseLt.so*"))
    )


@functools.cache
def _cusparselt_reason() -> str | None:
    if reason := _library_reason():
        return reason
    system = ["libcusparseLt.so.0", "/usr/local/cuda/lib64/libcusparseLt.so.0"]
    reason = load()[0].load_cusparselt([*_wheel_libraries(), *system])
    return f"cuSPARSELt: {reason} (pip install nvidia-cusparselt-cu13)" if reason else None


@functools.cache
def _hopper_reason() -> str | None:
    if reason := _library_reason():
        return reason
    return (
        None
        if load()[0].build_info()["hopper"]
        else "the CUDA library was built without architecture 90a"
    )


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
    module, _ = load()
    return None if module is None else module.build_info()


def cusparselt_version() -> tuple[int, int, int] | None:
    """The version of the cuSPARSELt that is used, or None without one (`missing("cusparselt")` says why)."""
    return None if missing("cusparselt") else load()[0].cusparselt_version()


def on_gpu() -> bool:
    """Whether JAX runs on a CUDA GPU here."""
    return jax.default_backend() in ("gpu", "cuda")


# --- what the calls share ---------------------------------------------------------------------------------------------


def accumulator(dtype) -> np.dtype:
    """What the sparse products add up 8-bit operands in, and give as raw results: int32 or float32. cuSPARSELt has no float32 results for
    16-bit operands, which keep their dtype."""
    wide = {np.dtype(np.int8): np.int32, np.dtype(jnp.float8_e4m3fn): np.float32}
    return np.dtype(wide.get(np.dtype(dtype), dtype))


def lifted_columns(w: SlideWeight) -> int:
    """K', padding included."""
    return w.groups * w.pattern.windows * 4


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
    capability = jax.devices()[0].compute_capability if on_gpu() else "9.0"
    row = x.shape[1] * x.dtype.itemsize * (2 if prologue.ROWS else 1)
    return row <= _FUSED_ROW.get(capability, 64 << 10)


def _prologue(
    x: jax.Array, prologue: Prologue | None
) -> tuple[tuple[jax.Array, ...], dict[str, np.generic]]:
    """The operands that follow x, `up`, `weight` and `bias` (`[0]` where there is none), and the attributes."""
    none = jnp.zeros(0, jnp.float32)

    def parameter(name: str) -> jax.Array:
        value = getattr(prologue, name, None)
        return none if value is None else value.astype(jnp.float32)

    operands = (
        getattr(prologue, "up", jnp.zeros(0, x.dtype)),
        parameter("weight"),
        parameter("bias"),
    )
    kind = 0 if prologue is None else _PROLOGUES[type(prologue).__name__]
    activation = _ACTIVATIONS[getattr(prologue, "activation", "silu")]
    return operands, {
        "prologue": np.int32(kind),
        "activation": np.int32(activation),
        "eps": np.float32(getattr(prologue, "eps", 0)),
    }


def lift_quantize_fused_call(
    x: jax.Array, prologue: Prologue, *, group: int, lifted_columns: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """`lift_quantize_call` of `prologue.apply(x)` for 8-bit `dtype`, in one pass over x."""
    rows = x.shape[0]
    out_types = (
        jax.ShapeDtypeStruct((rows, lifted_columns), dtype),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    operands, attributes = _prologue(x, prologue)
    return _call(
        "slidejax_lift_quantize_fused", out_types, x, *operands, group=np.int32(group), **attributes
    )


def memcpy_call(x: jax.Array) -> jax.Array:
    """A copy of x by the driver, the yardstick of `slidejax bench`."""
    return _call("slidejax_memcpy", jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def cusparselt_compress_call(
    values: jax.Array, zeros: jax.Array, *, compressed_bytes: int
) -> jax.Array:
    """`values` `[out, groups, kept]`, `zeros` uint8 `[out, groups]` -> uint8 `[compressed_bytes]`."""
    return _call(
        "slidejax_cusparselt_compress",
        jax.ShapeDtypeStruct((compressed_bytes,), jnp.uint8),
        values,
        zeros,
    )


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

    A dense weight has `values` `[out, K']`, and neither zeros nor metadata: both `[0]`. `config`, `token_group` and `split` choose the tile and the schedule; the defaults leave it to the cost model.
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


def hopper_linear_call(
    x: jax.Array,
    prologue: Prologue | None,
    values: jax.Array,
    zeros: jax.Array,
    scale_w: jax.Array,
    bias: jax.Array,
    metadata: jax.Array,
    *,
    group: int,
    lifted_columns: int,
    dtype,
    workspace_bytes: int,
) -> jax.Array:
    """`hopper_matmul_call` of what `lift_quantize_fused_call` (prologue None: `lift_quantize_call`) gives, in one call: the kernels
    overlap. `group` 0 for a dense weight."""
    rows = x.shape[0]
    out_types = (
        jax.ShapeDtypeStruct((rows, values.shape[0]), dtype),
        jax.ShapeDtypeStruct((rows, lifted_columns), values.dtype),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    operands, attributes = _prologue(x, prologue)
    y, *_ = _call(
        "slidejax_linear_hopper",
        out_types,
        x,
        *operands,
        values,
        zeros,
        scale_w,
        bias,
        metadata,
        group=np.int32(group),
        **attributes,
    )
    return y

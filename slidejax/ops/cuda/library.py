"""The compiled CUDA library: loading it, and saying why it cannot be used.

Nothing here is needed to import slidejax.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import jax

__all__ = [
    "build_info",
    "load",
    "missing",
    "on_gpu",
    "register",
    "unusable",
]

_TARGETS = "CUDA"  # the platform's name in XLA's registry


def on_gpu() -> bool:
    """Whether JAX runs on a CUDA GPU here."""
    return jax.default_backend() in ("gpu", "cuda")


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
def missing() -> str | None:
    """Why the compiled library cannot be used on this machine, or None."""
    module, reason = load()
    if module is None or not on_gpu():
        return reason
    architectures, capability = (
        module.build_info()["architectures"],
        jax.devices()[0].compute_capability,
    )
    if not _runs_on(architectures, capability):
        return f"the CUDA library was built for architectures {architectures}, not for compute capability {capability}"
    return None


def build_info() -> dict[str, Any] | None:
    """What the compiled library was built with: CUDA, architectures, jaxlib, FFI interface; None without it."""
    module, _ = load()
    return None if module is None else module.build_info()


def unusable() -> str | None:
    """Why a program that is lowered for CUDA here may not call the library, or None. On a machine without a GPU it always may,
    since it will run on another one."""
    return missing() if on_gpu() else None

"""Loading the compiled CUDA library, or saying why it cannot be used."""

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
    """The version of jaxlib's FFI interface, from the headers that jaxlib ships."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    found = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR"))
    major, minor = (int(m[1]) if m else 0 for m in found)
    return major, minor


def _code_for(architectures: str, capability: str) -> tuple[int, int] | None:
    """The newest of these architectures, in CMake's notation, that runs on a compute capability.

    >>> [_code_for("80-real,90a-real,120", c) for c in ("8.0", "8.6", "9.0", "10.0", "12.1")]
    [(8, 0), (8, 0), (9, 0), None, (12, 0)]
    """
    found = []
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
            found.append(of)
    return max(found, default=None)


@functools.cache
def load() -> tuple[Any, str | None]:
    """Loads the compiled module and registers its handlers.

    Returns:
      `(module, None)`, or `(None, reason)` if there is none.
    """
    if importlib.util.find_spec("slidejax._cuda") is None:
        return (
            None,
            "slidejax was installed without its CUDA library: reinstall with nvcc on PATH and "
            "SLIDEJAX_CUDA=1",
        )
    try:
        from slidejax import _cuda
    except ImportError as error:
        return None, f"the CUDA library cannot be loaded: {error}"
    built, running = _cuda.build_info()["ffi_api"], _ffi_interface()
    if built > running:
        return None, (
            f"the CUDA library was built against FFI {built[0]}.{built[1]} (jaxlib "
            f"{_cuda.build_info()['jaxlib']}), and this jaxlib has FFI {running[0]}.{running[1]}: "
            f"reinstall slidejax with this jaxlib"
        )
    for name, kind in _cuda.types().items():
        jax.ffi.register_ffi_type(name, kind, platform=_TARGETS)
    for name, handler in _cuda.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform=_TARGETS)
    return _cuda, None


def register() -> None:
    """Registers the custom calls with XLA, once. Without the library it does nothing."""
    load()


@functools.cache
def missing() -> str | None:
    """The reason why the compiled library cannot be used on this machine, or None."""
    module, reason = load()
    if module is None or not on_gpu():
        return reason
    architectures, capability = (
        module.build_info()["architectures"],
        jax.devices()[0].compute_capability,
    )
    if _code_for(architectures, capability) is None:
        return (
            f"the CUDA library was built for architectures {architectures}, "
            f"not for compute capability {capability}"
        )
    return None


def build_info() -> dict[str, Any] | None:
    """CUDA version, architectures, jaxlib and FFI interface of the build, or None."""
    module, _ = load()
    return None if module is None else module.build_info()


def architecture() -> tuple[int, int] | None:
    """The architecture of the code that the GPU runs, such as `(9, 0)`. None if nothing runs.

    It is older than the GPU if the library was built for few architectures.
    """
    info = build_info()
    if info is None or not on_gpu():
        return None
    return _code_for(info["architectures"], jax.devices()[0].compute_capability)


def unusable() -> str | None:
    """The reason why a program that is lowered for CUDA here cannot call the library, or None.

    On a machine without a GPU there is no reason, since the program will run on another machine.
    """
    return missing() if on_gpu() else None

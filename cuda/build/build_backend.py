"""The build backend: scikit-build-core, told whether there is a CUDA library to build.

`pip install .` has to work on a machine with no nvcc, no CUDA and no C++ compiler, and to build the
CUDA library where it can. This module decides that before CMake runs. Without the library the wheel
is pure Python and needs no build tool at all.

The environment variable SLIDEJAX_CUDA says what is wanted. If it is unset, the library is built
where nvcc and a C++ compiler are found. With 1 it is built, or the installation fails and says why.
With 0 it is not built.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build as _base
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# An older jaxlib refuses a handler that was compiled with newer FFI headers; the opposite works.
# These versions have the headers of the oldest interface (0.3) of all supported versions of JAX.
_CUDA_REQUIRES = ["nanobind>=2.4", "jaxlib>=0.10,<0.11.1"]

Settings = dict[str, Any] | None


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDACXX, on PATH, or in the toolkit's usual places."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    roots = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        "/usr/local/cuda",
        "/opt/cuda",
    ]
    inside = (shutil.which("nvcc", path=str(Path(root) / "bin")) for root in roots if root)
    return shutil.which("nvcc") or next(filter(None, inside), None)


def find_cxx() -> str | None:
    """A C++ compiler, which nvcc needs as well."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def cuda_compiler() -> str | None:
    """The nvcc to build the library with; None for a pure Python wheel.

    Raises:
      SystemExit: if SLIDEJAX_CUDA is 1 and the library cannot be built, or if it is neither 0 nor
      1.
    """
    wanted = os.environ.get("SLIDEJAX_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"SLIDEJAX_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        missing = "no nvcc (looked at $CUDACXX, PATH, $CUDA_HOME and /usr/local/cuda)"
    elif find_cxx() is None:
        missing = "no C++ compiler (looked at $CXX, c++, g++ and clang++)"
    else:
        return nvcc
    if wanted == "1":
        raise SystemExit(f"SLIDEJAX_CUDA=1, but there is {missing}")
    print(
        f"slidejax: {missing}: installing the pure JAX library, without the CUDA one",
        file=sys.stderr,
    )
    return None


def _settings(config_settings: Settings) -> dict[str, Any]:
    nvcc = cuda_compiler()
    settings = dict(config_settings or {})
    if nvcc is None:
        return {**settings, "wheel.cmake": "false"}
    return {"cmake.define.CMAKE_CUDA_COMPILER": nvcc, **settings, "wheel.cmake": "true"}


def _requires(config_settings: Settings) -> list[str]:
    return _CUDA_REQUIRES if _settings(config_settings)["wheel.cmake"] == "true" else []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [
        *_base.get_requires_for_build_wheel(_settings(config_settings)),
        *_requires(config_settings),
    ]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [
        *_base.get_requires_for_build_editable(_settings(config_settings)),
        *_requires(config_settings),
    ]


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    return _base.prepare_metadata_for_build_wheel(metadata_directory, _settings(config_settings))


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    return _base.prepare_metadata_for_build_editable(metadata_directory, _settings(config_settings))


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return _base.build_wheel(wheel_directory, _settings(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return _base.build_editable(wheel_directory, _settings(config_settings), metadata_directory)

"""Compiles kernels for the CPU, where emulators run them thread by thread."""

import ctypes
import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "cuda"
TESTS = Path(__file__).parent / "cuda"


def load(tmp_path_factory, name, *sources):
    """The library of `<name>_on_cpu/<name>.cc` and of sources in cuda/, with cuda_on_cpu."""
    cuda, own = TESTS / "cuda_on_cpu", TESTS / f"{name}_on_cpu"
    # The emulator's folders come first: their headers take the place of those of the same name.
    flags = ["-std=c++17", "-Og", "-w", "-fno-strict-aliasing", "-ffp-contract=off"]
    flags += [f"-I{folder}" for folder in (cuda, own, KERNELS)]
    files = [cuda / "emulator.cc", own / f"{name}.cc", *(KERNELS / source for source in sources)]
    return ctypes.CDLL(str(compiled(tmp_path_factory, name, flags, files)))


def compiled(tmp_path_factory, name, flags, files):
    """Compiles a shared library once for all workers of pytest; skips without a compiler."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if base.name.startswith("popen-") else base
    library = folder / f"{name}_emulated.so"
    with open(folder / f"{name}_emulated.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            # Fortified, which is some compilers' default, longjmp ends a process that jumps to
            # another stack, as the emulators do from thread to thread.
            flags = [*flags, "-U_FORTIFY_SOURCE"]
            command = ["g++", *flags, "-fPIC", "-shared", "-o", library, "-x", "c++", *files]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[:3000]
    return library

"""Directories that appear complete or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_target", "staged"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """Yields a new directory that takes the place of `path` when the block ends without an error.

    Until then an earlier directory at `path` stays as it is. If the block fails, the new directory
    is removed.

    Args:
      path: the directory to write. An earlier one is replaced if it is empty or holds `marker`.
      marker: the name of a file that marks directories that may be replaced.

    Raises:
      ValueError: if `path` is a file, or a directory that holds other things.
    """
    target = check_target(path, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        fresh.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield fresh
        for file in fresh.rglob("*"):
            _sync(file)
        _sync(fresh)
        _replace(fresh, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # after an exchange this is the old directory


def check_target(path: str | os.PathLike[str], marker: str) -> Path:
    """The absolute path, if `staged` may write there; otherwise its ValueError is raised."""
    target = Path(os.path.abspath(path))
    if target.exists() and not target.is_dir():
        raise ValueError(f"path {str(target)!r} is a file; a directory is written")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise ValueError(
            f"path {str(target)!r} is a directory with other things in it (no {marker}): "
            "not replaced"
        )
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(fresh: Path, target: Path) -> None:
    """Puts `fresh` in the place of `target`. The old directory is removed, or left at `fresh`."""
    if not target.exists():
        os.rename(fresh, target)
    elif not _exchange(fresh, target):
        # No atomic exchange on this system: between two renames the old directory has another name.
        old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        os.rename(target, old)
        try:
            os.rename(fresh, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two directories in one step (Linux: renameat2); False where this is not possible."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    flags = ctypes.c_uint(_RENAME_EXCHANGE)
    return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), flags) == 0

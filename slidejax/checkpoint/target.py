"""Whether a directory can be written, found out before the work that leads to it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from slidejax.checkpoint.staging import check_target

__all__ = ["disk_usage", "try_target"]


def try_target(
    path: str | os.PathLike[str], marker: str, *, replace: bool = True, nbytes: int = 0
) -> Path:
    """The absolute path, if `slidejax.checkpoint.staging.staged` can write there.

    A file is written and removed beside `path`, under the kind of name that the staged directory
    will have: so a folder that cannot be written, a name that is too long, and a full disk are
    found now. Missing folders above `path` are left missing.

    Args:
      path: the directory to write.
      marker: as in `staged`.
      replace: whether an earlier directory with the marker may be replaced. An empty one may be
        always.
      nbytes: how many bytes will be written, about.

    Raises:
      ValueError: if `path` is a file, or a directory that holds other things or is not to be
        replaced; if there is less space on the disk.
      OSError: if nothing can be written there.
    """
    target = check_target(path, marker)
    if not replace and target.is_dir() and any(target.iterdir()):
        raise ValueError(f"path {str(target)!r} exists already: nothing was done")
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    try:
        handle, probe = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=parent)
        os.close(handle)
        os.unlink(probe)
    except OSError as e:
        raise OSError(e.errno, f"{os.strerror(e.errno or 0)}; nothing was done", str(target)) from e
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise ValueError(
            f"path {str(target)!r} needs about {nbytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are "
            "free there: nothing was done"
        )
    return target


def disk_usage(path: str | os.PathLike[str]) -> int:
    """The bytes of the files in a directory and the folders below it.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = Path(folder, "a").write_bytes(b"abc")
    ...     disk_usage(folder)
    3
    """
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())

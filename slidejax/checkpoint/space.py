"""Room on the disk for the files at the end of long work."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from slidejax.files import partial_file

__all__ = ["check_space", "reserved"]

_BLOCKS = 2**18  # bytes for folders, and for the rest of each file's last block


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def check_space(target: Path, size: int) -> None:
    """Raises an OSError if a file of that many bytes does not fit beside `target`.

    Args:
      target: what will be written.
      size: bytes.
    """
    folder = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            errno.ENOSPC, f"{_mib(size)} will be written and {_mib(free)} are free", str(folder)
        )
    try:
        import resource
    except ImportError:  # on Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and size > limit:
        reason = f"a file of {_mib(size)} will be written, and files may have {_mib(limit)}"
        raise OSError(errno.EFBIG, f"{reason} (ulimit -f)", str(target))


@contextlib.contextmanager
def reserved(target: Path, size: int) -> Iterator[None]:
    """Keeps room for `target` while the block runs, so that others cannot fill the disk meanwhile.

    A file of about that size lies beside `target` until the block ends; what is written after the
    block takes its place. Where a file system cannot reserve room, only that of now is checked.

    Args:
      target: what will be written after the block. Its folder is there.
      size: bytes of its files together.

    Raises:
      OSError: as `check_space`; if the room is not there after all.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, reserved(Path(folder, "out"), 5000):
    ...     sum(file.stat().st_size for file in Path(folder).iterdir()) >= 5000
    True
    """
    size += _BLOCKS
    check_space(target, size)
    with partial_file(target) as handle:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(handle, 0, size)
            except OSError as e:
                if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                    reason = f"{_mib(size)} will be written, and there is no room: {e.strerror}"
                    raise OSError(e.errno, reason, str(target)) from e
        yield

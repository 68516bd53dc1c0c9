"""Writing files so that a half-written one never replaces a good one.

A file is written under another name beside its place and then renamed. The other name ends in
`.partial`, and its writer holds a lock on it. A writer that was killed leaves its file behind, and
nobody holds the lock: the next writer of the same place removes the file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

__all__ = [
    "CHECKSUM",
    "LARGEST",
    "PARTIAL",
    "check_json",
    "check_path",
    "check_regular",
    "exclusive",
    "json_checksum",
    "partial_directory",
    "partial_file",
    "read_whole",
    "reading",
    "remove_abandoned",
    "replacing",
    "sync",
    "write_json",
]

PARTIAL = ".partial"
LARGEST = 1 << 28  # bytes of a file that is read as a whole


def check_path(path: Any, name: str = "path") -> Path:
    """The path.

    Raises:
      TypeError, ValueError: naming the argument, if it is none.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a str or os.PathLike, got {type(path).__name__}")
    if not os.fspath(path) or "\0" in os.fspath(path):
        # pathlib would take an empty one for the directory that one is in
        raise ValueError(f"{name} must name a file or directory, got {os.fspath(path)!r}")
    return Path(path)


def _prefix(target: Path) -> str:
    return f".{target.name[:60]}."  # a name has at most 255 bytes


def _partial_name(target: Path) -> Path:
    return target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}{PARTIAL}")


# --- one file -------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """Yields a new file that takes the place of `path` when the block ends without an error.

    Missing folders are made. A symbolic link stays, and the file that it points to is replaced. A
    new file gets the usual permissions, and an earlier one's are kept. What is no regular file,
    such as a pipe or `/dev/null`, is written to and not replaced.

    Args:
      path: the file.
      mode: "wb" or "w".

    Raises:
      OSError: naming the file, if it cannot be written. An earlier file then stays as it is.
    """
    path = Path(path)
    written = _written_in_place(path)
    if written is not None:
        try:
            with open(written, mode.replace("w", "a")) as file:
                yield file
        except OSError as e:
            raise _unwritten(e, path, None) from e
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    earlier = path.stat().st_mode if path.exists() else None
    if earlier is not None and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    handle, temporary = _new_file(path)
    try:
        with os.fdopen(handle, mode) as file:
            if earlier is not None:
                os.fchmod(handle, stat.S_IMODE(earlier))
            yield file
            file.flush()
            os.fsync(handle)
            os.replace(temporary, path)
        sync(path.parent)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError):
            raise _unwritten(e, path, temporary) from e
        raise


def _unwritten(error: OSError, path: Path, temporary: Path | None) -> OSError:
    """An error of writing, in the words of the code that named `path`."""
    if error.errno is None or error.filename not in (None, str(temporary)):
        return error
    return OSError(error.errno, f"cannot be written: {error.strerror}", str(path))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON to `path`, atomically; missing folders are made."""
    text = json.dumps(value, indent=1) + "\n"
    with replacing(path, "w") as file:
        file.write(text)


_OPEN = re.compile(rf"/(?:proc/(?:self|{os.getpid()})|dev)/fd/(\d+)")


def _written_in_place(path: Path) -> Path | int | None:
    """The path to open where no file can replace the path (a pipe, a device); None for a file."""
    at = os.path.abspath(path)
    for _ in range(40):  # as many links as the kernel follows
        open_file = _OPEN.fullmatch(at)
        if open_file is not None:  # such as /dev/stdout: opening it again would begin at its start
            return os.dup(int(open_file[1]))
        if not os.path.islink(at):
            break
        at = os.path.normpath(os.path.join(os.path.dirname(at), os.readlink(at)))
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return None if stat.S_ISREG(kind) else path


def _new_file(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, open and locked, with the permissions of any other new file."""
    while True:
        name = _partial_name(path)
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if _hold(handle, name):
            return handle, name
        os.close(handle)


# --- reading --------------------------------------------------------------------------------------


def read_whole(path: str | os.PathLike[str], largest: int = LARGEST) -> bytes:
    """The bytes of a file.

    A pipe without a writer would never answer, and a device may never end.

    Raises:
      OSError: if it cannot be read.
      ValueError: naming it, if it is no regular file, or a larger one.
    """
    check_regular(path, largest)
    return Path(path).read_bytes()


def check_regular(path: str | os.PathLike[str], largest: int = LARGEST) -> None:
    """Looks at a file before it is read.

    Raises:
      OSError, ValueError: as `read_whole`.
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{os.fspath(path)!r} is no regular file")
    if found.st_size > largest:
        raise ValueError(f"{os.fspath(path)!r} is larger than {largest} bytes")


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Around code that reads what others wrote: whatever it raises becomes one clear error.

    Parsers of other packages have exceptions of all kinds. Those of this kind mean that the content
    is not what was expected.

    Args:
      path: the file or directory that is read. Errors that name it, or a file in it, stay.

    Raises:
      ValueError: naming the path.
    """
    name = os.fspath(path)
    try:
        yield
    except (ValueError, NotImplementedError) as e:
        # The path as such, and not a word of the message: a folder may be called "model".
        named = re.search(rf"(^|['\" ]){re.escape(name)}['\"/:]", str(e))
        if named and type(e) in (ValueError, NotImplementedError):
            raise
        kind = NotImplementedError if isinstance(e, NotImplementedError) else ValueError
        raise kind(f"{name!r}: {e}") from e
    except MemoryError as e:
        raise ValueError(f"{name!r} is damaged: it asks for more memory than there is") from e
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, EOFError) as e:
        raise ValueError(f"{name!r} is damaged: {type(e).__name__}: {e}") from e


# --- JSON with a checksum -------------------------------------------------------------------------

CHECKSUM = "sha256"


def json_checksum(value: Mapping[str, Any]) -> str:
    """The checksum of a JSON object's content, whatever its white space and its order of keys are.

    >>> json_checksum({"a": 1, "b": 2}) == json_checksum({"b": 2, "a": 1, CHECKSUM: "of it"})
    True
    """
    rest = {key: one for key, one in value.items() if key != CHECKSUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_json(value: Mapping[str, Any], file: str) -> None:
    """Raises a ValueError that names the file if an object's `CHECKSUM` is not that of the rest."""
    try:
        right = value.get(CHECKSUM) == json_checksum(value)
    except (ValueError, TypeError, RecursionError):
        right = False
    if not right:
        raise ValueError(f"{file!r} is damaged: its content does not match its key {CHECKSUM!r}")


# --- locks ----------------------------------------------------------------------------------------


def _try_lock(handle: int, wait: bool) -> bool | None:
    """Locks an open file or directory for this process; False if another one holds it.

    None means that the system or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _hold(handle: int, path: Path, *, wait: bool = False, certain: bool = False) -> bool:
    """Locks what was opened at `path`; False if it is another's, or is not at `path` any more.

    Args:
      handle: the open file or directory.
      path: its path.
      wait: for the process that holds it.
      certain: where there are no locks, the answer is False and not True.
    """
    locked = _try_lock(handle, wait)
    if locked is False or (locked is None and certain):
        return False
    return not _is_gone(handle, path)


@contextlib.contextmanager
def exclusive(path: str | os.PathLike, *, wait: bool = True) -> Iterator[bool]:
    """Keeps other processes out while the block runs, by a lock file that is there only then.

    Args:
      path: the lock file. Its folder is made.
      wait: for a process that is inside; else the block runs at once and gets False.

    Yields:
      Whether this process holds the lock.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        held = _hold(handle, path, wait=wait)
        if held or not (wait or _is_gone(handle, path)):
            break
        os.close(handle)  # the one before has removed it: it takes a new one
    try:
        yield held
    finally:
        if held:
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(handle)


def _is_gone(handle: int, path: Path) -> bool:
    """Whether another file, or none, is now at the path of an open file."""
    try:
        return not os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def partial_file(target: Path) -> Iterator[int]:
    """Yields a new locked file beside `target`, open; it is removed when the block ends."""
    handle, path = _new_file(target)
    try:
        yield handle
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


@contextlib.contextmanager
def partial_directory(target: Path) -> Iterator[Path]:
    """Yields a new locked directory beside `target`; it is removed when the block ends."""
    while True:
        path = _partial_name(target)
        path.mkdir()
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another writer took it for abandoned, before it was locked
            continue
        if _hold(handle, path):
            break
        os.close(handle)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def remove_abandoned(target: Path) -> None:
    """Removes what killed writers of `target` left beside it."""
    prefix = _prefix(target)
    try:
        names = [
            name
            for name in os.listdir(target.parent)
            if name.startswith(prefix) and name.endswith(PARTIAL)
        ]
    except OSError:
        return
    for name in names:
        path = target.parent / name
        if "." in name[len(prefix) : -len(PARTIAL)]:  # of a target with a longer name
            continue
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if not _hold(handle, path, certain=True):
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            finally:
                os.close(handle)


def sync(path: Path) -> None:
    """Waits until a file or a directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # this file system cannot
            raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        os.close(handle)

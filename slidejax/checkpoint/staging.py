"""Directories that appear complete or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from slidejax.checkpoint.space import check_space
from slidejax.files import exclusive, partial_directory, remove_abandoned, replacing, sync

__all__ = [
    "CHAT_TEMPLATES",
    "GGUF_TOKENIZER",
    "TEXT_FILES",
    "check_adding",
    "check_apart",
    "check_outside",
    "check_target",
    "check_writing",
    "claimed",
    "relation",
    "staged",
]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_MOUNTS = Path("/proc/self/mountinfo")

GGUF_TOKENIZER = "gguf_tokenizer.json"  # what a GGUF file says about its tokenizer

# Text files that go with a model's parameters. None of them is code.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    GGUF_TOKENIZER,
)
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of such files

# Files that slidejax writes into directories. All others in an earlier directory are the user's.
_OURS = frozenset(
    {
        "slidejax.json",
        "slidejax.safetensors",
        *TEXT_FILES,
        CHAT_TEMPLATES,
        # Tokenizers that transformers writes beside its Flax models.
        "vocab.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
    }
)


# --- before the work ------------------------------------------------------------------------------


def check_target(path: str | os.PathLike[str], marker: str, name: str = "path") -> Path:
    """The absolute path, without symbolic links, if `staged` may write there.

    Nothing is written. `claimed` also tries to write.

    Args:
      path: the directory.
      marker: as in `staged`.
      name: of the argument, for the error.

    Raises:
      ValueError: if `path` is a file, a mount point, a link to nothing, or a directory that holds
        other things than an earlier one.
    """
    named = _named(path, name)
    target = Path(os.path.realpath(path))
    if os.path.islink(path) and not os.path.exists(path):
        raise ValueError(
            f"{name} {named!r} is a symbolic link to {str(target)!r}, which is not there"
        )
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"{name} {named!r} is a file; a directory is written")
    if _is_mount(target):
        raise ValueError(
            f"{name} {named!r} is a mount point, which cannot be replaced as a whole: name a "
            "directory in it"
        )
    if any(target.iterdir()) and not (target / marker).is_file():
        raise ValueError(
            f"{name} {named!r} is a directory with other things in it (no {marker}): not replaced"
        )
    return target


def _named(path: str | os.PathLike[str], name: str) -> str:
    """The path as text; a ValueError for one that no directory can have."""
    named = os.fspath(path)
    if not named or "\0" in named:  # an empty one would be the directory that one is in
        raise ValueError(f"{name} must name a directory, got {named!r}")
    return named


def relation(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> str | None:
    """How a path lies to another one: "is", "lies in" or "holds" it, or None if they are apart.

    Symbolic links are followed, and a directory that is mounted in two places is one. Neither path
    need exist.

    >>> relation("a/b", "a/c/../b"), relation("a/b", "a"), relation("a", "a/b"), relation("a", "ab")
    ('is', 'lies in', 'holds', None)
    """
    one, two = Path(os.path.realpath(path)), Path(os.path.realpath(other))
    if _same(one, two):
        return "is"
    if any(_same(folder, two) for folder in one.parents):
        return "lies in"
    return "holds" if any(_same(folder, one) for folder in two.parents) else None


def _same(one: Path, two: Path) -> bool:
    if one == two:
        return True
    try:
        return os.path.samefile(one, two)
    except (OSError, ValueError):  # one of them is not there
        return False


def check_apart(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    name: str = "path",
    what: str = "the model that is read",
) -> None:
    """Raises a ValueError if a directory that will be written would replace what is read.

    Args:
      path: the directory that will be written.
      source: the file or directory that is read. None, or a value that is no path, is apart.
      name: of the argument, for the error.
      what: `source` in words, for the error.
    """
    _named(path, name)
    if not source or not os.path.exists(source):
        return
    how, named = relation(path, source), os.fspath(path)
    if how == "is":
        raise ValueError(f"{name} {named!r} is {what}, which would be lost: name another directory")
    if how is not None:
        raise ValueError(
            f"{name} {named!r} {how} {os.fspath(source)!r}, {what}: name another directory"
        )


def check_outside(
    path: str | os.PathLike[str], other: str | os.PathLike[str], name: str, what: str
) -> None:
    """Raises a ValueError if a directory to which files are added is another one, or lies in it.

    Args:
      path: the directory. It may hold the other one: nothing in it is replaced.
      other: the other directory, which may not be there yet.
      name: of the argument `path`, for the error.
      what: `other` in words, for the error.
    """
    how = relation(path, other)
    if how in ("is", "lies in"):
        raise ValueError(
            f"{name} {os.fspath(path)!r} {how} {os.fspath(other)!r}, {what}: name another directory"
        )


@contextlib.contextmanager
def claimed(
    path: str | os.PathLike[str], marker: str, *, overwrite: bool = False, flag: str = "overwrite"
) -> Iterator[Path]:
    """Makes sure, before long work, that `staged` can write a directory; keeps others away from it.

    A directory is written and removed beside `path` for a trial.

    Args:
      path: the directory that will be written in the block.
      marker: as in `staged`.
      overwrite: whether an earlier directory may be replaced.
      flag: what the user sets to allow that, for the error.

    Yields:
      The absolute path, without symbolic links.

    Raises:
      ValueError: as `check_target`; if there is an earlier directory and `overwrite` is False; if
        another process has claimed the path.
      OSError: naming the directory that cannot be written.
    """
    target = check_target(path, marker)
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise ValueError(
            f"path {os.fspath(path)!r} holds an earlier result: name another one, or replace it "
            f"with {flag}"
        )
    made = _try_to_write(target)
    try:
        with exclusive(target.with_name(f".{target.name[:60]}.claimed"), wait=False) as held:
            if not held:
                raise ValueError(
                    f"path {os.fspath(path)!r} is being written by another process at this moment"
                )
            yield target
    finally:
        _remove_empty(made)  # where nothing was written after all


def check_writing(
    path: str | os.PathLike[str], marker: str, size: int = 0, name: str = "path"
) -> None:
    """Tries everything that `staged` will need, long before there is something to write.

    Args:
      path: the directory that will be written.
      marker: as in `staged`.
      size: how many bytes it will have.
      name: of the argument, for the error.

    Raises:
      ValueError: as `check_target`.
      OSError: naming the directory that cannot be written; if there is no space for it.
    """
    target = check_target(path, marker, name)
    _remove_empty(_try_to_write(target))
    check_space(target, size)


def check_adding(path: str | os.PathLike[str], name: str = "path") -> None:
    """Raises an OSError if no files can be written into a directory, which need not be there.

    Args:
      path: the directory. A file is written in it and removed, for a trial.
      name: of the argument, for the error.
    """
    folder = Path(_named(path, name))
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "trial") as file:
            file.write(b"trial")
        (folder / "trial").unlink()
    except OSError as e:
        reason = f"{name}: no file can be written there: {e.strerror}"
        raise OSError(e.errno, reason, os.fspath(path)) from e
    finally:
        _remove_empty(missing)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Removes those folders that are there and hold nothing."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _try_to_write(target: Path) -> list[Path]:
    """Writes a directory beside the target and removes it; returns the parents that were made."""
    missing = [p for p in target.parents if not p.exists()]
    try:
        with _named_as(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(target)
            with partial_directory(target) as trial:
                (trial / "trial").write_bytes(b"trial")
            if target.exists():
                _check_owner(target)
    except OSError:
        _remove_empty(missing)
        raise
    return missing


@contextlib.contextmanager
def _named_as(target: Path) -> Iterator[None]:
    """Names the directory in errors about work beside it."""
    try:
        yield
    except OSError as e:
        reason = f"no directory can be written there: {e.strerror}"
        raise OSError(e.errno, reason, str(target)) from e


def _check_owner(target: Path) -> None:
    """Raises a PermissionError where only its owner may give a directory another name.

    That is so in folders like /tmp, which all users may write.
    """
    folder, user = target.parent.stat(), getattr(os, "geteuid", lambda: 0)()
    if folder.st_mode & stat.S_ISVTX and user not in (0, folder.st_uid, target.stat().st_uid):
        raise PermissionError(errno.EPERM, "what is there belongs to another user")


def _is_mount(target: Path) -> bool:
    if os.path.ismount(target):
        return True
    try:  # a directory that is mounted from the same file system is not found otherwise
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    places = (line.split()[4] for line in lines if line.count(b" ") > 4)
    return os.fsencode(target) in (p.decode("unicode_escape").encode("latin-1") for p in places)


# --- the writing ----------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """Yields a new directory that takes the place of `path` when the block ends without an error.

    Until then an earlier directory at `path` stays as it is. Files in it that slidejax does not
    write are the user's, and are in the new directory, too. If the block fails, the new directory
    is removed. If the process is killed, the next one that writes there removes it.

    Args:
      path: the directory to write. An earlier one is replaced if it is empty or holds `marker`.
      marker: the name of a file that marks directories that may be replaced.

    Raises:
      ValueError: as `check_target`.
      OSError: naming the file or directory that cannot be written. If the new directory is complete
        and only cannot be put in its place, it is kept, and the error says where.
    """
    target = check_target(path, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    _bring_back(target)
    remove_abandoned(target)
    with contextlib.ExitStack() as stack:
        with _named_as(target):
            fresh = stack.enter_context(partial_directory(target))
            if target.exists():
                _check_owner(target)
        try:
            yield fresh
            for file in fresh.rglob("*"):
                sync(file)
            sync(fresh)
        except OSError as e:  # in the words of the code that named `path`
            written = Path(os.path.abspath(e.filename or fresh))
            if e.errno is None or not written.is_relative_to(fresh):
                raise
            name = os.path.relpath(written, fresh)
            reason = f"cannot be written: {e.strerror}"
            raise OSError(e.errno, reason, os.path.normpath(target / name)) from e
        try:
            check_target(path, marker)
            _replace(fresh, target)
        except (OSError, ValueError) as e:
            kept = _keep(fresh, target)
            raise OSError(
                f"{str(target)!r} cannot be replaced ({e}); what was to be written there is "
                f"complete in {str(kept)!r}"
            ) from e
        sync(target.parent)


def _keep(fresh: Path, target: Path) -> Path:
    """Gives a complete directory a name that nobody removes."""
    number = 1
    while True:
        kept = target.with_name(f"{target.name}.written-{number}")
        if not kept.exists():
            os.rename(fresh, kept)
            return kept
        number += 1


def _replace(fresh: Path, target: Path) -> None:
    """Puts `fresh` in the place of `target`. The old directory is removed, or left at `fresh`."""
    if not target.exists():
        try:
            os.rename(fresh, target)
            return
        except OSError as e:  # another process was faster
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    for entry in target.iterdir():
        if entry.name not in _OURS and not (fresh / entry.name).exists():
            _carry_over(entry, fresh / entry.name)
    if not _exchange(fresh, target):
        # No atomic exchange on this system: between two renames the old directory has another name.
        old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        os.rename(target, old)
        try:
            os.rename(fresh, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _bring_back(target: Path) -> None:
    """Gives an earlier directory its name again, if a process was killed between two renames."""
    prefix = f".{target.name}.replaced-"
    if target.exists():
        return
    for old in target.parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(old.name.removeprefix(prefix))
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                os.rename(old, target)
                return


def _carry_over(entry: Path, to: Path) -> None:
    """Puts a user's file or directory into the new directory as well, if possible as a link."""
    if entry.is_dir() and not entry.is_symlink():
        to.mkdir()
        for inner in entry.iterdir():
            _carry_over(inner, to / inner.name)
        shutil.copystat(entry, to)
        return
    try:
        os.link(entry, to, follow_symlinks=False)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copy2(entry, to, follow_symlinks=False)


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

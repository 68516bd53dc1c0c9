"""The files that a command writes must not be those that it reads; checked here for all commands.

A path counts by where it leads: symbolic links are followed. Whatever is no regular file and no
directory, such as a pipe or `/dev/null`, is never replaced, and is apart from everything.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["check", "work_of"]

# The names of the arguments of all commands that are paths, and how users write them.
_MODELS = {"model": "MODEL", "models": "MODEL", "against": "--against"}
_TEXTS = {"text": "--text", "calibration": "--calibration", "problems": "--problems"}
_FILES = {"json": "--json", "plot": "--plot", "completions": "--completions"}


class _Place(NamedTuple):
    """A path of the command line.

    Attributes:
      flag: how the user names it.
      path: the path.
      what: what it is, in words.
    """

    flag: str
    path: str
    what: str


def work_of(out: str) -> str:
    """Where `convert` keeps finished layers if `--work` does not say."""
    return f"{Path(out)}.work"


def check(args: argparse.Namespace) -> None:
    """Raises a ValueError if something that would be written is, holds or lies in what is read.

    Nothing is written. The two things that are written must be apart, too.

    Args:
      args: the arguments of any command.
    """
    models, texts = list(_models(args)), list(_places(args, _TEXTS, "a text that is read"))
    files = [place for place in _places(args, _FILES, "a file that is written") if _is_file(place)]
    _check_folders(args, models, texts)
    folders = _written_folders(args)
    for number, file in enumerate(files):
        for text in (*texts, *files[:number]):
            if _meets(file, text):
                raise ValueError(
                    f"{file.flag} {file.path!r} is {text.flag}, {text.what}: name another file"
                )
        for folder in folders:
            _check_elsewhere(file, folder)
        for model in models:
            _check_no_part(file, model)


# --- what is read and what is written -------------------------------------------------------------


def _places(args: argparse.Namespace, flags: dict[str, str], what: str) -> Iterator[_Place]:
    """The paths of some arguments of a command."""
    for name, flag in flags.items():
        value = getattr(args, name, None)
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and path not in ("", "-"):
                yield _Place(flag, path, what)


def _models(args: argparse.Namespace) -> Iterator[_Place]:
    """The models that a command reads, where they are."""
    from slidejax.lm.models import NAMED, noted_source, packaged_file, saved_notes

    if args.command == "bench":  # --model is the name of some sizes
        return
    for place in _places(args, _MODELS, "the model that is read"):
        if place.path not in NAMED:
            yield place
            continue
        try:
            yield place._replace(path=str(packaged_file(place.path)))
        except ValueError:  # it is not installed, which is said where it is read
            continue
    if args.command == "recover" and args.against is None:
        source = noted_source(args.model, saved_notes(Path(args.model)))
        if source is not None and source not in NAMED:
            yield _Place("MODEL", source, "the original model, which is read")


def _written_folders(args: argparse.Namespace) -> list[_Place]:
    """The directories that a command writes."""
    found = list(_places(args, {"out": "OUT"}, "a directory that is written"))
    found += _places(args, {"checkpoint": "--checkpoint"}, "a directory that is written")
    if args.command == "convert":
        work = args.work or work_of(args.out)
        found.append(_Place("--work", work, "a directory that is written"))
    return found


def _is_file(place: _Place) -> bool:
    """Whether a file is, or will be, a regular one."""
    return os.path.isfile(place.path) or not os.path.exists(place.path)


# --- the checks -----------------------------------------------------------------------------------


def _meets(one: _Place, two: _Place) -> bool:
    from slidejax.checkpoint.staging import relation

    return relation(one.path, two.path) == "is"


def _check_folders(args: argparse.Namespace, models: list[_Place], texts: list[_Place]) -> None:
    """Checks OUT, `--checkpoint` and `--work`."""
    from slidejax.checkpoint.staging import check_apart, check_outside, relation

    out: str | None = getattr(args, "out", None)
    checkpoint: str | None = getattr(args, "checkpoint", None)
    if out is None:
        return
    for flag, path in (("OUT", out), ("--checkpoint", checkpoint)):
        if path is not None:
            for read in (*models, *texts):
                check_apart(path, read.path, flag, read.what)
    if checkpoint is not None and (how := relation(checkpoint, out)) is not None:
        raise ValueError(f"--checkpoint {checkpoint!r} {how} OUT, {out!r}: name another directory")
    if args.command == "convert":
        for path, what in ((out, "OUT"), *((model.path, model.what) for model in models)):
            check_outside(args.work or work_of(out), path, "--work", what)


def _check_elsewhere(file: _Place, folder: _Place) -> None:
    """Raises a ValueError for a file that is a directory which will be written, or lies in it."""
    from slidejax.checkpoint.staging import relation

    how = relation(file.path, folder.path)
    if how == "is":
        raise ValueError(
            f"{file.flag} {file.path!r} is {folder.flag}, which is a directory: name a file"
        )
    if how is not None and not (folder.flag == "--work" and how == "lies in"):
        raise ValueError(
            f"{file.flag} {file.path!r} {how} {folder.flag}, {folder.path!r}: name a file elsewhere"
        )


def _check_no_part(file: _Place, model: _Place) -> None:
    """Raises a ValueError for a file that is a model, or a part of one."""
    from slidejax.checkpoint.staging import relation

    how = relation(file.path, model.path)
    if how is None and os.path.isdir(model.path):
        # Directories of downloaded models hold links to files that lie elsewhere.
        inner = (entry.path for entry in os.scandir(model.path))
        how = "is a file of" if any(relation(file.path, path) == "is" for path in inner) else None
        if how is None and Path(os.path.abspath(file.path)).is_relative_to(
            os.path.abspath(model.path)
        ):
            how = "lies in"
    if how is not None:
        raise ValueError(
            f"{file.flag} {file.path!r} {how} {model.path!r}, {model.what}: name another file"
        )

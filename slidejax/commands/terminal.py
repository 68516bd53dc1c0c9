"""Consoles, progress bars, text files and JSON, for all commands."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

__all__ = ["console", "duration", "emit", "progress", "read_text", "show_written", "write"]

_LONGEST = 1 << 30  # characters of a text


def console(stderr: bool = False) -> Any:
    """A rich console on standard output or standard error."""
    try:
        from rich.console import Console
    except ImportError as e:
        raise ImportError("this command needs the extra: pip install 'slidejax[demo]'") from e
    # A file has no width, so its tables get one that most readers can show.
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() else 120
    return Console(stderr=stderr, width=wide)


def progress() -> Any:
    """A progress bar on standard error that disappears when it is done."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console(stderr=True), transient=True)


def duration(seconds: float) -> str:
    """A time in words, as exact as an estimate is.

    >>> duration(8), duration(200), duration(10_000)
    ('8 s', '3 min', '2.8 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def read_text(file: str) -> str:
    """The text of a file in UTF-8, without the mark of byte order that it may begin with.

    Raises:
      ValueError: if it is not UTF-8, or has more than `_LONGEST` characters: a device such as
        /dev/zero never ends.
    """
    try:
        with Path(file).open(encoding="utf-8") as opened:
            text = opened.read(_LONGEST + 2)
    except UnicodeDecodeError as e:
        raise ValueError(f"{file!r} is not a text file in UTF-8: {e}") from e
    text = text.removeprefix("\ufeff")
    if len(text) > _LONGEST:
        raise ValueError(f"{file!r} must be a text of at most {_LONGEST} characters, and has more")
    return text


def emit(args: argparse.Namespace, value: Any) -> None:
    """Writes the value as JSON where `--json` says; infinities and nan become null."""
    if args.json:
        write(args.json, json.dumps(_finite(value), indent=1) + "\n")


def write(file: str, text: str) -> None:
    """Writes a result into a file, or to standard output for "-" and where the file cannot be.

    Raises:
      OSError: if the file cannot be written. The work of hours is on standard output then.
    """
    from slidejax.files import replacing

    if file != "-":
        try:
            with replacing(file, "w") as out:
                out.write(text)
            return
        except OSError:
            print(text, end="", flush=True)
            raise
    print(text, end="")


def _finite(value: Any) -> Any:
    """The value with None for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def show_written(out: Any, name: str, prompt: str, text: str) -> None:
    """Prints a prompt after the name of a model, and how the model continues it."""
    from rich.text import Text

    out.print()
    out.print(Text.assemble((name, "bold"), f": {prompt}"), highlight=False)
    out.print(text.strip(), markup=False, highlight=False)

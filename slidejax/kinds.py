"""Checks of arguments that are not numbers: functions, texts, names, lists. Loads no JAX.

`slidejax.bounds` has the numbers, `slidejax.files.check_path` the paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "check_flag",
    "check_function",
    "check_kind",
    "check_list",
    "check_name",
    "check_regex",
    "check_text",
    "shown",
]


def shown(value: Any) -> str:
    """A value in an error: its beginning, in one line.

    >>> shown("a"), len(shown([0] * 1000))
    ("'a'", 60)
    """
    return " ".join(f"{value!r:.60}".split())


def check_kind(value: Any, kind: type | tuple[type, ...], name: str, what: str) -> Any:
    """The value, if it is of a kind.

    Args:
      value: what a caller gave.
      kind: the class or classes that are right.
      name: of the argument, for the error.
      what: the kind in words, with its article.

    Raises:
      TypeError: naming the argument.

    >>> check_kind("a", dict, "params", "a dict")
    Traceback (most recent call last):
    TypeError: params must be a dict, got 'a'
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {shown(value)}")
    return value


def check_function(value: Any, name: str, *, optional: bool = False) -> Any:
    """A function, or anything else that can be called; with `optional` perhaps None.

    Raises:
      TypeError: naming the argument.
    """
    if not callable(value) and not (optional and value is None):
        raise TypeError(
            f"{name} must be a function{' or None' if optional else ''}, got {shown(value)}"
        )
    return value


def check_flag(value: Any, name: str) -> bool:
    """True or False: anything else would silently count as one of them.

    Raises:
      TypeError: naming the argument.
    """
    return check_kind(value, bool, name, "True or False")


def check_text(value: Any, name: str, what: str = "a text") -> str:
    """A text that is not empty.

    Raises:
      TypeError, ValueError: naming the argument.
    """
    if not check_kind(value, str, name, what).strip():
        raise ValueError(f"{name} must be {what}, got {value!r}")
    return value


def check_name(value: Any, names: Iterable[str], name: str, *, optional: bool = False) -> Any:
    """One of several names; with `optional` perhaps None.

    Raises:
      ValueError: naming the argument and all names.

    >>> check_name("b", ("a",), "reads")
    Traceback (most recent call last):
    ValueError: reads must be one of 'a', got 'b'
    """
    names = tuple(names)
    if (isinstance(value, str) and value in names) or (optional and value is None):
        return value
    raise ValueError(
        f"{name} must be one of {', '.join(map(repr, names))}{' or None' if optional else ''}, "
        f"got {shown(value)}"
    )


def check_list(value: Any, name: str, what: str, *, empty: bool = False) -> list[Any]:
    """The elements of a list. A text is none: its letters are never what a caller meant.

    Args:
      value: what a caller gave.
      name: of the argument, for the error.
      what: its elements in words.
      empty: whether there may be none.

    Raises:
      TypeError, ValueError: naming the argument.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of {what}, got {shown(value)}")
    if not value and not empty:
        raise ValueError(f"{name} must be a list of {what}, at least one, got {shown(value)}")
    return list(value)


def check_regex(value: Any, name: str) -> re.Pattern[str]:
    """A regular expression, compiled.

    Raises:
      TypeError, ValueError: naming the argument.
    """
    check_kind(value, (str, re.Pattern), name, "a regular expression")
    try:
        return re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}: bad regular expression {shown(value)}: {error}") from error

"""The ordered list of implementations.

`explain`, `prepare`, `bench`, `tune` and `info` read this list. None of them knows an
implementation by name.
"""

from __future__ import annotations

import keyword

from slidejax.ops.implementations.base import Form, Implementation
from slidejax.ops.implementations.cusparselt import CUSPARSELT
from slidejax.ops.implementations.decode import DECODE
from slidejax.ops.implementations.dense import DENSE
from slidejax.ops.implementations.hopper import HOPPER
from slidejax.ops.implementations.reference import REFERENCE
from slidejax.ops.problem import Problem

__all__ = [
    "FALLBACK",
    "REFERENCE",
    "check_name",
    "competing",
    "form_of",
    "get",
    "implementations",
    "refusals",
    "register",
]

# It runs where nothing is known to be faster. It refuses nothing.
FALLBACK: Implementation = DENSE

_IMPLEMENTATIONS: list[Implementation] = [DECODE, HOPPER, CUSPARSELT, DENSE, REFERENCE]


def register(implementation: Implementation) -> None:
    """Adds an implementation, before the others.

    Programs that are lowered from now on run it if the caller asks for it, or if it is the fastest
    in the measured table (`slidejax tune`). Programs that were compiled before stay as they are.

    Args:
      implementation: an object of a subclass of
        `slidejax.ops.implementations.base.Implementation`.

    Raises:
      TypeError: if it is no such object.
      ValueError: if its name, or the name of its prepared form, is taken or no identifier.
    """
    if not isinstance(implementation, Implementation):
        raise TypeError(
            "implementation must be an object of a subclass of Implementation, got "
            f"{implementation!r}"
        )
    name, form = getattr(implementation, "name", None), implementation.form
    taken = {i.form.name for i in _IMPLEMENTATIONS if i.form is not None}
    for what, text, others in (
        ("an implementation", name, implementations()),
        ("a prepared form", name if form is None else form.name, taken),
    ):
        if not isinstance(text, str) or not text.isidentifier() or keyword.iskeyword(text):
            raise ValueError(f"the name of {what} must be an identifier, got {text!r}")
        if text in others:
            raise ValueError(f"there is {what} called {text!r} already")
    _IMPLEMENTATIONS.insert(0, implementation)


def implementations() -> tuple[str, ...]:
    """The names that `implementation=` accepts.

    >>> "hopper" in implementations(), "reference" in implementations()
    (True, True)
    """
    return tuple(implementation.name for implementation in _IMPLEMENTATIONS)


def get(name: str) -> Implementation:
    """The implementation with this name.

    Raises:
      ValueError: if there is none.
    """
    for implementation in _IMPLEMENTATIONS:
        if isinstance(name, str) and implementation.name == name:
            return implementation
    raise ValueError(
        f"implementation must be None or one of {', '.join(implementations())}, got {name!r:.60}"
    )


def form_of(name: str) -> Form | None:
    """The prepared form with this name, or None."""
    forms = (i.form for i in _IMPLEMENTATIONS if i.form is not None)
    return next((form for form in forms if form.name == name), None)


def check_name(name: str | None) -> None:
    """Raises ValueError unless `name` is None or the name of an implementation."""
    if name is not None:
        get(name)


def competing() -> tuple[Implementation, ...]:
    """The implementations that are timed and chosen by measurement."""
    return tuple(i for i in _IMPLEMENTATIONS if i.competes)


def refusals(problem: Problem) -> dict[str, str]:
    """Every implementation that refuses the problem, with its reason."""
    reasons = {i.name: i.refusal(problem) for i in _IMPLEMENTATIONS}
    return {name: reason for name, reason in reasons.items() if reason is not None}

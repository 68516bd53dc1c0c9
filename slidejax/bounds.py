"""The kind and the range of numbers, for arguments and flags alike. Loads no JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import operator
from typing import Any

__all__ = ["COUNT", "COUNT_OR_NONE", "SEED", "TEMPERATURE", "TOP_K", "TOP_P", "Bound"]


@dataclasses.dataclass(frozen=True)
class Bound:
    """A range of numbers.

    Attributes:
      least: the smallest number.
      most: the largest number; None: the largest int32, or 1e38, which float32 holds.
      whole: only whole numbers.
      above: only numbers larger than `least`.

    >>> 0.5 in Bound(0, 1), 0 in Bound(0, 1, above=True), float("nan") in Bound(0)
    (True, False, False)
    >>> str(Bound(0, 1, above=True)), str(Bound(1, whole=True))
    ('above 0 and at most 1', 'from 1 to 2147483647')
    """

    least: float
    most: float | None = None
    whole: bool = False
    above: bool = False

    @property
    def end(self) -> float:
        """The largest number."""
        return self.most if self.most is not None else 2**31 - 1 if self.whole else 1e38

    def is_low(self, value: float) -> bool:
        """Whether a number is too small, or no number at all."""
        return math.isnan(value) or value < self.least or (self.above and value == self.least)

    def __contains__(self, value: float) -> bool:
        return not self.is_low(value) and value <= self.end

    def check(self, value: Any, name: str) -> Any:
        """The number, as an int or a float of Python.

        Args:
          value: what a caller gave.
          name: of the argument, for the error.

        Raises:
          TypeError: it is no number of this kind.
          ValueError: it is not in the range.

        >>> Bound(0, 1).check(2, "share")
        Traceback (most recent call last):
        ValueError: share must be from 0 to 1, got 2
        """
        kind = "a whole number" if self.whole else "a number"
        number: Any = None
        if not isinstance(value, (bool, str, bytes)):
            with contextlib.suppress(TypeError, ValueError):
                number = operator.index(value) if self.whole else _real(value)
        if number is None:
            raise TypeError(f"{name} must be {kind} {self}, got {value!r:.60}")
        if number not in self:
            raise ValueError(f"{name} must be {self}, got {value!r:.60}")
        # A program of JAX takes a whole number as an int32, which need not hold it.
        return number if self.whole else float(number)

    def __str__(self) -> str:
        least, end = _shown(self.least), _shown(self.end)
        return f"above {least} and at most {end}" if self.above else f"from {least} to {end}"


def _real(value: Any) -> float | int | None:
    """A real number, or an array that holds one; None for anything else."""
    if isinstance(value, numbers.Real):
        return value if isinstance(value, (int, float)) else float(value)
    return float(value) if getattr(value, "shape", None) == () else None


def _shown(value: float) -> str:
    """A number as an error has it.

    >>> _shown(2**31), _shown(1e38), _shown(0.5)
    ('2147483648', '1e+38', '0.5')
    """
    return str(value) if isinstance(value, int) else f"{value:g}"


COUNT = Bound(1, whole=True)
COUNT_OR_NONE = Bound(0, whole=True)  # none at all is right, too
# How a token is drawn.
TEMPERATURE = Bound(0)
TOP_K = Bound(0, whole=True)
TOP_P = Bound(0, 1, above=True)
SEED = Bound(0, 2**32 - 1, whole=True)

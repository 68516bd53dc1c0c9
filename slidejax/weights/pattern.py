"""Sparsity patterns `(2N-2):2N` and "dense", and the shapes that follow from them.

A group of `2N` consecutive inputs is covered by `N - 1` windows of four columns. Neighbouring
windows overlap by two columns (SlideSparse, arXiv 2603.05232). Each window holds at most two kept
weights, and this is what a 2:4 sparse tensor core multiplies.

The pattern "dense" prunes nothing. It only quantises, or packs a kernel as it is. Its group is one
window that is kept whole, 4:4, so that all formulas of shapes hold: expansion 1, density 1, blocks
of 32 columns, and a lift that only pads.
"""

from __future__ import annotations

import dataclasses
import re

from slidejax.bounds import Bound

__all__ = ["BLOCK_GROUPS", "UNPRUNED", "Pattern"]

# K is padded to whole blocks of this many groups. K' then is a multiple of 32, and a row of 8-bit
# values a multiple of 16 bytes, for every pattern. A mesh cuts K between blocks.
BLOCK_GROUPS = 8

_TEXT = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: at most `kept` non-zeros in every group of `group` consecutive inputs.

    Attributes:
      kept: non-zeros kept in a group, `group - 2`. "dense" keeps all 4.
      group: columns of a group, an even number from 4 to 16. 4 for "dense".

    Raises:
      ValueError: for any other numbers.

    >>> p = Pattern.parse("6:8")
    >>> p.kept, p.group, p.windows, p.expansion, str(p)
    (6, 8, 3, 1.5, '6:8')
    >>> p = Pattern.parse("dense")
    >>> p.kept, p.group, p.expansion, p.density, p.block, p.prunes, str(p)
    (4, 4, 1.0, 1.0, 32, False, 'dense')
    """

    kept: int
    group: int

    def __post_init__(self):
        for name in ("kept", "group"):
            whole = Bound(-(2**31), whole=True).check(getattr(self, name), f"pattern's {name}")
            object.__setattr__(self, name, whole)
        sparse = self.group % 2 == 0 and 4 <= self.group <= 16 and self.kept == self.group - 2
        if not sparse and (self.kept, self.group) != (4, 4):
            raise ValueError(
                f"pattern must be kept:group with an even group from 4 to 16 and kept = group - 2 "
                f"(2:4, 4:6, 6:8, ... 14:16), or 'dense', got {self.kept}:{self.group}"
            )

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Reads `"6:8"` or `"dense"` (also `"4:4"`). A `Pattern` is returned as it is.

        Raises:
          ValueError: if the text is neither `kept:group` nor "dense", or there is no such pattern.
          TypeError: if it is neither a string nor a `Pattern`.
        """
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise TypeError(
                f"pattern must be a string such as '6:8' or a Pattern, got {type(text).__name__}"
            )
        if text.strip() == "dense":
            return cls(4, 4)
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(
                f"pattern must be 'kept:group' such as '6:8', or 'dense', got {text!r}"
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def prunes(self) -> bool:
        """Whether any weight is pruned. True for all patterns but "dense"."""
        return self.kept < self.group

    @property
    def windows(self) -> int:
        """The number of windows of four columns that cover a group, `group / 2 - 1`."""
        return self.group // 2 - 1

    @property
    def expansion(self) -> float:
        """Lifted columns for each input column, `2 - 4 / group`: 1.5 at 6:8."""
        return 4 * self.windows / self.group

    @property
    def density(self) -> float:
        """The share of weights kept, `kept / group`."""
        return self.kept / self.group

    @property
    def block(self) -> int:
        """Input columns of a block of 8 groups, the unit of padding and of cutting K."""
        return BLOCK_GROUPS * self.group

    def groups(self, in_features: int) -> int:
        """The number of groups of `in_features` columns, padded to whole blocks."""
        return -(-in_features // self.block) * BLOCK_GROUPS

    def padded(self, in_features: int) -> int:
        """The number of columns after padding to whole blocks."""
        return self.groups(in_features) * self.group

    def lifted(self, in_features: int) -> int:
        """Lifted columns K' of `in_features` inputs, padding included.

        >>> Pattern.parse("6:8").lifted(64), Pattern.parse("6:8").lifted(65)
        (96, 192)
        """
        return self.groups(in_features) * self.windows * 4

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.prunes else "dense"


UNPRUNED = Pattern(4, 4)  # "dense"

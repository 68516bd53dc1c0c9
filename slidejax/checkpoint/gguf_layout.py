"""The layout of a GGUF file: its metadata, and the places of its tensors.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3,
little-endian. The package gguf looks at each string through NumPy, which takes most of the time of
reading a model, and it believes the lengths that a damaged file says. Here every length is checked
against what is left of the file before anything is read.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["GGUFLayout", "TensorPlace"]

_MAGIC = b"GGUF"
_ALIGNMENT = 32  # of tensors, if the file says nothing
_LONGEST_NAME = 1 << 16
# The limit of a file's metadata. The largest vocabularies take a quarter of it. Python objects
# take many times the bytes of what they are read from.
_ENTRIES = 1 << 16  # keys, and tensors
_ITEMS = 3 << 20  # of all arrays together
_METADATA = 1 << 26  # bytes

# Type numbers of values that are one number.
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    10: "Q",
    11: "q",
    12: "d",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class TensorPlace(NamedTuple):
    """Where a tensor lies.

    Attributes:
      shape: as NumPy has it, the slowest axis first.
      kind: the number of its type (`gguf.GGMLQuantizationType`).
      start: its first byte, from the beginning of the tensors.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


class GGUFLayout:
    """The metadata of a GGUF file and the places of its tensors, read and checked.

    Args:
      path: the file.

    Attributes:
      values: the metadata: numbers, strings, and lists of them.
      tensors: the places of the tensors by their names.

    Raises:
      ValueError: the file is no GGUF file of version 2 or 3, damaged or cut short.
    """

    def __init__(self, path: Path):
        self._path = path
        with path.open("rb") as f:
            magic = f.read(4)
            if magic != _MAGIC:
                raise ValueError(
                    f"{str(path)!r} is not a GGUF file: it starts with {magic!r}, expected {_MAGIC!r}"
                )
            self._bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self._at, self._items = 4, _ITEMS
        try:
            self._read()
        except (ValueError, UnicodeDecodeError) as e:
            raise ValueError(f"{str(path)!r} is damaged or cut short: {e}") from e

    def data(self, place: TensorPlace, row_bytes: int) -> np.ndarray:
        """The bytes of a tensor, uint8 `[..., row_bytes]`, as they lie in the file.

        Raises:
          ValueError: they do not lie in the file.
        """
        shape = (*place.shape[:-1], row_bytes)
        size, start = int(np.prod(shape, dtype=object)), self._base + place.start
        if start + size > len(self._bytes):
            raise ValueError(
                f"{str(self._path)!r} is damaged or cut short: a tensor ends at {start + size} of "
                f"{len(self._bytes)} bytes"
            )
        return np.frombuffer(self._bytes, np.uint8, size, start).reshape(shape)

    def _read(self) -> None:
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, expected 2 or 3 (little-endian)")
        tensors, values = self._number("Q"), self._number("Q")
        if max(tensors, values) > _ENTRIES:
            raise ValueError(
                f"it has {values} keys and {tensors} tensors, expected {_ENTRIES} of each at most"
            )
        # The shortest entries: an empty name, a type, a byte; and an empty name without axes.
        self._expect(values * 13 + tensors * 24)
        self.values: dict[str, Any] = {}
        for _ in range(values):
            key = self._string(_LONGEST_NAME)
            if key in self.values:
                raise ValueError(f"it has the key {key!r} twice")
            try:
                self.values[key] = self._value(self._number("I"))
            except ValueError as e:
                raise ValueError(f"key {key!r}: {e}") from e
        self.tensors: dict[str, TensorPlace] = {}
        for _ in range(tensors):
            name = self._string(_LONGEST_NAME)
            if name in self.tensors:
                raise ValueError(f"it has the tensor {name!r} twice")
            axes = self._number("I")
            if not 1 <= axes <= 4:
                raise ValueError(f"tensor {name!r} has {axes} axes, expected 1 to 4")
            shape = self._numbers("Q", axes)[::-1]
            if 0 in shape:
                raise ValueError(f"tensor {name!r} has the shape {tuple(shape)}")
            self.tensors[name] = TensorPlace(tuple(shape), self._number("I"), self._number("Q"))
        alignment = self.values.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment % 8 or not 8 <= alignment <= 1 << 20:
            raise ValueError(
                f"key 'general.alignment' must be a multiple of 8, got {alignment!r:.80}"
            )
        self._base = -(-self._at // alignment) * alignment
        for name, place in self.tensors.items():
            if place.start % alignment:
                raise ValueError(
                    f"tensor {name!r} starts at {place.start}, which is no multiple of "
                    f"{alignment} (general.alignment)"
                )

    def _expect(self, size: int) -> None:
        if size > len(self._bytes) - self._at:
            raise ValueError(
                f"{size} bytes are expected at {self._at}, and it has {len(self._bytes)}"
            )
        if self._at + size > _METADATA:
            raise ValueError(f"it has more than {_METADATA} bytes of metadata")

    def _numbers(self, code: str, count: int) -> list:
        size = struct.calcsize(f"<{code}")
        self._expect(size * count)
        found = struct.unpack_from(f"<{count}{code}", self._bytes, self._at)
        self._at += size * count
        return list(found)

    def _number(self, code: str) -> Any:
        return self._numbers(code, 1)[0]

    def _string(self, longest: int | None = None) -> str:
        length = self._number("Q")
        self._expect(length)
        if longest is not None and length > longest:
            raise ValueError(f"a name at {self._at} has {length} bytes")
        self._at += length
        return self._bytes[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _BOOL:
            return self._truths(1)[0]
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}, which is not known")
        kind, count = self._number("I"), self._number("Q")
        if count > self._items:
            raise ValueError(f"an array of {count}: all arrays may have {_ITEMS} entries together")
        self._items -= count
        if kind == _BOOL:
            return self._truths(count)
        if kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind], count)
        if kind != _STRING:
            raise ValueError(f"an array of values of type {kind}, expected numbers or strings")
        self._expect(8 * count)
        return [self._string() for _ in range(count)]

    def _truths(self, count: int) -> list[bool]:
        """Values that are each one byte, 0 or 1."""
        found = self._numbers("B", count)
        if any(value > 1 for value in found):
            raise ValueError(f"a truth value must be 0 or 1, got {max(found)}")
        return [bool(value) for value in found]

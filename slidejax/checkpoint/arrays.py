"""Arrays in a safetensors file: an 8-byte length, a JSON header, then the bytes of the arrays.

The format is that of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import jax.numpy as jnp
import numpy as np

__all__ = [
    "MAX_HEADER",
    "METADATA",
    "SAVABLE",
    "ArrayFile",
    "checksum",
    "header_entry",
    "write_arrays",
]

METADATA = "slidejax.json"  # the file that says what the arrays are
MAX_HEADER = 100_000_000  # the limit of the safetensors format

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
SAVABLE = frozenset(_DTYPES.values())
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def checksum(array: np.ndarray) -> int:
    """The CRC-32 of an array's bytes."""
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def write_arrays(
    file: IO[bytes], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, one array after the other.

    Args:
      file: open for writing.
      arrays: little-endian arrays of `SAVABLE` dtypes, by name.
      metadata: texts for the header.

    Raises:
      OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # Wide numbers come first, so that each array is aligned.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        header[name] = header_entry(array, begin)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for _, array in ordered:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def header_entry(array: np.ndarray, begin: int) -> dict[str, Any]:
    """The entry of an array in the header of a safetensors file; its data begins at this byte."""
    return {
        "dtype": _CODES[array.dtype.name],
        "shape": list(array.shape),
        "data_offsets": [begin, begin + array.nbytes],
    }


class ArrayFile:
    """A safetensors file, open for reading. Its header has been checked against the file's size.

    Args:
      path: the file.

    Raises:
      ValueError: if it is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.used: set[str] = set()
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is missing")
        self._file = path.open("rb")
        try:
            self._read_header(path.stat().st_size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _fail(self, message: str) -> NoReturn:
        raise ValueError(f"{str(self.path)!r} is damaged: {message}")

    def _read_header(self, size: int) -> None:
        start = self._file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER, size - 8):
            self._fail(f"its header does not fit into {size} bytes")
        try:
            header = json.loads(self._file.read(length))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{str(self.path)!r} is damaged: its header is not JSON ({e})") from e
        if not isinstance(header, dict):
            self._fail("its header is not a JSON object")
        header.pop("__metadata__", None)
        self._base = 8 + length  # where the arrays begin
        self._entries = {name: self._entry(name, entry, size) for name, entry in header.items()}
        position = 0
        for name, (_, _, begin, end) in sorted(self._entries.items(), key=lambda item: item[1][2:]):
            if begin != position:
                self._fail(f"{name!r} overlaps another array or leaves a gap")
            position = end
        if self._base + position != size:
            self._fail(f"it has {size} bytes, expected {self._base + position}")

    def _entry(self, name: str, entry: Any, size: int) -> tuple[str, tuple[int, ...], int, int]:
        """Dtype, shape, first byte and end of an array; they must fit the size of the file."""
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            self._fail(f"header entry {name!r} is malformed or of an unknown dtype")
        if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
            self._fail(f"header entry {name!r} has a size that is not a natural number")
        nbytes = jnp.dtype(dtype).itemsize
        for n in shape:
            nbytes *= n
        if end - begin != nbytes or self._base + end > size:
            self._fail(
                f"{name!r} ({dtype}{list(shape)}) does not fit its place in the file, "
                "or the file is cut short"
            )
        return dtype, shape, begin, end

    @property
    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype and the shape of each array, by its name."""
        return {name: entry[:2] for name, entry in self._entries.items()}

    def expect(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Raises a ValueError unless the file holds such an array, asked for once."""
        if name not in self._entries:
            raise ValueError(f"{str(self.path)!r} lacks {name!r}")
        found = self._entries[name][:2]
        if found != (dtype, shape):
            raise ValueError(
                f"{str(self.path)!r}: {name!r} is {found[0]}{list(found[1])}, "
                f"{METADATA} says {dtype}{list(shape)}"
            )
        if name in self.used:
            raise ValueError(f"{str(self.path)!r}: {METADATA} uses {name!r} twice")
        self.used.add(name)

    def finish(self) -> None:
        """Raises a ValueError if the file holds arrays that were not asked for."""
        extra = sorted(self._entries.keys() - self.used)
        if extra:
            raise ValueError(
                f"{str(self.path)!r} holds {extra[0]!r}, which {METADATA} does not know"
            )

    def read(self, name: str) -> np.ndarray:
        """An array, in memory of its own."""
        dtype, shape, begin, end = self._entries[name]
        self._file.seek(self._base + begin)
        array = np.fromfile(self._file, np.uint8, end - begin)
        if array.nbytes != end - begin:
            self._fail(f"{name!r} is cut short")
        return array.view(jnp.dtype(dtype)).reshape(shape)

"""Writing a checkpoint array by array, so that it need never be in memory as a whole.

The files are those of `slidejax.checkpoint.store`. A safetensors file begins with a header that
says where each array lies. Room for it is left at the beginning and filled in at the end; the
format allows spaces after the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from slidejax.checkpoint.arrays import header_entry
from slidejax.checkpoint.store import ARRAYS, write_metadata
from slidejax.checkpoint.tree import encode

__all__ = ["ROOM", "GradualWriter"]

ROOM = 512  # bytes of the header for each array, with its name and its places


class GradualWriter:
    """Writes the arrays of a checkpoint as they come; `finish` makes the files whole.

    Args:
      folder: a directory that is staged already (`slidejax.checkpoint.staging.staged`).
      arrays: at most this many arrays will come. A packed weight has three.
      inside: the keys below which everything lies that `put` gets.

    >>> import tempfile
    >>> from slidejax.checkpoint import load
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with GradualWriter(Path(folder), 1, ("params",)) as writer:
    ...         writer.put("layer/bias", np.arange(3.0, dtype="float32"))
    ...         writer.finish({"about": {"a": 1}})
    ...     found = load(folder)
    >>> found["about"], found["params"]["layer"]["bias"].tolist()
    ({'a': 1}, [0.0, 1.0, 2.0])
    """

    def __init__(self, folder: Path, arrays: int, inside: tuple[str, ...] = ()):
        self._folder, self._inside = folder, inside
        self._room = ROOM * (arrays + 1)
        self._described: dict[str, Any] = {}
        self._entries: dict[str, Any] = {}
        self._at = 0
        self._file: IO[bytes] = (folder / ARRAYS).open("wb")
        self._file.seek(8 + self._room)

    def __enter__(self) -> GradualWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, path: str, value: Any) -> None:
        """Writes one array or packed weight. `path` has slashes between its keys.

        Raises:
          ValueError: if there was one of this path; for a dtype that the format lacks.
          TypeError: for another kind of object.
        """
        if path in self._described:
            raise ValueError(f"{path!r} comes twice")
        arrays: dict[str, np.ndarray] = {}
        self._described[path] = encode(value, (*self._inside, *path.split("/")), arrays)
        for name, array in arrays.items():
            self._entries[name] = header_entry(array, self._at)
            self._file.write(array.reshape(-1).view(np.uint8).data)
            self._at += array.nbytes

    def finish(self, more: Mapping[str, Any], order: Mapping[str, Any] | None = None) -> None:
        """Writes the header and the description; nothing may come after.

        Args:
          more: what else the checkpoint holds at its root, without arrays.
          order: paths in the order in which the description is to have them. None: as they came.
        """
        header = json.dumps(self._entries).encode()
        if len(header) > self._room:
            raise ValueError(
                f"the header needs {len(header)} bytes, there is room for {self._room}"
            )
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()
        paths = self._described if order is None else [p for p in order if p in self._described]
        root: dict[str, Any] = {}
        for path in paths:
            node = root
            *folders, name = (*self._inside, *path.split("/"))
            for key in folders:
                node = node.setdefault(key, {})
            node[name] = _Described(self._described[path])
        items = [[key, encode(value, (key,), {})] for key, value in more.items()]
        items += [[key, _tree(value)] for key, value in root.items()]
        write_metadata(self._folder, {"kind": "dict", "items": items})


class _Described(dict):
    """A description of an array or a weight, apart from a folder of such."""


def _tree(node: Any) -> Any:
    if isinstance(node, _Described):
        return dict(node)
    return {"kind": "dict", "items": [[key, _tree(value)] for key, value in node.items()]}

"""Writing files so that a half-written one never replaces a good one."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["replacing", "write_json"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """Yields a new file that takes the place of `path` when the block ends without an error.

    Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON to `path`, atomically; missing folders are made."""
    with replacing(path, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")

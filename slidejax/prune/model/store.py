"""Finished pruning stages on disk, from which a conversion that was stopped goes on.

A stage is one safetensors file with a checksum of everything in it. A kernel that is rounded to 8
bit is kept as codes and scales, and its mask as bits: 1.13 bytes a weight.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.checkpoint.arrays import ArrayFile, write_arrays
from slidejax.files import read_whole, replacing
from slidejax.prune.model.result import Pruned

__all__ = ["Store", "fingerprint", "kept_rows", "remove"]

_FORMAT = 3  # of the files


def fingerprint(*trees: Any) -> str:
    """A hash of all that a result depends on: the bytes of arrays, and the text of other values.

    >>> one, same, other = (fingerprint({"a": np.ones(n)}, "6:8") for n in (2, 2, 3))
    >>> one == same, one == other
    (True, False)
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            array = np.ascontiguousarray(leaf)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.view(np.uint8).data if array.size else b"")
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


class Store:
    """A folder with one file for each finished stage. A file appears when it is complete.

    Args:
      folder: the folder, which is made if it is missing.
      key: the `fingerprint` of everything that the stages depend on.

    Raises:
      ValueError: if the folder holds stages of another conversion.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str):
        self._folder = Path(folder)
        note = self._folder / "conversion"
        key = f"{_FORMAT} {key}"
        if os.path.lexists(note) and read_whole(note) != key.encode():
            raise ValueError(
                f"{str(folder)!r} holds the stages of another conversion (other model, text or "
                "settings): remove it or name another folder"
            )
        if not os.path.lexists(note):
            with replacing(note) as file:
                file.write(key.encode())

    def _file(self, stage: int) -> Path:
        return self._folder / f"stage-{stage:04d}.safetensors"

    def save(self, stage: int, pruned: dict[str, Pruned]) -> None:
        """Writes the pruned kernels of a stage, by path."""
        arrays: dict[str, Any] = {}
        for path, one in pruned.items():
            kernel = np.asarray(one.kernel)
            arrays[f"mask:{path}"] = np.packbits(np.asarray(one.mask), axis=0)
            scale = None if one.scale is None else np.asarray(one.scale)
            kind, small = _smallest(kernel, scale)
            arrays[f"{kind}:{path}"] = small
            if scale is not None:
                arrays[f"scale:{path}"] = scale
        arrays[_SUM] = _sum(arrays)
        with replacing(self._file(stage)) as file:
            write_arrays(file, arrays, {})

    def has(self, stage: int) -> bool:
        """Whether a stage is finished."""
        return self._file(stage).is_file()

    def load(self, stage: int) -> dict[str, Pruned] | None:
        """The kernels that `save` wrote, or None.

        Warns:
          UserWarning: if the file is damaged. It is removed, and counts as missing.
        """
        if not self.has(stage):
            return None
        try:
            return self.read(stage)
        except ValueError as e:
            warnings.warn(f"{e}: the stage is computed again", stacklevel=2)
            self._file(stage).unlink()
            return None

    def read(self, stage: int) -> dict[str, Pruned]:
        """The kernels that `save` wrote.

        Raises:
          ValueError: naming the file, if it is missing or damaged.
        """
        path = self._file(stage)
        with ArrayFile(path) as file:
            arrays = {name: file.read(name) for name in file.entries}
        found = arrays.pop(_SUM, None)
        if found is None or found.tobytes() != _sum(arrays).tobytes():
            raise ValueError(f"{str(path)!r} is damaged: its content does not match {_SUM!r}")
        return {
            path: _pruned(arrays, kind, path)
            for kind, _, path in (name.partition(":") for name in arrays)
            if kind in _KINDS
        }


_SUM = "sha256"  # the name of the checksum among the arrays


def _sum(arrays: dict[str, Any]) -> np.ndarray:
    """A checksum of names, shapes, dtypes and bytes, uint8 `[32]`."""
    return np.frombuffer(bytes.fromhex(fingerprint(dict(sorted(arrays.items())))), np.uint8)


def kept_rows(
    folder: str | os.PathLike[str], key: str, make: Callable[[], np.ndarray]
) -> np.ndarray:
    """The rows that a file in a folder keeps. If there is none, they are made and written.

    Args:
      folder: the folder, which is made if it is missing.
      key: the `fingerprint` of everything that the rows depend on.
      make: makes the rows.

    Warns:
      UserWarning: if the file is damaged: the rows are made again.
    """
    path = Path(folder) / f"rows-{key[:16]}.safetensors"
    if os.path.lexists(path):
        try:
            with ArrayFile(path) as file:
                rows = file.read("rows")
                if file.read(_SUM).tobytes() == _sum({"key": key, "rows": rows}).tobytes():
                    return rows
            raise ValueError(f"{str(path)!r} is damaged: its content does not match {_SUM!r}")
        except (KeyError, ValueError) as e:
            warnings.warn(f"{e}: the rows are written again", stacklevel=2)
    rows = make()
    with replacing(path) as file:
        write_arrays(file, {"rows": rows, _SUM: _sum({"key": key, "rows": rows})}, {})
    return rows


def remove(folder: str | os.PathLike[str]) -> None:
    """Removes the files of `Store` and `kept_rows`, and the folder if nothing else is in it."""
    files = ("stage-*.safetensors", "rows-*.safetensors", "conversion")
    for file in (file for name in files for file in Path(folder).glob(name)):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(folder).rmdir()


# The forms in which a kernel may be kept, smallest first: the dtype in the file, and the one that
# its bits are. Codes are multiplied by the scale.
_KINDS: dict[str, tuple[np.dtype, np.dtype]] = {
    "int8": (np.dtype(np.int8), np.dtype(np.int8)),
    "float8": (np.dtype(np.uint8), np.dtype(jnp.float8_e4m3fn)),
    "bfloat16": (np.dtype(np.uint16), np.dtype(jnp.bfloat16)),
    "kernel": (np.dtype(np.float32), np.dtype(np.float32)),
}


def _smallest(kernel: np.ndarray, scale: np.ndarray | None) -> tuple[str, np.ndarray]:
    """The smallest form that gives a float32 kernel back exactly, and the kernel in it."""
    if scale is not None:
        codes = np.where(scale > 0, kernel / np.where(scale > 0, scale, 1), 0)
        tried = {"int8": np.clip(np.rint(codes), -128, 127), "float8": codes}
    else:
        tried = {"bfloat16": kernel}
    for kind, values in tried.items():
        stored, dtype = _KINDS[kind]
        with np.errstate(all="ignore"):
            small = values.astype(dtype)
            if np.array_equal(_wide(small, scale), kernel):
                return kind, small.view(stored)
    return "kernel", kernel


def _wide(values: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    wide = values.astype(np.float32)
    return wide if scale is None or values.dtype == np.float32 else wide * scale


def _pruned(arrays: dict[str, np.ndarray], kind: str, path: str) -> Pruned:
    values = arrays[f"{kind}:{path}"].view(_KINDS[kind][1])
    scale = arrays.get(f"scale:{path}")
    kernel = _wide(values, scale)
    mask = np.unpackbits(arrays[f"mask:{path}"], axis=0, count=len(kernel)).astype(bool)
    return Pruned(
        jnp.asarray(mask), jnp.asarray(kernel), None if scale is None else jnp.asarray(scale)
    )

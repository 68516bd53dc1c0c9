"""Finished pruning stages on disk, from which a conversion that was stopped goes on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.files import replacing
from slidejax.prune.model.result import Pruned

__all__ = ["Store", "fingerprint"]


def fingerprint(*trees: Any) -> str:
    """A hash of everything that a result depends on: of arrays the bytes, of all else the text.

    >>> one, same, other = (fingerprint({"a": np.ones(n)}, "6:8") for n in (2, 2, 3))
    >>> one == same, one == other
    (True, False)
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
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
        if note.is_file() and note.read_text() != key:
            raise ValueError(
                f"{str(folder)!r} holds the stages of another conversion (other model, text or "
                "settings): remove it or name another folder"
            )
        if not note.is_file():
            with replacing(note) as file:
                file.write(key.encode())

    def _file(self, stage: int) -> Path:
        return self._folder / f"stage-{stage:04d}.npz"

    def save(self, stage: int, pruned: dict[str, Pruned]) -> None:
        """Writes the pruned kernels of a stage, by path."""
        arrays: dict[str, Any] = {}
        for path, one in pruned.items():
            arrays |= {
                f"mask:{path}": np.packbits(np.asarray(one.mask), axis=0),
                f"kernel:{path}": np.asarray(one.kernel),
            }
            if one.scale is not None:
                arrays[f"scale:{path}"] = np.asarray(one.scale)
        with replacing(self._file(stage)) as file:
            np.savez(file, **arrays)

    def has(self, stage: int) -> bool:
        """Whether a stage is finished."""
        return self._file(stage).is_file()

    def load(self, stage: int) -> dict[str, Pruned] | None:
        """The kernels that `save` wrote, or None."""
        if not self.has(stage):
            return None
        with np.load(self._file(stage), allow_pickle=False) as file:

            def one(path: str) -> Pruned:
                kernel, scale = file[f"kernel:{path}"], f"scale:{path}"
                mask = np.unpackbits(file[f"mask:{path}"], axis=0, count=len(kernel)).astype(bool)
                return Pruned(
                    jnp.asarray(mask),
                    jnp.asarray(kernel),
                    jnp.asarray(file[scale]) if scale in file else None,
                )

            return {path: one(path) for path in _paths(file.files)}


def _paths(names: Iterable[str]) -> list[str]:
    return [name.partition(":")[2] for name in names if name.startswith("kernel:")]

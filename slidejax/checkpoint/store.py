"""Saving a tree of parameters: a safetensors file of arrays, and a JSON file that describes them.

A saved directory holds `slidejax.json` (structure, patterns, dtypes, shapes, versions) and
`slidejax.safetensors`. Both describe each array, and `load` takes nothing from them until the two
and the size of the file agree.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from slidejax.checkpoint.arrays import MAX_HEADER, METADATA, ArrayFile, write_arrays
from slidejax.checkpoint.staging import staged
from slidejax.checkpoint.tree import Decoder, encode
from slidejax.files import CHECKSUM, check_json, check_path, json_checksum

__all__ = ["ARRAYS", "METADATA", "load", "save", "shapes", "write_into", "write_metadata"]

ARRAYS = "slidejax.safetensors"
_FORMAT, _FORMAT_VERSION = "slidejax", 2
_KEYS = {"format", "format_version", "library_version", "tree"}

# --- saving ---------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], params: Any) -> None:
    """Saves a tree of parameters into a directory.

    Packed weights are saved in the portable packed form: prepared forms are dropped, and fused
    layers are taken apart. Arrays on any device are brought to the host. The directory is written
    beside `path` and renamed, so an earlier checkpoint is replaced only by a complete one.

    Args:
      path: the directory to write. If it exists, it must be empty or hold an earlier checkpoint.
      params: nested dicts (also Flax's `FrozenDict` and an `nnx.State`), lists and tuples of
        arrays, `SlideWeight`s, Python scalars and None.

    Raises:
      ValueError: if `path` is a file, or a directory that holds other things; if an array has a
        dtype that the format lacks, or is spread over several processes. Gather it then, and save
        in one of them.
      TypeError: naming the key, if `params` holds another kind of object.

    Example::

      >>> import jax.numpy as jnp, slidejax as sj, tempfile
      >>> kernel = sj.pack(jnp.ones((64, 4)), "6:8", dtype="int8")
      >>> params = {"Dense_0": {"kernel": kernel, "bias": jnp.zeros(4)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     sj.checkpoint.save(folder + "/model", params)
      ...     again = sj.checkpoint.load(folder + "/model")
      >>> again["Dense_0"]["kernel"].pattern, again["Dense_0"]["kernel"].values.dtype
      (Pattern(kept=6, group=8), dtype('int8'))
    """
    # This comes before anything is written: a tree that cannot be saved leaves no trace.
    path = check_path(path)
    arrays, metadata = _describe(params)
    with staged(path, METADATA) as folder:
        _write(folder, arrays, metadata)


def write_into(folder: Path, params: Any) -> None:
    """Writes the two files of a checkpoint into a directory that is staged already."""
    _write(folder, *_describe(params))


def _write(folder: Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    with (folder / ARRAYS).open("wb") as file:
        write_arrays(file, arrays, {"format": _FORMAT})
    _write_json(folder, metadata)


def write_metadata(folder: Path, tree: dict[str, Any]) -> None:
    """Writes the file that describes a tree, whose arrays are in `ARRAYS` already."""
    _write_json(folder, _metadata(tree))


def _write_json(folder: Path, metadata: dict[str, Any]) -> None:
    (folder / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")


def _describe(params: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays: dict[str, np.ndarray] = {}
    try:
        return arrays, _metadata(encode(params, (), arrays))
    except RecursionError:
        raise ValueError("params are nested too deeply to be saved") from None


def _metadata(tree: dict[str, Any]) -> dict[str, Any]:
    import slidejax

    metadata = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "library_version": slidejax.__version__,
        "tree": tree,
    }
    return metadata | {CHECKSUM: json_checksum(metadata)}


# --- loading --------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Any:
    """Loads what `save` wrote.

    Args:
      path: the directory.

    Returns:
      The tree: dicts, lists, tuples, arrays on JAX's default device, and `SlideWeight`s without
      prepared forms. An NNX state comes back as a plain dict, for `nnx.replace_by_pure_dict`.
      64-bit arrays are NumPy arrays unless JAX runs with x64.

    Raises:
      ValueError: naming the file and the key, if there is no checkpoint, or if it is damaged, cut
        short or of a newer format, or if its two files disagree.
    """
    return _read(check_path(path), jnp.asarray)


def shapes(path: str | os.PathLike[str]) -> Any:
    """What `load` gives, with a `jax.ShapeDtypeStruct` for each array; no array is read.

    Args:
      path: the directory.

    Raises:
      ValueError: as `load`, but for what is wrong with the arrays' values.
    """
    return _read(check_path(path), None)


def _read(folder: Path, place: Any) -> Any:
    metadata = _read_metadata(folder)
    with ArrayFile(folder / ARRAYS) as arrays:
        try:
            tree = Decoder(arrays, folder / METADATA, None)(metadata["tree"])
            arrays.finish()
            if place is None:
                return tree
            return Decoder(arrays, folder / METADATA, place)(metadata["tree"])
        except RecursionError:
            raise ValueError(
                f"{str(folder / METADATA)!r}: key 'tree' is nested too deeply"
            ) from None


def _read_metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA
    if not file.is_file():
        raise ValueError(f"no checkpoint at {str(folder)!r}: {METADATA} is missing")
    if file.stat().st_size > MAX_HEADER:
        raise ValueError(f"{str(file)!r} is larger than {MAX_HEADER} bytes")
    try:
        metadata = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{str(file)!r} is damaged: {e}") from e
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{str(file)!r} is not a slidejax checkpoint: key 'format' is not {_FORMAT!r}"
        )
    version = metadata.get("format_version")
    if type(version) is not int or not 1 <= version <= _FORMAT_VERSION:
        raise ValueError(
            f"{str(file)!r} has format_version {version!r} "
            f"(written by slidejax {metadata.get('library_version')}); "
            f"this library reads 1 to {_FORMAT_VERSION}"
        )
    expected = _KEYS if version == 1 else _KEYS | {CHECKSUM}  # version 1 had none
    if metadata.keys() != expected:
        key = sorted(metadata.keys() ^ expected)[0]
        has = "a key" if key in metadata else "no key"
        raise ValueError(f"{str(file)!r} has {has} {key!r} (format_version {version})")
    if version > 1:
        check_json(metadata, str(file))
    return metadata

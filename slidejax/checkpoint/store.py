"""Saving a tree of parameters: one safetensors file of arrays and one JSON file that says what they are.

A saved directory holds ``slidejax.json`` (structure, patterns, dtypes, shapes, versions) and ``slidejax.safetensors``
(https://github.com/huggingface/safetensors: an 8-byte length, a JSON header, then the bytes). The two describe each array
independently, and `load` believes neither until they and the size of the file agree.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.checkpoint.staging import staged
from slidejax.variants.projections import unfuse_module
from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import Pattern

__all__ = ["ARRAYS", "METADATA", "load", "read_into", "save", "write_into"]

METADATA, ARRAYS = "slidejax.json", "slidejax.safetensors"
_FORMAT, _FORMAT_VERSION = "slidejax", 1
_MAX_HEADER = 100_000_000  # the limit of the safetensors format

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
_SAVABLE = frozenset(_DTYPES.values())


# ---------------------------------------------------------------------------------------------------------------- save


def save(path: str | os.PathLike[str], params: Any) -> None:
    """Saves a tree of parameters into a directory.

    Packed weights are saved in the portable packed form (``prepared`` is dropped, fused layers are taken apart); arrays of any device are brought to
    the host. The directory is written beside ``path`` and renamed, so a checkpoint that was there is replaced only by a
    complete one.

    Args:
      path: the directory to write; one that is there already must be empty or an earlier checkpoint.
      params: nested dicts (also Flax's ``FrozenDict`` and an ``nnx.State``), lists and tuples of arrays,
        `SlideWeight`s, Python scalars and None.

    Raises:
      ValueError: ``path`` is a file or a directory that holds other things; an array has a dtype that the format lacks.
      TypeError: ``params`` holds another kind of object (its key is named).

    Example::

      >>> import jax.numpy as jnp, slidejax as sj, tempfile
      >>> params = {"Dense_0": {"kernel": sj.pack(jnp.ones((64, 4)), "6:8", dtype="int8"), "bias": jnp.zeros(4)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     sj.checkpoint.save(folder + "/model", params)
      ...     again = sj.checkpoint.load(folder + "/model")
      >>> again["Dense_0"]["kernel"].pattern, again["Dense_0"]["kernel"].values.dtype
      (Pattern(kept=6, group=8), dtype('int8'))
    """
    arrays, metadata = _describe(
        params
    )  # before anything is written: a tree that cannot be saved leaves no trace
    with staged(path, METADATA) as folder:
        _write(folder, arrays, metadata)


def write_into(folder: Path, params: Any) -> None:
    """Writes the two files of a checkpoint into a directory that is already staged."""
    _write(folder, *_describe(params))


def _write(folder: Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file(arrays, folder / ARRAYS, metadata={"format": _FORMAT})
    (folder / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")


def _describe(params: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    import slidejax

    arrays: dict[str, np.ndarray] = {}
    tree = _encode(params, (), arrays)
    version = getattr(slidejax, "__version__", "unknown")
    return arrays, {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "library_version": version,
        "tree": tree,
    }


def _show(path: tuple[Any, ...]) -> str:
    return "/".join(str(p) for p in path) or "(root)"


def _name(path: tuple[Any, ...], leaf: str = "") -> str:
    # As in JSON pointers, so that no two paths share a name.
    return "/".join(str(p).replace("~", "~0").replace("/", "~1") for p in path) + leaf


def _encode(node: Any, path: tuple[Any, ...], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The JSON description of ``node``; its arrays are added to ``arrays``."""
    if node is None or isinstance(node, (bool, int, float, str)):
        return {"kind": "constant", "value": node}
    if isinstance(node, SlideWeight):
        node.check(_show(path))
        parts = {"values": node.values, "zeros": node.zeros, "scale": node.scale}
        return {
            "kind": "slide_weight",
            "pattern": str(node.pattern),
            "dtype": node.dtype.name,
            "in_features": node.in_features,
            **{k: _encode_array(v, path, "." + k, arrays) for k, v in parts.items()},
        }
    if isinstance(node, (jax.Array, np.ndarray, np.generic)):
        if isinstance(node, jax.Array) and jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
            data = _encode_array(jax.random.key_data(node), path, ".key", arrays)
            return {
                "kind": "prng_key",
                "implementation": str(jax.random.key_impl(node)),
                "data": data,
            }
        return {"kind": "array", **_encode_array(node, path, "", arrays)}
    if type(node).__module__.startswith("flax.nnx"):
        from flax import nnx

        if isinstance(node, nnx.State):
            return _encode(nnx.to_pure_dict(node), path, arrays)
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise TypeError(f"params{[*path]}: key {key!r} must be a string or an integer")
        # A list of pairs keeps integer keys apart from strings.
        return {
            "kind": "dict",
            "items": [[k, _encode(v, (*path, k), arrays)] for k, v in unfuse_module(node).items()],
        }
    if type(node) in (list, tuple):
        return {
            "kind": type(node).__name__,
            "items": [_encode(v, (*path, i), arrays) for i, v in enumerate(node)],
        }
    raise TypeError(
        f"params at {_show(path)!r} is a {type(node).__name__}; dicts, lists, tuples, arrays, SlideWeights, scalars "
        "and None can be saved (unbox Flax metadata first: flax.linen.meta.unbox)"
    )


def _encode_array(
    array: Any, path: tuple[Any, ...], leaf: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(f"params at {_show(path)!r} is traced; save outside jit")
    host = np.asarray(array)
    if host.dtype.name not in _SAVABLE:
        raise ValueError(
            f"params at {_show(path)!r} has dtype {host.dtype.name}, which safetensors cannot hold"
        )
    if host.dtype.byteorder == ">":
        host = host.astype(host.dtype.newbyteorder("<"))
    name = _name(path, leaf) or "(root)"
    while name in arrays:  # {1: a, "1": b}
        name += "'"
    arrays[name] = np.ascontiguousarray(host).reshape(host.shape)
    return {
        "name": name,
        "dtype": host.dtype.name,
        "shape": list(host.shape),
        "crc32": _checksum(arrays[name]),
    }


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


# ---------------------------------------------------------------------------------------------------------------- load


def load(path: str | os.PathLike[str]) -> Any:
    """Loads what `save` wrote.

    Args:
      path: the directory.

    Returns:
      The tree: dicts, lists, tuples, arrays on JAX's default device, `SlideWeight`s (nothing prepared). An NNX state
      comes back as a plain dict, for ``nnx.replace_by_pure_dict``. 64-bit arrays stay NumPy arrays unless JAX runs
      with x64.

    Raises:
      ValueError: there is no checkpoint, it is damaged, cut short, of a newer format, or its two files disagree; the
        message names the file and the key.
    """
    return read_into(path, jnp.asarray)


def read_into(path: str | os.PathLike[str], place: Any) -> Any:
    """`load` with the function that places each host array."""
    folder = Path(path)
    metadata = _read_metadata(folder)
    with _ArrayFile(folder / ARRAYS) as arrays:
        tree = _decode(metadata["tree"], (), arrays, place, folder / METADATA, check_only=True)
        arrays.finish()
        del tree
        return _decode(metadata["tree"], (), arrays, place, folder / METADATA, check_only=False)


def _read_metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA
    if not file.is_file():
        raise ValueError(f"no checkpoint at {str(folder)!r}: {METADATA} is missing")
    if file.stat().st_size > _MAX_HEADER:
        raise ValueError(f"{str(file)!r} is larger than {_MAX_HEADER} bytes")
    try:
        metadata = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{str(file)!r} is damaged: {e}") from e
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{str(file)!r} is not a slidejax checkpoint: key 'format' is not {_FORMAT!r}"
        )
    version = metadata.get("format_version")
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{str(file)!r} has format_version {version!r} (written by slidejax {metadata.get('library_version')}); "
            f"this library reads {_FORMAT_VERSION}"
        )
    if "tree" not in metadata:
        raise ValueError(f"{str(file)!r} has no key 'tree'")
    return metadata


class _ArrayFile:
    """A safetensors file whose header has been checked against the size of the file."""

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
        if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
            self._fail(f"its header does not fit into {size} bytes")
        try:
            header = json.loads(self._file.read(length))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{str(self.path)!r} is damaged: its header is not JSON ({e})") from e
        if not isinstance(header, dict):
            self._fail("its header is not a JSON object")
        header.pop("__metadata__", None)
        self._base = 8 + length
        self._entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for name, entry in header.items():
            try:
                dtype, shape, (begin, end) = (
                    _DTYPES[entry["dtype"]],
                    tuple(entry["shape"]),
                    entry["data_offsets"],
                )
            except (KeyError, TypeError, ValueError):
                self._fail(f"header entry {name!r} is malformed or of an unknown dtype")
            numbers = (*shape, begin, end)
            if any(type(n) is not int or n < 0 for n in numbers):
                self._fail(f"header entry {name!r} has a size that is not a natural number")
            nbytes = jnp.dtype(dtype).itemsize
            for n in shape:
                nbytes *= n
            if end - begin != nbytes or self._base + end > size:
                self._fail(
                    f"{name!r} ({dtype}{list(shape)}) does not fit its place in the file, or the file is cut short"
                )
            self._entries[name] = (dtype, shape, begin, end)
        position = 0
        for name, (_, _, begin, end) in sorted(self._entries.items(), key=lambda item: item[1][2:]):
            if begin != position:
                self._fail(f"{name!r} overlaps another array or leaves a gap")
            position = end
        if self._base + position != size:
            self._fail(f"it has {size} bytes, expected {self._base + position}")

    def expect(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Raises unless the file holds such an array."""
        if name not in self._entries:
            raise ValueError(f"{str(self.path)!r} lacks {name!r}")
        found = self._entries[name][:2]
        if found != (dtype, shape):
            raise ValueError(
                f"{str(self.path)!r}: {name!r} is {found[0]}{list(found[1])}, {METADATA} says {dtype}{list(shape)}"
            )
        if name in self.used:
            raise ValueError(f"{str(self.path)!r}: {METADATA} uses {name!r} twice")
        self.used.add(name)

    def finish(self) -> None:
        """Raises if the file holds arrays that nothing refers to."""
        extra = sorted(self._entries.keys() - self.used)
        if extra:
            raise ValueError(
                f"{str(self.path)!r} holds {extra[0]!r}, which {METADATA} does not know"
            )

    def read(self, name: str) -> np.ndarray:
        dtype, shape, begin, end = self._entries[name]
        self._file.seek(self._base + begin)
        array = np.fromfile(self._file, np.uint8, end - begin)
        if array.nbytes != end - begin:
            self._fail(f"{name!r} is cut short")
        return array.view(jnp.dtype(dtype)).reshape(shape)


def _decode(
    node: Any, path: tuple[Any, ...], arrays: _ArrayFile, place: Any, file: Path, check_only: bool
) -> Any:
    """The object that ``node`` describes; with ``check_only`` every claim is checked and nothing is read."""

    def fail(message: str) -> NoReturn:
        raise ValueError(f"{str(file)!r}, key {_show(path)!r}: {message}")

    def child(key: Any, value: Any) -> Any:
        return _decode(value, (*path, key), arrays, place, file, check_only)

    def array(entry: Any) -> Any:
        if not isinstance(entry, dict) or not {"name", "dtype", "shape", "crc32"} <= entry.keys():
            fail("an array needs 'name', 'dtype', 'shape' and 'crc32'")
        name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
        if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
            fail("an array's 'name', 'dtype' and 'shape' must be a string, a string and a list")
        if check_only:
            arrays.expect(name, dtype, tuple(shape))
            return jax.ShapeDtypeStruct(
                tuple(shape), np.float32 if dtype in _WIDE else jnp.dtype(dtype)
            )
        host = arrays.read(name)
        if _checksum(host) != entry["crc32"]:
            raise ValueError(
                f"{str(arrays.path)!r} is damaged: the bytes of {name!r} do not match their checksum"
            )
        if dtype in _WIDE and not jax.config.read("jax_enable_x64"):
            return host
        return place(host)

    kind = node.get("kind") if isinstance(node, dict) else None
    if kind == "constant":
        value = node.get("value")
        return (
            value
            if value is None or isinstance(value, (bool, int, float, str))
            else fail("bad constant")
        )
    if kind == "array":
        return array(node)
    if kind == "prng_key":
        data = array(node.get("data"))
        try:
            return (
                data
                if check_only
                else jax.random.wrap_key_data(jnp.asarray(data), impl=node["implementation"])
            )
        except (KeyError, ValueError, TypeError) as e:
            fail(f"bad random key: {e}")
    if kind == "slide_weight":
        return _decode_weight(node, array, fail)
    items = node.get("items") if isinstance(node, dict) else None
    if (
        kind == "dict"
        and isinstance(items, list)
        and all(isinstance(i, list) and len(i) == 2 for i in items)
    ):
        if not all(type(k) in (str, int) for k, _ in items) or len(
            {(type(k), k) for k, _ in items}
        ) != len(items):
            fail("dict keys must be strings or integers, each once")
        return {k: child(k, v) for k, v in items}
    if kind in ("list", "tuple") and isinstance(items, list):
        return (list if kind == "list" else tuple)([child(i, v) for i, v in enumerate(items)])
    fail(f"not a description of a tree (kind {kind!r})")


_WIDE = frozenset({"int64", "uint64", "float64"})


def _decode_weight(
    node: dict[str, Any], array: Any, fail: Callable[[str], NoReturn]
) -> SlideWeight:
    try:
        pattern = Pattern.parse(str(node.get("pattern")))
    except (ValueError, TypeError) as e:
        fail(str(e))
    in_features = node.get("in_features")
    if type(in_features) is not int or in_features < 1:
        fail(f"in_features must be a positive integer, got {in_features!r}")
    weight = SlideWeight(
        values=array(node.get("values")),
        zeros=array(node.get("zeros")),
        scale=array(node.get("scale")),
        pattern=pattern,
        in_features=in_features,
    )
    try:
        weight.check("weight")
    except ValueError as e:
        fail(str(e))
    # The claims of the two files agree by now, so this holds for what is read too. A shard of K is not a whole weight,
    # but it is what a process of several saves: fewer groups are allowed, more are not.
    if weight.groups > pattern.groups(in_features):
        fail(
            f"{weight.groups} groups of {pattern} for {in_features} inputs, at most {pattern.groups(in_features)}"
        )
    if node.get("dtype") != weight.dtype.name:
        fail(f"dtype is {node.get('dtype')!r}, the values are {weight.dtype.name}")
    return weight

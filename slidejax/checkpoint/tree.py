"""Trees of parameters as JSON and arrays, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.checkpoint.arrays import SAVABLE, ArrayFile, checksum
from slidejax.variants.projections import unfuse_module
from slidejax.weights.checks import check_content, check_one_process
from slidejax.weights.packed import LinearWeight, SlideWeight, check_weight
from slidejax.weights.pattern import Pattern

__all__ = ["Decoder", "encode"]


_RESERVED = "__metadata__"  # no array of a safetensors file has this name


def _show(path: tuple[Any, ...]) -> str:
    return "/".join(str(p) for p in path) or "(root)"


def _name(path: tuple[Any, ...], leaf: str = "") -> str:
    # As in JSON pointers, so that no two paths share a name.
    return "/".join(str(p).replace("~", "~0").replace("/", "~1") for p in path) + leaf


def encode(node: Any, path: tuple[Any, ...], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The JSON description of `node`.

    Its arrays are added to `arrays`, under the names in the description.
    """
    if node is None or isinstance(node, (bool, int, float, str)):
        return {"kind": "constant", "value": node}
    if isinstance(node, SlideWeight):
        check_one_process(node, f"params at {_show(path)!r}")
        return _encode_weight(node, path, arrays)
    if isinstance(node, jax.Array) and jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
        data = _encode_array(jax.random.key_data(node), path, ".key", arrays)
        return {"kind": "prng_key", "implementation": str(jax.random.key_impl(node)), "data": data}
    masked = isinstance(node, np.ma.MaskedArray)  # its mask would be lost
    if isinstance(node, (jax.Array, np.ndarray, np.generic)) and not masked:
        return {"kind": "array", **_encode_array(node, path, "", arrays)}
    if type(node).__module__.startswith("flax.nnx"):
        from flax import nnx

        if isinstance(node, nnx.State):
            return encode(nnx.to_pure_dict(node), path, arrays)
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise TypeError(f"params{[*path]}: key {key!r} must be a string or an integer")
        # A list of pairs keeps integer keys apart from strings.
        return {
            "kind": "dict",
            "items": [[k, encode(v, (*path, k), arrays)] for k, v in unfuse_module(node).items()],
        }
    if type(node) in (list, tuple):
        return {
            "kind": type(node).__name__,
            "items": [encode(v, (*path, i), arrays) for i, v in enumerate(node)],
        }
    if isinstance(node, LinearWeight):
        raise TypeError(
            f"params at {_show(path)!r} is a {type(node).__name__}, and files hold SlideWeights: "
            "slidejax.adapters.merge and slidejax.trainable.deploy make them (of a ServingWeight "
            "save the weight that it was made from)"
        )
    raise TypeError(
        f"params at {_show(path)!r} is a {type(node).__name__}; dicts, lists, tuples, arrays, "
        "SlideWeights, scalars and None can be saved (unbox Flax metadata first: "
        "flax.linen.meta.unbox)"
    )


def _encode_weight(
    w: SlideWeight, path: tuple[Any, ...], arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    check_weight(w, _show(path))
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in (w.values, w.zeros, w.scale)):
        check_content(w.values, w.zeros, w.scale, w.pattern, f"params at {_show(path)!r}")
    parts = {"values": w.values, "zeros": w.zeros, "scale": w.scale}
    return {
        "kind": "slide_weight",
        "pattern": str(w.pattern),
        "dtype": w.dtype.name,
        "in_features": w.in_features,
        **{name: _encode_array(part, path, "." + name, arrays) for name, part in parts.items()},
    }


def _encode_array(
    array: Any, path: tuple[Any, ...], leaf: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(f"params at {_show(path)!r} is traced; save outside jit")
    check_one_process(array, f"params at {_show(path)!r}")
    host = np.asarray(array)
    if host.dtype.name not in SAVABLE:
        raise ValueError(
            f"params at {_show(path)!r} has dtype {host.dtype.name}, which safetensors cannot hold"
        )
    if host.dtype.byteorder == ">":
        host = host.astype(host.dtype.newbyteorder("<"))
    name = _name(path, leaf) or "(root)"
    while name in arrays or name == _RESERVED:  # {1: a, "1": b}
        name += "'"
    arrays[name] = np.ascontiguousarray(host).reshape(host.shape)
    return {
        "name": name,
        "dtype": host.dtype.name,
        "shape": list(host.shape),
        "crc32": checksum(arrays[name]),
    }


_ARRAY = frozenset({"name", "dtype", "shape", "crc32"})
# The keys of each kind of description.
_NODES: dict[str, frozenset[str]] = {
    "constant": frozenset({"kind", "value"}),
    "array": frozenset({"kind", *_ARRAY}),
    "prng_key": frozenset({"kind", "implementation", "data"}),
    "slide_weight": frozenset(
        {"kind", "pattern", "dtype", "in_features", "values", "zeros", "scale"}
    ),
    "dict": frozenset({"kind", "items"}),
    "list": frozenset({"kind", "items"}),
    "tuple": frozenset({"kind", "items"}),
}
_WIDE = frozenset({"int64", "uint64", "float64"})  # what JAX holds only with x64


class Decoder:
    """Makes the objects that `encode` described.

    Args:
      arrays: the arrays that the description names.
      file: the file that the description comes from, for errors.
      place: puts each array that was read in its place. None: no array is read, but every claim is
        checked, and `jax.ShapeDtypeStruct`s stand for the arrays.
    """

    def __init__(self, arrays: ArrayFile, file: Path, place: Callable[[np.ndarray], Any] | None):
        self._arrays, self._file, self._place = arrays, file, place

    def __call__(self, node: Any, path: tuple[Any, ...] = ()) -> Any:
        """The object that `node` describes.

        Raises:
          ValueError: naming the file and the key, for a bad description or one that does not fit
            the arrays.
        """
        kind = node.get("kind") if isinstance(node, dict) else None
        keys = _NODES.get(kind) if isinstance(kind, str) else None
        if keys is not None and node.keys() != keys:
            self._fail(path, f"a {kind} has the keys {sorted(keys)}, got {sorted(node)}")
        match kind:
            case "constant":
                return self._constant(node, path)
            case "array":
                return self._array(node, path)
            case "prng_key":
                return self._key(node, path)
            case "slide_weight":
                return self._weight(node, path)
            case "dict":
                return self._dict(node.get("items"), path)
            case "list" | "tuple" if isinstance(node.get("items"), list):
                items = [self(item, (*path, i)) for i, item in enumerate(node["items"])]
                return items if kind == "list" else tuple(items)
        self._fail(path, f"not a description of a tree (kind {kind!r})")

    def _fail(self, path: tuple[Any, ...], message: str) -> NoReturn:
        raise ValueError(f"{str(self._file)!r}, key {_show(path)!r}: {message}")

    def _constant(self, node: dict[str, Any], path: tuple[Any, ...]) -> Any:
        value = node["value"]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        self._fail(path, "bad constant")

    def _array(self, entry: Any, path: tuple[Any, ...]) -> Any:
        if not isinstance(entry, dict) or entry.keys() - {"kind"} != _ARRAY:
            self._fail(path, "an array needs 'name', 'dtype', 'shape' and 'crc32'")
        name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
        if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
            self._fail(
                path,
                "an array's 'name', 'dtype' and 'shape' must be a string, a string and a list",
            )
        if self._place is None:
            self._arrays.expect(name, dtype, tuple(shape))
            return jax.ShapeDtypeStruct(
                tuple(shape), np.float32 if dtype in _WIDE else jnp.dtype(dtype)
            )
        host = self._arrays.read(name)
        if checksum(host) != entry["crc32"]:
            raise ValueError(
                f"{str(self._arrays.path)!r} is damaged: the bytes of {name!r} do not match their "
                "checksum"
            )
        if dtype in _WIDE and not jax.config.read("jax_enable_x64"):
            return host
        return self._place(host)

    def _key(self, node: dict[str, Any], path: tuple[Any, ...]) -> Any:
        data = self._array(node.get("data"), path)
        if self._place is None:
            return data
        try:
            return jax.random.wrap_key_data(jnp.asarray(data), impl=node["implementation"])
        except (KeyError, ValueError, TypeError) as e:
            self._fail(path, f"bad random key: {e}")

    def _dict(self, items: Any, path: tuple[Any, ...]) -> dict[Any, Any]:
        if not isinstance(items, list) or not all(
            isinstance(i, list) and len(i) == 2 for i in items
        ):
            self._fail(path, "not a description of a tree (kind 'dict')")
        keys = {(type(key), key) for key, _ in items if type(key) in (str, int)}
        if len(keys) != len(items):
            self._fail(path, "dict keys must be strings or integers, each once")
        return {key: self(value, (*path, key)) for key, value in items}

    def _weight(self, node: dict[str, Any], path: tuple[Any, ...]) -> SlideWeight:
        try:
            pattern = Pattern.parse(str(node.get("pattern")))
        except (ValueError, TypeError) as e:
            self._fail(path, str(e))
        in_features = node.get("in_features")
        if type(in_features) is not int or in_features < 1:
            self._fail(path, f"in_features must be a positive integer, got {in_features!r}")
        values, zeros, scale = (
            self._array(node.get(name), path) for name in ("values", "zeros", "scale")
        )
        weight = SlideWeight(values, zeros, scale, pattern, in_features)
        try:
            weight.check("weight")
            if self._place is not None:
                check_content(values, zeros, scale, pattern, "weight")
        except ValueError as e:
            self._fail(path, str(e))
        # A process that holds a shard of K saves fewer groups than a whole weight has. More are an
        # error.
        if weight.groups > pattern.groups(in_features):
            self._fail(
                path,
                f"{weight.groups} groups of {pattern} for {in_features} inputs, "
                f"at most {pattern.groups(in_features)}",
            )
        if node.get("dtype") != weight.dtype.name:
            self._fail(path, f"dtype is {node.get('dtype')!r}, the values are {weight.dtype.name}")
        return weight

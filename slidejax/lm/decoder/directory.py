"""Reading a directory of Hugging Face: config.json and safetensors files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from slidejax.checkpoint.arrays import ArrayFile
from slidejax.files import read_whole
from slidejax.lm.decoder.compressed import Quantization
from slidejax.lm.decoder.config import DecoderConfig
from slidejax.lm.decoder.huggingface import from_huggingface
from slidejax.lm.decoder.names import parameter, safetensors_name, tree_of
from slidejax.lm.decoder.params import expected

__all__ = ["Parameters", "read_config", "read_params"]

_FLOATS = ("bfloat16", "float16", "float32")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(folder: Path) -> tuple[DecoderConfig, Quantization]:
    """The configuration of a model directory, and how its weights are quantised.

    Raises:
      ValueError: config.json is missing or malformed.
      NotImplementedError: it asks for something that the decoder does not do.
    """
    file = folder / "config.json"
    try:
        values = json.loads(read_whole(file), object_pairs_hook=_unique)
    except OSError as e:
        raise ValueError(f"{str(folder)!r} has no config.json: not a model directory") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{str(file)!r} is not JSON: {e}") from e
    if not isinstance(values, dict):
        raise ValueError(f"{str(file)!r} must hold a JSON object")
    # How the weights are stored is looked at first: it decides whether anything can be read.
    old = values.pop("compression_config", None)
    stored = values.get("quantization_config")
    quantization = Quantization(old if stored is None else stored, str(file))
    return from_huggingface(values, str(file)), quantization


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys come once: of two values each reader could take another one."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in made if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} comes twice")
    return made


def read_params(
    folder: Path, config: DecoderConfig, quantization: Quantization, dtype: Any
) -> dict[str, Any]:
    """The parameters of a model directory.

    Args:
      folder: the directory, with `model.safetensors` or its index of shards.
      config: the configuration.
      quantization: how weights are quantised.
      dtype: of embeddings, kernels and biases. Norms are float32, and 8-bit codes stay.

    Raises:
      ValueError: naming the tensor, if one is missing, unknown, or of another shape or dtype; if
        there are no such files, or one is damaged.
    """
    with Parameters(folder, config, quantization, dtype) as parameters:
        flat = {path: parameters.read(path) for path in expected(config)}
        parameters.account()
    return tree_of(flat)


class Parameters:
    """The parameters of a model directory, read one by one.

    Args:
      folder, config, quantization, dtype: as in `read_params`.

    Attributes:
      files: the safetensors files.

    Raises:
      ValueError: if there are no such files, or one is damaged; if two hold the same tensor.
    """

    def __init__(self, folder: Path, config: DecoderConfig, quantization: Quantization, dtype: Any):
        self._config, self._quantization, self._dtype = config, quantization, dtype
        self.files, placed = _files(folder)
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(ArrayFile(file)) for file in self.files]
            self._tensors = _Tensors(opened)
            _check_index(folder / _INDEX, placed, self._tensors.where)
            self._open = stack.pop_all()

    def __enter__(self) -> Parameters:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, path: str) -> Any:
        """One parameter.

        Raises:
          ValueError: naming the tensor, if it is missing, or of another shape or dtype, or holds
            values that are not finite in the dtype.
        """
        shape = expected(self._config)[path]
        return _one(self._tensors, path, shape, self._config, self._quantization, self._dtype)

    def check(self) -> None:
        """Raises what `read` of all parameters and `account` would say about names and shapes.

        Values are not looked at.
        """
        for path, shape in expected(self._config).items():
            name = safetensors_name(path)
            self._tensors.check(name, shape[::-1] if path.endswith("/kernel") else shape)
        self.account()

    def account(self) -> None:
        """Every tensor that was not asked for must be redundant."""
        left = sorted(self._tensors.where.keys() - self._tensors.used)
        unknown = [name for name in left if not self._says_the_same(name)]
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise ValueError(
                f"the checkpoint holds tensors that a {self._config.model_type} does not have: "
                f"{', '.join(unknown[:3])}{more}"
            )

    def _says_the_same(self, name: str) -> bool:
        config, tensors = self._config, self._tensors
        if name.endswith(".rotary_emb.inv_freq"):  # old versions of transformers saved this buffer
            frequencies = config.ropes[0].frequencies(config.head_dim)
            found = tensors.read(name).astype(np.float32)
            return found.shape == frequencies.shape and np.allclose(found, frequencies, rtol=1e-2)
        if name == "lm_head.weight" and config.tied and tensors.dtype(name) in _FLOATS:
            embedding = self.read("model/embed_tokens/embedding")
            found = tensors.read(name)
            if found.shape == embedding.shape and bool(
                (jnp.asarray(found, embedding.dtype) == embedding).all()
            ):
                return True
            raise ValueError(
                "config.json says tie_word_embeddings, and 'lm_head.weight' is not the embedding"
            )
        return False


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files, and the file of each tensor as the index says; none where there is no index."""
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE], {}
    index = folder / _INDEX
    if not index.is_file():
        others = sorted(
            file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".h5")
        )
        hint = f"; {others[0]} is pickled or of another framework and is not read" if others else ""
        raise ValueError(f"{str(folder)!r} has no model.safetensors and no {_INDEX}{hint}")
    try:
        placed = dict(json.loads(read_whole(index))["weight_map"])
        names = sorted(set(placed.values()))
        good = all(name == Path(name).name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{str(index)!r} is damaged: {e!r}") from e
    if not good or not names:
        raise ValueError(f"{str(index)!r} names files that are no safetensors in its directory")
    return [folder / name for name in names], placed


def _check_index(index: Path, placed: Mapping[str, str], where: Mapping[str, ArrayFile]) -> None:
    """Raises a ValueError if a tensor is not in the file that an index names."""
    for name, file in placed.items():
        if name not in where or where[name].path.name != file:
            raise ValueError(f"{str(index)!r} says that {name!r} is in {file!r}, and it is not")


class _Tensors:
    """The tensors of several files, each of which must be used."""

    def __init__(self, files: list[ArrayFile]):
        self.where: dict[str, ArrayFile] = {}
        self.used: set[str] = set()
        for file in files:
            for name in file.entries:
                if name in self.where:
                    raise ValueError(
                        f"{str(file.path)!r} and {str(self.where[name].path)!r} both hold {name!r}"
                    )
                self.where[name] = file

    def dtype(self, name: str) -> str:
        return self._file(name).entries[name][0]

    def read(self, name: str) -> np.ndarray:
        self.used.add(name)
        return self._file(name).read(name)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises a ValueError unless there is such a tensor of floats; it counts as used."""
        dtype, found = self._file(name).entries[name]
        self.used.add(name)
        if found != shape:
            raise ValueError(f"{name!r} has shape {found}, config.json says {shape}")
        if dtype not in _FLOATS:
            raise ValueError(_no_weights(name, dtype))

    def _file(self, name: str) -> ArrayFile:
        if name not in self.where:
            raise ValueError(f"the checkpoint lacks the tensor {name!r}")
        return self.where[name]


def _one(
    tensors: _Tensors,
    path: str,
    shape: tuple[int, ...],
    config: DecoderConfig,
    quantization: Quantization,
    dtype: Any,
) -> Any:
    """One parameter."""
    name = safetensors_name(path)
    stored = tensors.dtype(name)
    tensor = tensors.read(name)
    kernel = path.endswith("/kernel")
    if tensor.shape != (shape[::-1] if kernel else shape):
        raise ValueError(
            f"{name!r} has shape {tensor.shape}, config.json says {shape[::-1] if kernel else shape}"
        )
    scheme = quantization.scheme_of(name.removesuffix(".weight")) if kernel else None
    if scheme is not None:
        _no_zero_point(tensors, f"{name}_zero_point")
        return quantization.kernel(name, tensor, tensors.read(f"{name}_scale"), scheme, dtype)
    if stored not in _FLOATS:
        raise ValueError(_no_weights(name, stored))
    value = parameter(path, tensor, dtype)
    # Gemma's norms are 1 + weight, also those of queries and keys.
    return value + 1 if config.sandwich_norm and path.endswith("/weight") else value


def _no_weights(name: str, dtype: str) -> str:
    if dtype == "float64":
        return f"{name!r} is float64, expected {', '.join(_FLOATS)}"
    return (
        f"{name!r} is {dtype}: codes are no weights, and config.json has no quantization_config "
        "that says how to read them"
    )


def _no_zero_point(tensors: _Tensors, name: str) -> None:
    if name in tensors.where and tensors.read(name).any():
        raise NotImplementedError(f"{name!r} is not zero: only symmetric weights can be read")

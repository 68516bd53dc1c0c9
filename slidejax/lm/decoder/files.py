"""`load` and `save`: a decoder from files, and into files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.checkpoint import store
from slidejax.checkpoint.gguf import GGUFFile
from slidejax.checkpoint.staging import staged
from slidejax.files import check_path, reading
from slidejax.lm.decoder import directory, gguf
from slidejax.lm.decoder.config import DecoderConfig
from slidejax.lm.decoder.model import Decoder
from slidejax.lm.decoder.names import tree_of
from slidejax.lm.decoder.params import expected
from slidejax.lm.text.files import is_text_file, text_files
from slidejax.variants.prepared import weights_of
from slidejax.weights.numerics import dtype_of, is_quantized
from slidejax.weights.packed import LinearWeight, SlideWeight

__all__ = ["CLASS", "load", "load_head", "save"]

CLASS = "slidejax.lm.Decoder"  # what a saved directory says that it holds
_FLOATS = ("bfloat16", "float16", "float32")


def load(path: str | os.PathLike[str], dtype: Any = None) -> Decoder:
    """Reads a decoder: Llama, SmolLM2, Mistral, Qwen 2, 2.5 and 3, or the text models of Gemma 3.

    Args:
      path: a directory of Hugging Face (`config.json` and safetensors, in one file or in shards), a
        GGUF file, or a directory that `save` or `slidejax convert` wrote. Nothing in a directory is
        run.
      dtype: bfloat16, float16 or float32, in which the decoder computes and its floating
        parameters are kept. None: the one that was saved by slidejax; else bfloat16 on a GPU and
        float32 on a CPU. Norms are float32, and 8-bit codes stay as they are.

    Returns:
      The decoder, with the directory's tokenizer and other text files in `files`. A GGUF file's
      tokenizer is in `files["gguf_tokenizer.json"]`.

    Raises:
      ValueError: there is no such path, or files are missing or damaged, or their tensors are not
        those of the configuration, or hold values that are not finite in the dtype.
      TypeError: `path` is no path.
      NotImplementedError: naming it, if the files ask for a computation that the decoder does not
        do, or are quantised in a way that cannot be read.
      ImportError: a GGUF file needs the package gguf.

    >>> import tempfile
    >>> from slidejax.lm.decoder.examples import tiny
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(tiny(), folder + "/model")
    ...     model = load(folder + "/model", dtype="bfloat16")
    >>> model.dtype.name, model(jnp.array([[1, 2]])).shape
    ('bfloat16', (1, 2, 64))
    """
    dtype = check_dtype(dtype)
    path = check_path(path)
    with reading(path):
        return _load(path, dtype)


def _load(path: Path, dtype: np.dtype | None) -> Decoder:
    if path.is_file():
        file = GGUFFile(path)
        config = gguf.config_of(file)
        params = gguf.params_of(file, config, dtype or default_dtype())
        return Decoder(config, params, files={gguf.GGUF_TOKENIZER: gguf.tokenizer_of(file)})
    if not path.is_dir():
        raise ValueError(f"path {str(path)!r} is neither a file nor a directory")
    if (path / store.METADATA).is_file():
        return _load_saved(path, dtype)
    config, quantization = directory.read_config(path)
    params = directory.read_params(path, config, quantization, dtype or default_dtype())
    return Decoder(config, params, files=text_files(path))


def load_head(path: str | os.PathLike[str]) -> tuple[Decoder, bool]:
    """All of a decoder but its weights, to know its limits before they are read.

    Args:
      path: as in `load`.

    Returns:
      The decoder with shapes in place of its parameters, none of them packed, and whether the files
      hold packed weights.

    Raises:
      ValueError, TypeError, NotImplementedError, ImportError: as `load`, but for what is wrong with
        the weights.

    >>> import tempfile
    >>> from slidejax.lm.decoder.examples import tiny
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(tiny(), folder + "/model")
    ...     model, packed = load_head(folder + "/model")
    >>> model.config.vocab_size, packed
    (64, False)
    """
    path = check_path(path)
    with reading(path):
        config, texts, about, packed = _head(path)
    dtype = default_dtype()
    shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in expected(config).items()}
    return Decoder(config, tree_of(shapes), files=texts, about=about), packed


def _head(path: Path) -> tuple[DecoderConfig, Mapping[str, bytes], Mapping[str, Any], bool]:
    """Configuration, text files, notes, and whether weights are packed."""
    if path.is_file():
        file = GGUFFile(path)
        return gguf.config_of(file), {gguf.GGUF_TOKENIZER: gguf.tokenizer_of(file)}, {}, False
    if not path.is_dir():
        raise ValueError(f"path {str(path)!r} is neither a file nor a directory")
    if not (path / store.METADATA).is_file():
        return directory.read_config(path)[0], text_files(path), {}, False
    model, params, about = _parts(path, store.shapes(path))
    config = _config(path, model)
    return config, text_files(path), about, bool(weights_of(params))


def save(model: Decoder, path: str | os.PathLike[str], *, floats: Any = None) -> None:
    """Writes a decoder into a directory that `load` reads.

    Packed weights are kept in the packed form (`slidejax.checkpoint`), and a tied embedding once.
    The directory is written beside `path` and renamed, so that it is never there in part.

    Args:
      model: the decoder. Master weights and adapters must be deployed or merged first.
      path: the directory to write. If it exists, it must be empty or hold an earlier checkpoint.
      floats: bfloat16, float16 or float32, in which embeddings and kernels that are not packed are
        kept. Whatever it is, `load` gives them the dtype in which the decoder computes. None keeps
        theirs.

    Raises:
      ValueError: if `path` is a file, or a directory that holds other things; for another dtype; if
        parameters are spread over several processes (`slidejax.checkpoint.save`).
      TypeError: if `model` is no decoder, or holds weights that cannot be saved, or `path` is no
        path.
      OSError: if the directory cannot be written. An earlier one then stays as it is.
    """
    path = check_path(path)
    if not isinstance(model, Decoder):
        raise TypeError(f"model must be a slidejax.lm.Decoder, got {type(model).__name__}")
    params = (
        model.params if floats is None else kept_in(model.params, check_dtype(floats, "floats"))
    )
    with staged(path, store.METADATA) as folder:
        store.write_into(folder, content(model.config, model.dtype, model.about, params))
        write_texts(folder, model.files)


def content(config: DecoderConfig, dtype: np.dtype, about: Any, params: Any) -> dict[str, Any]:
    """The metadata of a saved directory, as `slidejax.checkpoint` writes it."""
    model = {"class": CLASS, "dtype": dtype.name, "config": config.to_json()}
    return {"model": model, "about": about, "params": params}


def write_texts(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the text files that go with a model."""
    for name, data in files.items():
        if is_text_file(name):
            (folder / name).parent.mkdir(exist_ok=True)  # of an additional chat template
            (folder / name).write_bytes(data)


def kept_in(tree: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """A tree with its embeddings and its unpacked kernels in a dtype; the rest is unchanged."""
    return {
        name: kept_in(value, dtype)
        if isinstance(value, Mapping)
        else value.astype(dtype)
        if name in ("embedding", "kernel") and not isinstance(value, LinearWeight)
        else value
        for name, value in tree.items()
    }


def default_dtype() -> np.dtype:
    """The dtype in which a decoder computes on this device by default."""
    return np.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def check_dtype(dtype: Any, name: str = "dtype") -> np.dtype | None:
    """The dtype, if a decoder can compute in it, or None; otherwise a ValueError."""
    if dtype is None:
        return None
    resolved = dtype_of(dtype)
    if resolved is None or resolved.name not in _FLOATS:
        raise ValueError(f"{name} must be one of {', '.join(_FLOATS)}, got {dtype!r:.60}")
    return resolved


# --- what slidejax saved --------------------------------------------------------------------------


def _load_saved(folder: Path, dtype: np.dtype | None) -> Decoder:
    model, params, about = _parts(folder, store.load(folder))
    config = _config(folder, model)
    if model["class"] != CLASS:
        config, params = _from_flax(config, params)
    dtype = dtype or check_dtype(model["dtype"])
    return Decoder(config, _cast(params, dtype), files=text_files(folder), about=about)


def _parts(folder: Path, content: Any) -> tuple[Any, Any, Any]:
    """The configuration of a directory's model, its parameters, and the notes about it."""
    try:
        model, params, about = content["model"], content["params"], content["about"]
        _ = model["class"], check_dtype(model["dtype"])
    except (KeyError, TypeError) as e:
        raise ValueError(f"{str(folder)!r} holds parameters but no model: {e!r}") from e
    return model, params, about


def _config(folder: Path, model: Any) -> DecoderConfig:
    """The configuration of what slidejax saved."""
    if model["class"] == CLASS:
        return DecoderConfig.from_json(model.get("config") or {})
    # a Flax model of transformers, whose parameters have the same names
    return directory.read_config(folder)[0]


def _from_flax(
    config: DecoderConfig, params: Mapping[str, Any]
) -> tuple[DecoderConfig, Mapping[str, Any]]:
    """Parameters of a Flax class of transformers, which keeps a tied head as a second array."""
    if config.sandwich_norm or not config.tied or "lm_head" not in params:
        return config, params
    head = params["lm_head"].get("kernel")
    embedding = params["model"]["embed_tokens"]["embedding"]
    if isinstance(head, LinearWeight) or not bool((head == embedding.T).all()):
        return dataclasses.replace(config, tied=False), params
    return config, {name: value for name, value in params.items() if name != "lm_head"}


def _cast(tree: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Floating parameters in a dtype; norms in float32; codes and scales as they are."""
    cast: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            cast[name] = _cast(value, dtype)
        elif isinstance(value, SlideWeight):
            cast[name] = (
                value
                if is_quantized(value.dtype)
                else value.replace(values=value.values.astype(dtype))
            )
        else:
            cast[name] = jnp.asarray(value, jnp.float32 if name == "weight" else dtype)
    return cast

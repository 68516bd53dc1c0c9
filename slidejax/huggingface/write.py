"""Writing a directory with a Hugging Face Flax model, packed weights and all."""

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
    """Writes a model, packed weights and all, so that `read_pretrained` (and every ``slidejax`` command) reads it.

    Args:
      path: the directory; it appears when it is complete, and replaces an earlier one only then.
      model: a Hugging Face Flax model, dense or converted.
      tokenizer: its tokenizer, or None.
      about: what to note about where it comes from (plain JSON values).

    Raises:
      ValueError: ``path`` is a file or holds other things.
    """
    content = {
        "model": {"class": type(model).__name__, "dtype": jnp.dtype(model.dtype).name},
        "about": about or {},
        "params": model.params,
    }
    with staged(path, store.METADATA) as folder:
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        store.write_into(folder, content)

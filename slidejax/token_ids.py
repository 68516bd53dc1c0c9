"""Token ids, for everything that reads text: calibration, training, evaluation, generation."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["check_rows", "int32_ids"]


def int32_ids(tokens: Any, name: str = "tokens") -> np.ndarray:
    """Token ids as int32, which no id becomes by wrapping around.

    Raises:
      ValueError: if they are no integers, or one does not fit.

    >>> int32_ids(np.array([1, 2**32 + 5]), "prompt")
    Traceback (most recent call last):
    ValueError: prompt must be token ids, got 4294967301
    """
    if isinstance(tokens, np.ma.MaskedArray):  # what is masked would be read all the same
        raise ValueError(f"{name} must be token ids, got a MaskedArray")
    ids = np.asarray(tokens)
    if ids.dtype == object:  # integers of Python beyond 64 bits, or rows of different lengths
        raise ValueError(f"{name} must be token ids, got {tokens!r:.80}")
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} must be token ids, which are integers, got {ids.dtype}")
    wrong = ids[(ids < -(2**31)) | (ids >= 2**31)] if ids.dtype.itemsize >= 4 else ids[:0]
    if wrong.size:
        raise ValueError(f"{name} must be token ids, got {wrong.flat[0]}")
    return ids.astype(np.int32)


def check_rows(
    tokens: Any, vocab: int, context: int | None = None, name: str = "calibration"
) -> None:
    """Raises a ValueError unless they are rows of token ids that a model can read.

    Args:
      tokens: token ids `[sequences, length]`.
      vocab: the number of tokens that the model has.
      context: the longest row that it reads, or None.
      name: of the argument, for the error.

    >>> check_rows(np.ones((2, 9), int), vocab=5, context=8)
    Traceback (most recent call last):
    ValueError: calibration has rows of 9 tokens, more than the model's context of 8: cut them
    """
    ids = int32_ids(tokens, name)
    if ids.ndim != 2:
        raise ValueError(f"{name} must be token ids [sequences, length], got shape {ids.shape}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
        raise ValueError(
            f"{name} must be token ids from 0 to {vocab - 1}, got {ids.min()} to {ids.max()}"
        )
    if context is not None and ids.shape[1] > context:
        raise ValueError(
            f"{name} has rows of {ids.shape[1]} tokens, more than the model's context of {context}: "
            "cut them"
        )

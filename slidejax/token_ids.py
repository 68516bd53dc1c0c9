"""Token ids, as all take them that read text: calibration, training, evaluation, generation."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["int32_ids"]


def int32_ids(tokens: Any, name: str = "tokens") -> np.ndarray:
    """Token ids as int32, which no id becomes by wrapping around.

    Raises:
      ValueError: if they are no integers, or one does not fit.

    >>> int32_ids(np.array([1, 2**32 + 5]), "prompt")
    Traceback (most recent call last):
    ValueError: prompt must be token ids, got 4294967301
    """
    ids = np.asarray(tokens)
    if ids.dtype == object:  # integers of Python beyond 64 bits, or rows of different lengths
        raise ValueError(f"{name} must be token ids, got {tokens!r:.80}")
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} must be token ids, which are integers, got {ids.dtype}")
    wrong = ids[(ids < -(2**31)) | (ids >= 2**31)] if ids.dtype.itemsize >= 4 else ids[:0]
    if wrong.size:
        raise ValueError(f"{name} must be token ids, got {wrong.flat[0]}")
    return ids.astype(np.int32)

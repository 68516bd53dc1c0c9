"""The text that a model is calibrated on, and the settings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.token_ids import int32_ids

__all__ = ["BATCH", "Calibration", "cut"]

BATCH = 4  # at most this many sequences of token ids make a batch


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The text that a model is calibrated on, and the settings.

    Attributes:
      batches: token ids `[sequences, length]`, which are cut into batches; or a sequence of batches
        of equal shapes. Each batch is the model's input, or a tuple of its arguments. For a model
        of transformers it may also be a dict of its arguments, as tokenizers make it.
      smooth: strength of smoothing (`slidejax.prune.model.smooth`) for layers with 8-bit values, 0
        to 1. 0 leaves the activations as they are.
      in_order: whether each layer is pruned with the inputs that the pruned layers before it give.
        Otherwise all layers are pruned with the inputs of the original model.
      correct: strength of error compensation across layers, 0 to 1
        (`slidejax.prune.model.sequential`).
      damping: as in `slidejax.prune.sparsegpt`. It is larger than for one kernel, because all
        layers together would follow the calibration text too closely (docs/accuracy.md).
      work: a folder for finished stages, from which a conversion that was stopped goes on. None:
        nothing is kept.
      progress: called with the number of stages that are done, and of all.
      offload: whether the values between stages are kept in the host's memory instead of the
        device's. These are, for the original and for the pruned model, tokens x (width of the
        residual stream + inputs of the widest layer) values of the model's dtype. Each stage then
        copies them to the device and back.
    """

    batches: Any
    smooth: float = 0.7
    in_order: bool = True
    correct: float = 0.75
    damping: float = 0.3
    work: str | os.PathLike[str] | None = None
    progress: Callable[[int, int], None] | None = None
    offload: bool = False

    @classmethod
    def of(cls, given: Any) -> Calibration:
        """A calibration as it is; anything else becomes the batches of one."""
        return given if isinstance(given, cls) else cls(given)

    def as_batches(self) -> list[Any]:
        """The batches.

        Raises:
          ValueError: if there are none, or their shapes differ.
        """
        given = self.batches
        if (
            hasattr(given, "ndim")
            and np.issubdtype(given.dtype, np.integer)
            and given.ndim == 2
            and given.size
        ):
            # batches of one shape need one program
            count = max(n for n in range(1, BATCH + 1) if len(given) % n == 0)
            return np.split(np.asarray(given), len(given) // count)
        if hasattr(given, "ndim") or not isinstance(given, Sequence):
            what = (
                f"{given.dtype} {given.shape}" if hasattr(given, "ndim") else type(given).__name__
            )
            raise ValueError(
                "calibration must be token ids [sequences, length] or a list of batches, "
                f"got {what}"
            )
        shapes = {str(jax.tree.map(jnp.shape, batch)) for batch in given}
        if len(shapes) != 1:
            raise ValueError(
                f"calibration needs batches of one shape, got {', '.join(sorted(shapes)) or 'none'}"
            )
        return list(given)


def cut(ids: Any, sequences: int, length: int, seed: int | None = None) -> np.ndarray:
    """Cuts the tokens of a text into sequences.

    Args:
      ids: token ids of the whole text.
      sequences: the largest number of sequences. A short text gives fewer.
      length: tokens in each sequence. A text that is shorter gives one shorter sequence.
      seed: the sequences are drawn at random from the whole text, and none overlaps another. None
        takes the beginning of the text.

    Returns:
      int32 `[sequences, length]`.

    Raises:
      ValueError: if there are fewer than two tokens, or they are no token ids.

    >>> cut(range(10), 2, 3).tolist(), cut(range(10), 2, 3, seed=0).shape
    ([[0, 1, 2], [3, 4, 5]], (2, 3))
    """
    ids = int32_ids(ids, "ids")
    length = min(length, len(ids))
    if length < 2:
        raise ValueError(f"the text has {len(ids)} tokens, too few to calibrate on")
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    if seed is not None:
        whole = whole[np.random.default_rng(seed).permutation(len(whole))]
    return whole[:sequences]

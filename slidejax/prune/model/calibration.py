"""What a model is calibrated on, and how."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Calibration", "cut"]

_BATCH = 4  # sequences of token ids that make a batch, at most


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on, and how.

    Attributes:
      batches: token ids `[sequences, length]`, which are cut into batches; or a sequence of batches of equal shapes, each
        the model's input, or a tuple of its arguments.
      smooth: strength of `slidejax.prune.smooth`, for layers with 8-bit values; 0 leaves the activations as they are.
      in_order: whether each layer is pruned with the inputs that the pruned layers before it give; else all with those
        of the dense model.
      correct: how far layers make up for what those before them lost, 0 to 1 (`slidejax.prune.sequential`).
      damping: as in `slidejax.prune.sparsegpt`; more than for one kernel, since all layers together would follow the calibration text too
        closely (docs/accuracy.md).
      work: a folder for finished stages: a conversion that was stopped goes on from there. None: nothing is kept.
      progress: called with the numbers of stages done and of all.
      offload: keeps what the model has computed so far of each batch in the host's memory instead of the device's: of the
        dense and of the pruned model each, tokens x (width of the residual stream + inputs of the widest layer) values
        of the model's dtype. It costs a copy there and back for every stage.
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
        """`given` itself, or with `given` as its batches."""
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
            count = max(
                n for n in range(1, _BATCH + 1) if len(given) % n == 0
            )  # batches of one shape: one program
            return np.split(np.asarray(given), len(given) // count)
        if hasattr(given, "ndim") or not isinstance(given, Sequence):
            what = (
                f"{given.dtype} {given.shape}" if hasattr(given, "ndim") else type(given).__name__
            )
            raise ValueError(
                f"calibration must be token ids [sequences, length] or a list of batches, got {what}"
            )
        shapes = {str(jax.tree.map(jnp.shape, batch)) for batch in given}
        if len(shapes) != 1:
            raise ValueError(
                f"calibration needs batches of one shape, got {', '.join(sorted(shapes)) or 'none'}"
            )
        return list(given)


def cut(ids: Any, sequences: int, length: int, seed: int | None = None) -> np.ndarray:
    """Token ids `[sequences, length]` from those of a text.

    Args:
      ids: of the whole text.
      sequences: at most so many; fewer if the text is short.
      length: of each; shorter if the text is.
      seed: the sequences are drawn from the whole text, none overlapping another; None: its beginning.

    Raises:
      ValueError: if there are fewer than two tokens.

    >>> cut(range(10), 2, 3).tolist(), cut(range(10), 2, 3, seed=0).shape
    ([[0, 1, 2], [3, 4, 5]], (2, 3))
    """
    ids = np.asarray(ids, np.int32)
    length = min(length, len(ids))
    if length < 2:
        raise ValueError(f"the text has {len(ids)} tokens, too few to calibrate on")
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    if seed is not None:
        whole = whole[np.random.default_rng(seed).permutation(len(whole))]
    return whole[:sequences]

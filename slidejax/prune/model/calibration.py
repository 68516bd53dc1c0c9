"""The text that a model is calibrated on, and the settings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bounds import COUNT, SEED, Bound
from slidejax.token_ids import int32_ids
from slidejax.weights import numerics

__all__ = ["BATCH", "Calibration", "cut"]

_SHARE = Bound(0, 1)
BATCH = 4  # at most this many sequences of token ids make a batch


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The text that a model is calibrated on, and the settings.

    Raises TypeError or ValueError, naming it, for a setting that is out of its range.

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

    def __post_init__(self) -> None:
        for name in ("smooth", "correct"):
            object.__setattr__(self, name, _SHARE.check(getattr(self, name), name))
        object.__setattr__(self, "damping", Bound(0).check(self.damping, "damping"))
        if self.work is not None and not isinstance(self.work, (str, os.PathLike)):
            raise TypeError(f"work must be a folder or None, got {self.work!r:.60}")
        if self.progress is not None and not callable(self.progress):
            raise TypeError(f"progress must be a function or None, got {self.progress!r:.60}")

    @classmethod
    def of(cls, given: Any) -> Calibration:
        """A calibration as it is; anything else becomes the batches of one."""
        return given if isinstance(given, cls) else cls(given)

    def as_batches(self) -> list[Any]:
        """The batches.

        Raises:
          TypeError: if they are text, or hold something that is no array of numbers.
          ValueError: if there are none, they are no sequence, or their shapes differ.
        """
        given = self.batches
        if any(isinstance(leaf, np.ma.MaskedArray) for leaf in jax.tree.leaves(given)):
            raise TypeError(
                "calibration must be token ids [sequences, length] or a list of batches of arrays, "
                "got MaskedArray"
            )
        is_array = isinstance(given, (jax.Array, np.ndarray))
        if is_array and np.issubdtype(given.dtype, np.integer) and given.ndim == 2 and given.size:
            # batches of one shape need one program
            count = max(n for n in range(1, BATCH + 1) if len(given) % n == 0)
            return np.split(np.asarray(given), len(given) // count)
        if is_array or isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
            what = f"{given.dtype} {given.shape}" if is_array else type(given).__name__
            error = TypeError if isinstance(given, (str, bytes)) else ValueError
            raise error(
                "calibration must be token ids [sequences, length] or a list of batches, "
                f"got {what}"
            )
        for leaf in jax.tree.leaves(list(given)):
            kind = numerics.dtype_of(getattr(leaf, "dtype", type(leaf)))
            if isinstance(leaf, (str, bytes)) or kind is None or kind.kind in "OSUMm":
                raise TypeError(
                    "calibration must be token ids [sequences, length] or a list of batches of "
                    f"arrays, got {type(leaf).__name__}"
                )
            if jnp.ndim(leaf) == 0 and any(leaf is batch for batch in given):
                raise ValueError(
                    "calibration must be token ids [sequences, length] or a list of batches of "
                    f"arrays, got a list of numbers such as {leaf!r:.60}"
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
    if ids.ndim != 1:
        raise ValueError(f"ids must be the token ids of one text, got shape {ids.shape}")
    sequences, length = COUNT.check(sequences, "sequences"), COUNT.check(length, "length")
    seed = None if seed is None else SEED.check(seed, "seed")
    length = min(length, len(ids))
    if length < 2:
        raise ValueError(f"the text has {len(ids)} tokens, too few to calibrate on")
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    if seed is not None:
        whole = whole[np.random.default_rng(seed).permutation(len(whole))]
    return whole[:sequences]

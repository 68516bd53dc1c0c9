"""Reading the models and texts that the arguments name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from slidejax.commands import terminal

if TYPE_CHECKING:
    import numpy as np

    from slidejax.lm.models import LoadedModel
    from slidejax.lm.reading import LoadedDecoder

__all__ = ["calibration", "calibration_ids", "evaluation_ids", "load", "read"]

# The default text to calibrate on has this many sequences of 512 tokens; for more, docstrings are
# added to it.
_SHORT = 64


def load(model: str, args: argparse.Namespace) -> LoadedModel:
    """The model of that name as a Flax model of transformers.

    It computes in the dtype of `--compute` or the device's default.
    """
    from slidejax.lm.models import default_dtype, load_model

    return load_model(model, getattr(args, "compute", None) or default_dtype())


def read(model: str, args: argparse.Namespace) -> LoadedDecoder | LoadedModel:
    """The model of that name, as our own decoder if that knows it; see `load`."""
    from slidejax.lm.reading import read_model

    return read_model(model, getattr(args, "compute", None))


def evaluation_ids(
    loaded: LoadedDecoder | LoadedModel, file: str | None, limit: int | None
) -> tuple[np.ndarray, str]:
    """Token ids to evaluate on.

    Args:
      loaded: the model, for its tokenizer.
      file: a text file; None: part of Python's documentation.
      limit: the largest number of tokens to predict; None: all.

    Returns:
      int32 `[tokens]`, one token more than are predicted, and a description of the text.

    Raises:
      ValueError: if the text is too short.
    """
    import numpy as np

    from slidejax.lm import texts

    text, source = (
        (texts.evaluation(), texts.source()) if file is None else (terminal.read_text(file), file)
    )
    ids = np.asarray(loaded.encode(text), np.int32)
    if limit is not None:
        ids = ids[: limit + 1]
    if len(ids) < 2:
        raise ValueError(f"{source} has {len(ids)} tokens; at least two are needed")
    return ids, source


def calibration(loaded: LoadedModel, args: argparse.Namespace) -> np.ndarray | None:
    """`calibration_ids`, or None if the method needs none (magnitude) and no text is named."""
    if args.calibration is None and args.method == "magnitude":
        return None
    return calibration_ids(loaded, args)


def calibration_ids(loaded: LoadedModel, args: argparse.Namespace) -> np.ndarray:
    """Token ids `[sequences, 512]` to calibrate on, or as long as the model's positions allow."""
    import numpy as np

    from slidejax.lm import texts
    from slidejax.lm.evaluate import fitting
    from slidejax.prune.model.calibration import cut

    if args.calibration is not None:
        text = terminal.read_text(args.calibration)
    else:
        text = texts.calibration() if args.sequences <= _SHORT else texts.training()
    ids = np.asarray(loaded.encode(text), np.int32)
    return cut(ids, args.sequences, fitting(512, loaded.model), args.seed)

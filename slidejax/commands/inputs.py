"""Reading the models and texts that the arguments name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from slidejax.commands import terminal

if TYPE_CHECKING:
    import numpy as np

    from slidejax.lm.reading import Loaded

__all__ = [
    "calibration",
    "calibration_ids",
    "check_memory",
    "check_prompt",
    "evaluation_ids",
    "filled",
    "is_packed",
    "load",
    "opened",
    "written",
]

# The default text to calibrate on has this many sequences of 512 tokens; for more, docstrings are
# added to it.
_SHORT = 64
_PROMPT = 8  # tokens of a text with which a row begins, before the model goes on
# Bytes of the cache of the rows that a GPU writes at a time. More rows at a time take more memory
# and less time.
_CACHE = 8 << 30


def load(
    model: str, args: argparse.Namespace, *, keep_class: bool = True, text: bool = True
) -> Loaded:
    """The model of that name; it computes in the dtype of `--compute` or the device's default.

    Args:
      model: the name.
      args: the command's arguments.
      keep_class: as in `slidejax.lm.reading.read_model`: True for commands that write a model.
      text: as in `slidejax.lm.reading.read_model`.
    """
    from slidejax.lm.reading import read_model

    compute = getattr(args, "compute", None)
    return read_model(model, compute, keep_class=keep_class, text=text)


def opened(
    model: str, args: argparse.Namespace, *, keep_class: bool = True, text: bool = True
) -> Loaded:
    """A model before its weights are read: a `Head` of a decoder, or a whole Flax model.

    Checks that depend on the model use this one. `filled` reads the weights.

    Args:
      model, args, keep_class, text: as in `load`.
    """
    from slidejax.lm.reading import read_head

    head = read_head(model, keep_class=keep_class, text=text)
    return load(model, args, keep_class=keep_class, text=text) if head is None else head


def filled(
    loaded: Loaded,
    model: str,
    args: argparse.Namespace,
    *,
    keep_class: bool = True,
    text: bool = True,
) -> Loaded:
    """A model that `opened` gave, with its weights.

    Args:
      loaded: what `opened` gave.
      model, args, keep_class, text: what it was given.
    """
    from slidejax.lm.reading import Head

    if not isinstance(loaded, Head):
        return loaded
    return load(model, args, keep_class=keep_class, text=text)


def check_memory(
    args: argparse.Namespace, models: Mapping[str, Loaded], more: Mapping[str, int] | None = None
) -> None:
    """Raises a MemoryError if models certainly do not fit into memory together.

    A conversion that reads a few layers at a time does not ask.

    Args:
      args: the command's arguments.
      models: what `opened` gave, by name. Flax models are in memory already and do not count.
      more: other things that take memory at the same time -> their bytes at least.
    """
    from slidejax.lm.memory import check_fits
    from slidejax.lm.reading import Head, bytes_of

    sizes = {
        f"the weights of {name!r} need": bytes_of(head, name, args.compute)
        for name, head in models.items()
        if isinstance(head, Head)
    }
    if sizes:
        check_fits({**sizes, **(more or {})}, _memory_hint(args, len(sizes)))


def _memory_hint(args: argparse.Namespace, count: int) -> str:
    """Advice for a user whose models do not fit."""
    import jax

    smaller = args.compute in (None, "float32") and jax.default_backend() == "cpu"
    ways = ["--compute bfloat16 takes less"] if smaller else []
    ways += ["name fewer models at a time"] if count > 1 and args.command == "eval" else []
    return ", or ".join([*ways, "free some, or take a smaller model or a larger machine"])


def is_packed(loaded: Loaded) -> bool:
    """Whether a model that `opened` gave has packed weights."""
    from slidejax.lm.reading import Head
    from slidejax.variants.prepared import weights_of

    return loaded.packed if isinstance(loaded, Head) else bool(weights_of(loaded.model.params))


def check_prompt(loaded: Loaded, prompt: Any, max_new_tokens: int, name: str = "--prompt") -> None:
    """Raises a ValueError if a decoder cannot continue a prompt; other models check it themselves.

    Args:
      loaded: what `opened` gave.
      prompt: text, or token ids.
      max_new_tokens: what `--max-new-tokens` says.
      name: what the prompt is, for the error.
    """
    from slidejax.lm.decoder import writing
    from slidejax.lm.reading import LoadedDecoder

    if isinstance(loaded, LoadedDecoder):
        writing.check_prompt(loaded.model, prompt, max_new_tokens, name, "--max-new-tokens")


def evaluation_ids(loaded: Loaded, file: str | None, limit: int | None) -> tuple[np.ndarray, str]:
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


def calibration(
    loaded: Loaded, args: argparse.Namespace, default: Callable[[], str] | None = None
) -> np.ndarray | None:
    """`calibration_ids`, or None if the method needs none (magnitude) and no text is named."""
    if args.calibration is None and args.method == "magnitude":
        return None
    return calibration_ids(loaded, args, default)


def calibration_ids(
    loaded: Loaded, args: argparse.Namespace, default: Callable[[], str] | None = None
) -> np.ndarray:
    """Token ids `[sequences, 512]` to calibrate on, or as long as the model's positions allow.

    Each sequence begins with the start of a text, where the tokenizer puts one.

    Args:
      loaded: the model, for its tokenizer, its name and its sizes.
      args: the command's arguments.
      default: makes the text that is taken if the arguments name none. None: parts of Python's
        documentation.
    """
    import numpy as np

    from slidejax.lm import texts
    from slidejax.lm.evaluate import fitting
    from slidejax.prune.model.calibration import BATCH, cut

    if args.calibration is not None:
        text = "\n\n".join(map(terminal.read_text, args.calibration))
    elif default is not None:
        text = default()
    else:
        text = texts.calibration() if args.sequences <= _SHORT else texts.training()
    ids = np.asarray(loaded.encode(text), np.int32)
    start = np.asarray(loaded.start, np.int32)
    try:
        rows = cut(ids, args.sequences, fitting(512, loaded.model) - len(start), args.seed)
    except ValueError as e:
        if args.calibration is None:
            raise
        raise ValueError(f"--calibration {' '.join(args.calibration)}: {e}") from e
    if len(rows) < args.sequences:  # whole batches, which take the fewest steps
        rows = rows[: len(rows) // BATCH * BATCH or len(rows)]
    # A model in use never sees a text without its start.
    return np.concatenate([np.broadcast_to(start, (len(rows), len(start))), rows], axis=1)


def written(
    loaded: Loaded,
    rows: np.ndarray,
    count: int,
    seed: int | None,
    own: bool,
    keep: str | None = None,
) -> Any:
    """Rows of tokens that a model writes itself, each begun with a few tokens of a text.

    They are drawn from the model's own distribution, and go on after the end of a text.

    Args:
      loaded: a model.
      rows: int32 `[n, length]`, the text to calibrate on or to train on.
      count: how many rows are written, at least 1.
      seed: of the draws; None: 0.
      own: the text is the user's own: all rows begin as rows of it, which are drawn. Else half of
        them begin so, and half with `slidejax.lm.texts.openings`, which are of more kinds.
      keep: a folder that keeps the rows for a command that goes on where it was stopped. A GPU may
        add in another order the next time and then draws other tokens, which would be other data.

    Returns:
      int32 `[count, length]`.
    """
    from slidejax.prune.model.store import fingerprint, kept_rows

    if keep is None:
        return _drawn(loaded, rows, count, seed or 0, own)
    key = fingerprint(loaded.model.params, rows, count, seed or 0, own)
    return kept_rows(keep, key, lambda: _drawn(loaded, rows, count, seed or 0, own))


def _drawn(loaded: Loaded, rows: np.ndarray, count: int, seed: int, own: bool) -> Any:
    """The rows of `written`."""
    import numpy as np

    from slidejax.train.distill import sample

    draws = np.random.default_rng(seed)
    prompts = rows[draws.integers(0, len(rows), count), : _begun(loaded, rows)]
    if not own:
        openings = _openings(loaded, prompts.shape[1])
        half = np.arange(0, count if len(openings) else 0, 2)
        prompts[half] = openings[draws.integers(0, max(1, len(openings)), len(half))]
    model = loaded.model
    if hasattr(model, "with_params"):
        # A decoder keeps the parameters that serve best beside its own. Those of this one go when
        # its text is written, since what comes next needs the memory.
        model = model.with_params(model.params)
    batch = min(count, _at_a_time(model, rows.shape[1]))
    return sample(model, prompts, rows.shape[1], batch=batch, seed=seed)


def _at_a_time(model: Any, length: int) -> int:
    """How many rows of a length a model writes at a time."""
    import jax

    if jax.default_backend() != "gpu":
        return 64
    config = model.config
    if not hasattr(config, "num_kv_heads"):  # a model of transformers
        return 256
    width = config.num_kv_heads * config.head_dim
    size = 2 * config.num_layers * width * length * model.dtype.itemsize  # keys and values
    return min(512, max(16, _CACHE // size))


def _begun(loaded: Loaded, rows: np.ndarray) -> int:
    """The number of tokens that a row begins with, with the start of a text."""
    return min(len(loaded.start) + _PROMPT, rows.shape[1] // 2)


def _openings(loaded: Loaded, length: int) -> np.ndarray:
    """The beginnings of rows: the start of a text and an opening, cut to `[n, length]`.

    Openings that are too short for that are left out.
    """
    import numpy as np

    from slidejax.lm import texts

    if loaded.tokenizer is None:  # then the text was encoded with that of a converted model
        return np.zeros((0, length), np.int32)
    found = [[*loaded.start, *loaded.encode(opening)][:length] for opening in texts.openings()]
    full = [ids for ids in found if len(ids) == length]
    return np.asarray(full, np.int32).reshape(len(full), length)

"""Arguments of `slidejax recover`, and what it does with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from slidejax.commands import terminal
from slidejax.lm.models import LoadedModel

__all__ = ["add", "rows", "run", "teacher_name", "tokens"]


def add(p: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the options; `positive` parses a whole number that is more than 0."""
    p.add_argument(
        "--against",
        metavar="MODEL",
        help="the dense model to learn from (default: the one that was converted)",
    )
    p.add_argument(
        "--text",
        metavar="FILE",
        help="text file to train on (default: parts of Python's documentation and docstrings that share nothing with what eval uses)",
    )
    p.add_argument(
        "--docstrings",
        type=float,
        metavar="SHARE",
        help="of the default text's docstrings: 1 on a GPU (default), 0.2 elsewhere",
    )
    p.add_argument(
        "--sample",
        type=int,
        metavar="ROWS",
        help="add rows that the dense model writes itself, begun with pieces of the text, before the minutes begin (default 768 on a GPU, else none)",
    )
    p.add_argument(
        "--minutes", type=float, default=5.0, help="as many steps as fit into that time (default 5)"
    )
    p.add_argument(
        "--steps", type=positive, help="so many steps instead: the same result each time"
    )
    p.add_argument(
        "--batch", type=positive, help="rows in a step (default 32 on a GPU, 4 elsewhere)"
    )
    p.add_argument(
        "--accumulate",
        type=positive,
        default=1,
        metavar="PARTS",
        help="run a batch in so many parts: less memory",
    )
    p.add_argument(
        "--window", type=positive, help="tokens in a row (default 512 on a GPU, 256 elsewhere)"
    )
    p.add_argument("--learning-rate", type=float, default=2e-4, help="peak (default 0.0002)")
    p.add_argument(
        "--warmup", type=int, default=10, metavar="STEPS", help="steps of warm-up (default 10)"
    )
    p.add_argument(
        "--hidden",
        type=float,
        default=1.0,
        metavar="WEIGHT",
        help="weight of the hidden states' loss (default 1)",
    )
    p.add_argument(
        "--dtype",
        help="int8 or float8_e4m3fn, for a model whose packed values are not quantised yet",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--checkpoint", metavar="DIR", help="keep the state there; a run that it holds goes on"
    )
    p.add_argument(
        "--every",
        type=positive,
        default=100,
        metavar="STEPS",
        help="save it after so many steps (default 100)",
    )


def teacher_name(args: argparse.Namespace, loaded: LoadedModel) -> str:
    """What `--against` says, or what the model was converted from.

    Raises:
      ValueError: neither is known.
    """
    from slidejax.lm.models import NAMED

    source = loaded.about.get("source")
    name = args.against or (source if source in NAMED else None)
    if name is None:
        raise ValueError(
            f"{args.model!r} does not say where the dense model is that it was converted from: name it with --against"
        )
    return name


def tokens(args: argparse.Namespace, loaded: LoadedModel) -> tuple[np.ndarray, str]:
    """Token ids to train on, and what text they are of."""
    import jax

    from slidejax.lm import texts

    if args.text is not None:
        text, source = terminal.read_text(args.text), args.text
    else:
        share = (
            args.docstrings
            if args.docstrings is not None
            else 1.0
            if jax.default_backend() == "gpu"
            else 0.2
        )
        text, source = (
            texts.training(share),
            f"{texts.source()} and {100 * share:.0f} % of the docstrings of its library",
        )
    return np.asarray(loaded.encode(text), np.int32), source


_PROMPT = 24  # tokens of the text that a row of the dense model's own begins with


def rows(args: argparse.Namespace, teacher: LoadedModel, ids: np.ndarray) -> np.ndarray:
    """The rows to train on: the text, cut, and those that the dense model writes.

    Raises:
      ValueError: if `--sample` is negative.
    """
    import jax

    from slidejax.lm.evaluate import fitting
    from slidejax.train.distill import rows_of, sample

    gpu = jax.default_backend() == "gpu"
    window = fitting(args.window or min(512 if gpu else 256, len(ids)), teacher.model)
    text = rows_of(ids, window)
    count = args.sample if args.sample is not None else 768 if gpu else 0
    if count < 0:
        raise ValueError(f"--sample must be 0 or more rows, got {count}")
    if count == 0:
        return text
    begun = np.random.default_rng(args.seed).integers(0, len(text), count)
    prompts = text[begun, : min(_PROMPT, window // 2)]
    return np.concatenate(
        [
            text,
            sample(
                teacher.model, prompts, window, batch=min(count, 256 if gpu else 16), seed=args.seed
            ),
        ]
    )


def run(
    args: argparse.Namespace,
    loaded: LoadedModel,
    teacher: LoadedModel,
    rows: np.ndarray,
    progress: Callable[[int, int | None, float], None],
) -> tuple[Any, Any]:
    """`slidejax.recover` with the options: the model, and what `fit` found."""
    import jax

    from slidejax.train.recover import recover

    gpu = jax.default_backend() == "gpu"
    return recover(
        loaded.model,
        teacher.model,
        rows,
        steps=args.steps,
        minutes=None if args.steps else args.minutes,
        qdtype=args.dtype,
        window=rows.shape[1],
        batch=args.batch or min(32 if gpu else 4, len(rows)),
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        warmup=args.warmup,
        hidden=args.hidden,
        seed=args.seed,
        checkpoint=args.checkpoint,
        every=args.every,
        progress=progress,
    )

"""`slidejax recover`: a converted model trained until it predicts as the original model does."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from slidejax.bounds import COUNT_OR_NONE, SEED, Bound
from slidejax.commands import arguments, inputs, terminal
from slidejax.lm.texts import WINDOW

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from slidejax.lm.reading import Loaded

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "Train a converted model until it predicts as the original one does; write it to OUT."
EXAMPLE = "slidejax recover out recovered --minutes 10"

# Rows in a step and tokens in a row, where there is no GPU. `slidejax.recover` takes more. A step
# of this size already takes a CPU many seconds (docs/journal/2026-11-23-recovery.md), and some
# steps must fit into the default of --minutes.
_CPU_ROWS, _CPU_WINDOW = 4, 256
# Rows that the original model writes, where there is a GPU. A recovery of some minutes sees each of
# them several times, and fewer are learned by heart
# (docs/journal/2026-11-27-eight-minutes-of-recovery.md).
_GPU_SAMPLES = 12288
# The most bytes that the logits of a part of a batch take. There are several such arrays at a time.
_LOGITS = 2 << 30


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    p.add_argument("model", help="a directory written by 'slidejax convert'")
    p.add_argument(
        "out",
        help="the directory to write; it appears when it is complete. Parameters that are not "
        "trained, such as embeddings, keep the dtype that they have in the converted model",
    )
    _add_text(p)
    _add_training(p)
    p.add_argument(
        "--force",
        action="store_true",
        help="replace OUT if slidejax wrote it; without --force an OUT that exists is refused",
    )
    arguments.add_compute(p)
    arguments.add_json(p)


def _add_text(p: argparse.ArgumentParser) -> None:
    """Adds the flags about the original model and the text."""
    p.add_argument(
        "--against",
        metavar="MODEL",
        help="the original model to learn from (default: the one that was converted)",
    )
    p.add_argument(
        "--text",
        type=arguments.text_file,
        metavar="FILE",
        help="text file to train on (default: parts of Python's documentation and docstrings that "
        "share nothing with the text of eval)",
    )
    p.add_argument(
        "--docstrings",
        type=arguments.Number(Bound(0, 1)),
        metavar="SHARE",
        help="share of the docstrings in the default text, from 0 to 1 "
        "(default 1 on a GPU, 0.2 elsewhere)",
    )
    p.add_argument(
        "--sample",
        type=arguments.Number(COUNT_OR_NONE),
        metavar="ROWS",
        help="add rows that the original model writes, before the minutes begin. They begin with "
        "pieces of the text; without --text half of them begin as many kinds of text do (default "
        f"{_GPU_SAMPLES} on a GPU, else none)",
    )


def _add_training(p: argparse.ArgumentParser) -> None:
    """Adds the flags about the training itself."""
    positive = arguments.positive
    length = p.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=arguments.Number(Bound(0, 1e6, above=True)),
        default=6.0,
        metavar="T",
        help="make as many steps as fit into T minutes, compiling included (default 6)",
    )
    length.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="make N steps, with the same result each time, in place of --minutes",
    )
    p.add_argument(
        "--batch",
        type=positive,
        metavar="ROWS",
        help=f"rows in a step (default 32 on a GPU, {_CPU_ROWS} elsewhere)",
    )
    p.add_argument(
        "--accumulate",
        type=positive,
        metavar="PARTS",
        help="run a batch in parts, one after the other: less memory (default: as few as keep the "
        "logits of a part below 2 GiB)",
    )
    p.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help=f"tokens in a row (default {WINDOW} on a GPU, {_CPU_WINDOW} elsewhere)",
    )
    p.add_argument(
        "--learning-rate",
        type=arguments.Number(Bound(0, 1, above=True)),
        metavar="RATE",
        help="the largest learning rate (default 0.0005 where a step has 8192 tokens or more, else "
        "0.0002)",
    )
    p.add_argument(
        "--warmup",
        type=arguments.Number(COUNT_OR_NONE),
        default=10,
        metavar="STEPS",
        help="steps of warm-up (default 10)",
    )
    p.add_argument(
        "--hidden",
        type=arguments.Number(Bound(0)),
        default=1.0,
        metavar="WEIGHT",
        help="weight of the hidden states' loss (default 1)",
    )
    p.add_argument(
        "--held-out",
        type=arguments.Number(COUNT_OR_NONE),
        metavar="ROWS",
        help="rows that are not trained on. OUT gets the parameters that are best on them, and a "
        "learning rate that makes the loss worse there is halved (default: a batch, at most an "
        "eighth of the rows; 0: none)",
    )
    p.add_argument(
        "--dtype",
        type=arguments.dtype(none=False, floats=False),
        help="int8 or float8_e4m3fn, for a model whose packed values are not quantised yet",
    )
    p.add_argument(
        "--seed",
        type=arguments.Number(SEED),
        default=0,
        metavar="N",
        help="seed of the order of the rows and of the text that the original model writes "
        "(default 0)",
    )
    p.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="keep the state of the training in DIR, and the rows that the original model writes "
        "in DIR.rows: a run that was stopped goes on from there",
    )
    p.add_argument(
        "--every",
        type=positive,
        default=100,
        metavar="STEPS",
        help="steps from one saved state to the next (default 100)",
    )


def run(args: argparse.Namespace) -> None:
    """Trains the model, writes it and prints how the loss fell."""
    from slidejax.checkpoint.staging import check_writing, claimed
    from slidejax.checkpoint.store import METADATA

    _check_together(args)
    if args.checkpoint is not None:
        check_writing(args.checkpoint, METADATA, name="--checkpoint")
    with claimed(args.out, METADATA, overwrite=args.force, flag="--force") as target:
        _run(args, target)


def _check_together(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    if args.text is not None and args.docstrings is not None:
        raise ValueError("--docstrings is of the default text: it does not go with --text")
    batch = args.batch or _usual_batch()
    if args.accumulate is not None and batch % args.accumulate:
        said = "--batch" if args.batch else "the default of --batch"
        raise ValueError(f"--accumulate must divide {said}, {batch}, got {args.accumulate}")


def _usual_batch() -> int:
    """The default of `--batch`."""
    return 32 if _on_gpu() else _CPU_ROWS


def _batch(args: argparse.Namespace, count: int) -> int:
    """How many of `count` rows a step has."""
    return int(args.batch or min(_usual_batch(), count))


def _run(args: argparse.Namespace, target: Path) -> None:
    from slidejax.checkpoint.space import reserved
    from slidejax.lm.reading import keep_model, stored_dtypes
    from slidejax.train.recover import usual_rate

    with terminal.progress() as bar:
        task = bar.add_task(f"reading {args.model}", total=None)
        head = inputs.opened(args.model, args)
        name, teacher = _original(args, head)
        rows, source = _rows(args, head, teacher)
        inputs.check_memory(args, {args.model: head, name: teacher}, _trained(args))
        loaded = inputs.filled(head, args.model, args)
        stored = stored_dtypes(args.model)
        with reserved(target, _size(args, loaded)):
            original = inputs.filled(teacher, name, args, keep_class=False)
            if _samples(args):
                bar.update(task, description=f"{name} writes {_samples(args)} rows")
            rows = _with_own_rows(args, original, rows)

            def show(step: int, total: int | None, loss: float) -> None:
                said = f"step {step} of {total or '?'}: {loss:.4f}"
                bar.update(task, description=said, completed=step, total=total)

            bar.update(task, description="compiling")
            batch = _batch(args, len(rows))
            rate = args.learning_rate or usual_rate(batch * rows.shape[1])
            model, fitted = _recover(args, loaded, original, rows, batch, rate, show)
        recovery = {
            "steps": fitted.steps,
            "seconds": round(fitted.seconds, 1),
            "learning_rate": rate,
            "seed": args.seed,
            "text": source,
            "rows": len(rows),
            "kept_step": fitted.kept,
        }
        about = {**loaded.about, "recovery": recovery}
        keep_model(args.out, model, loaded, about, None, stored, lost=_lost(args, fitted.steps))
    first = float(fitted.losses[0])
    last = float(fitted.losses[-max(1, len(fitted.losses) // 10) :].mean())
    checked = [list(check) for check in fitted.checked]
    found = {"first_loss": first, "last_loss": last, "held_out": checked}
    terminal.emit(args, {"out": args.out, **recovery, **found})
    if args.json != "-":
        print(
            f"{args.out}: {fitted.steps} steps in {fitted.seconds:.0f} s, "
            f"loss {first:.4f} to {last:.4f} (mean of the last tenth)"
        )
        if checked:
            lowest = min(loss for _, loss in checked)
            print(
                f"held-out rows: loss {checked[0][1]:.4f} to {lowest:.4f}, after step "
                f"{fitted.kept}, which {args.out} holds"
            )


def _trained(args: argparse.Namespace) -> dict[str, int]:
    """The bytes that the training itself needs at least, by what needs them.

    For each packed value there is a float32 master, and two moments of Adam.
    """
    import math

    from slidejax.checkpoint.store import shapes
    from slidejax.variants.prepared import weights_of

    count = sum(math.prod(w.values.shape) for w in weights_of(shapes(args.model)))
    return {"training needs": 12 * count}


def _check_rows(args: argparse.Namespace, count: int) -> None:
    """Raises ValueError if there are too few rows for the flags."""
    batch = _batch(args, count)
    if batch > count:
        raise ValueError(f"--batch must be at most {count}, the rows, got {args.batch}")
    held = args.held_out or 0
    if held > count - batch or held % args.accumulate:
        raise ValueError(
            f"--held-out must be a multiple of --accumulate, {args.accumulate}, from 0 to "
            f"{count - batch}, the rows beside a batch; got {held}"
        )


def _size(args: argparse.Namespace, loaded: Loaded) -> int:
    """How many bytes OUT will have at most: the parameters, and files like those of the model."""
    from pathlib import Path

    import jax

    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.model.params))
    files = (file for file in Path(args.model).glob("*") if file.is_file())
    return parameters + sum(file.stat().st_size for file in files if file.suffix != ".safetensors")


def _lost(args: argparse.Namespace, steps: int) -> str:
    """The end of an error: whether a training that cannot be written is lost, or kept."""
    if args.checkpoint is None:
        return f"the training of {steps} steps is lost: --checkpoint DIR would have kept it"
    return f"the training is kept in {args.checkpoint!r}: the same command goes on from there"


def _original(args: argparse.Namespace, loaded: Loaded) -> tuple[str, Loaded]:
    """The model that `--against` names, or that `loaded` was converted from, and its name.

    Raises:
      ValueError: neither is known, the model is a converted one, or has other tokens.
    """
    from slidejax.lm.models import default_dtype, load_model, noted_source
    from slidejax.lm.reading import LoadedDecoder

    if not inputs.is_packed(loaded):
        raise ValueError(
            f"{args.model!r} has no packed weights: nothing to recover, convert it first"
        )
    name = args.against or noted_source(args.model, loaded.about)
    if name is None:
        raise ValueError(
            f"{args.model!r} does not say which original model it was converted from, or that is "
            "not there any more: name it with --against"
        )
    # Both must be of one kind.
    original: Loaded = (
        inputs.opened(name, args, keep_class=False)
        if isinstance(loaded, LoadedDecoder)
        else load_model(name, args.compute or default_dtype())
    )
    if inputs.is_packed(original):
        raise ValueError(
            f"{original.name!r} is converted too; --against must name the original model"
        )
    sizes = [one.model.config.vocab_size for one in (original, loaded)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name!r} has a vocabulary of {sizes[0]} tokens, and {args.model!r} one of {sizes[1]}: "
            "--against must name the original model"
        )
    return name, original


def _tokens(args: argparse.Namespace, loaded: Loaded) -> tuple[np.ndarray, str]:
    """Token ids to train on, and a description of the text."""
    import numpy as np

    from slidejax.lm import texts

    if args.text is not None:
        text, source = terminal.read_text(args.text), args.text
    else:
        share = args.docstrings if args.docstrings is not None else 1.0 if _on_gpu() else 0.2
        text = texts.training(share)
        source = f"{texts.source()} and {100 * share:.0f} % of the docstrings of its library"
    return np.asarray(loaded.encode(text), np.int32), source


def _rows(args: argparse.Namespace, loaded: Loaded, original: Loaded) -> tuple[np.ndarray, str]:
    """Rows `[n, window]` of the text to train on, and a description of it."""
    import numpy as np

    from slidejax.lm.evaluate import fitting
    from slidejax.train.distill import rows_of

    ids, source = _tokens(args, loaded)
    wanted = args.window or min(WINDOW if _on_gpu() else _CPU_WINDOW, len(ids))
    window = fitting(wanted, original.model)
    start = np.asarray(original.start, np.int32)
    if not len(start) < window <= len(start) + len(ids):
        raise ValueError(
            f"--window must be from {len(start) + 1} to {len(start) + len(ids)}, the tokens of the "
            f"text, got {window}"
        )
    text = rows_of(ids, window - len(start))
    # A model in use never sees a text without its start.
    text = np.concatenate([np.broadcast_to(start, (len(text), len(start))), text], axis=1)
    count = len(text) + _samples(args)
    if args.accumulate is None:
        size = window * original.model.config.vocab_size * 4  # of a row's logits
        args.accumulate = _parts(_batch(args, count), args.held_out or 0, size)
    _check_rows(args, count)
    return text, source


def _parts(batch: int, held: int, size: int) -> int:
    """The default of `--accumulate`.

    Args:
      batch, held: rows in a step, and rows that are held out; both must be whole parts.
      size: bytes of the logits of a row.

    >>> _parts(32, 0, 512 * 49152 * 4), _parts(32, 0, 512 * 262144 * 4), _parts(6, 4, _LOGITS)
    (2, 8, 2)
    """
    fitting = [n for n in range(1, batch + 1) if not batch % n and not held % n]
    return next((n for n in fitting if batch // n * size <= _LOGITS), fitting[-1])


def _samples(args: argparse.Namespace) -> int:
    """How many rows the original model writes."""
    if args.sample is not None:
        return int(args.sample)
    return _GPU_SAMPLES if _on_gpu() else 0


def _with_own_rows(args: argparse.Namespace, original: Loaded, text: np.ndarray) -> np.ndarray:
    """The rows to train on: the text, and what the original model writes."""
    import numpy as np

    count = _samples(args)
    if count == 0:
        return text
    keep = None if args.checkpoint is None else f"{args.checkpoint}.rows"
    written = inputs.written(original, text, count, args.seed, args.text is not None, keep)
    return np.concatenate([text, written])


def _recover(
    args: argparse.Namespace,
    loaded: Loaded,
    original: Loaded,
    rows: Any,
    batch: int,
    rate: float,
    progress: Any,
) -> tuple[Any, Any]:
    """Calls `slidejax.recover` with the arguments; returns the model and the `Fitted`."""
    from slidejax.train.recover import recover

    return recover(
        loaded.model,
        original.model,
        rows,
        steps=args.steps,
        minutes=None if args.steps else args.minutes,
        qdtype=args.dtype,
        window=rows.shape[1],
        batch=batch,
        accumulate=args.accumulate,
        learning_rate=rate,
        warmup=args.warmup,
        hidden=args.hidden,
        held_out=args.held_out,
        seed=args.seed,
        checkpoint=args.checkpoint,
        every=args.every,
        progress=progress,
    )


def _on_gpu() -> bool:
    """Whether JAX runs on a GPU, where defaults are larger."""
    import jax

    return jax.default_backend() == "gpu"

"""`slidejax convert`: a model pruned, quantised, packed and written to a directory.

Without flags it does what is good for most models: 6:8 in 8 bits by SparseGPT, layer by layer, with
the text that ships with the package.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from slidejax.bounds import COUNT_OR_NONE
from slidejax.commands import arguments, budget, inputs, outputs, terminal

if TYPE_CHECKING:
    from slidejax.rules import Report

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "Prune, quantise and pack a model; write it, its tokenizer and its configuration to OUT."
EXAMPLE = "slidejax convert smollm2 out"
_METHOD = "sparsegpt"
_EIGHT_BIT = "8bit"  # int8 or e4m3 by layer
_QUIET = 30  # seconds between two lines about the progress where there is no terminal


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    p.add_argument("model", help=arguments.MODEL)
    p.add_argument("out", help="the directory to write; it appears when it is complete")
    p.add_argument(
        "--pattern",
        type=arguments.pattern,
        default="6:8",
        metavar="6:8",
        help="pattern of the layers (default 6:8); dense prunes nothing and quantises only",
    )
    p.add_argument(
        "--mixed",
        type=arguments.list_of(arguments.pattern),
        default=[],
        metavar="14:16,…",
        help="choose one of these patterns for each layer, by how much the loss depends on it; the "
        "model then needs at most as many multiplications as with --pattern in every layer",
    )
    budget.add_arguments(p)
    p.add_argument(
        "--dtype",
        type=_dtype,
        default=_EIGHT_BIT,
        help="dtype of the packed values: 8bit (default: float8_e4m3fn in down projections, whose "
        "inputs have spikes, and int8 in all other layers), int8, float8_e4m3fn, none to keep the "
        "model's. With --mixed and --budget 8bit means int8 in all layers",
    )
    p.add_argument(
        "--dtype-of",
        type=arguments.for_layers(arguments.dtype(none=True)),
        action="append",
        default=[],
        metavar="REGEX=DTYPE",
        help="another dtype for layers whose whole path matches, such as "
        "'.*down_proj.*=float8_e4m3fn'; may be repeated, the first that matches counts",
    )
    arguments.add_renamed(
        p,
        "--skip",
        "--dense",
        type=arguments.regex,
        action="append",
        default=[],
        metavar="REGEX",
        help="leave layers as they are, neither pruned nor quantised, if REGEX matches their whole "
        "path; may be repeated",
    )
    arguments.add_method(p, _METHOD, 80, "prose and code that ship with slidejax")
    p.add_argument(
        "--sample",
        type=arguments.Number(COUNT_OR_NONE),
        default=0,
        metavar="N",
        help="calibrate on N more sequences that the model writes itself (default 0). They begin "
        "with pieces of the text; without --calibration half of them begin as many kinds of text "
        "do. The whole model is loaded for that",
    )
    p.set_defaults(method=None)  # so that --data-free can tell whether a method was named
    p.add_argument(
        "--data-free",
        action="store_true",
        help="prune by magnitude, without any text: for a model without a tokenizer",
    )
    p.add_argument(
        "--floats",
        type=arguments.float_dtype,
        default="bfloat16",
        metavar="DTYPE",
        help="dtype in which OUT keeps embeddings and layers that are skipped (default bfloat16)",
    )
    p.add_argument(
        "--force",
        action="store_true",
        help="replace OUT if slidejax wrote it; without --force an OUT that exists is refused",
    )
    p.add_argument(
        "--work",
        metavar="DIR",
        help="keep finished layers in DIR: a conversion that was stopped goes on from there (default "
        "OUT.work, which is removed at the end; none for Flax models)",
    )
    arguments.add_compute(p)
    arguments.add_json(p)


def _dtype(text: str) -> str | None:
    """The check of `--dtype`."""
    if text == _EIGHT_BIT:
        return text
    try:
        return arguments.dtype(none=True)(text)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"{e}; {_EIGHT_BIT} is int8 or e4m3 by layer") from None


def run(args: argparse.Namespace) -> None:
    """Converts the model, writes it and prints the report."""
    import time

    from slidejax.lm.reading import decodes
    from slidejax.rules import Report, Rule

    args.method = _method(args)
    args.by_layer = args.dtype == _EIGHT_BIT and not args.mixed and args.budget is None
    args.dtype = "int8" if args.dtype == _EIGHT_BIT else args.dtype
    budget.check(args)
    with _claimed(args):
        pass  # whatever is in the way is named before anything is read
    rule, report = Rule(args.pattern, qdtype=args.dtype), Report()
    chosen = f"{args.pattern} {_EIGHT_BIT}" if args.by_layer else str(rule)
    if args.budget is not None:
        chosen = f"{args.budget} times as fast as dense"
    elif args.mixed:
        chosen = f"{', '.join(args.mixed)} for the multiplications of {rule}"
    begin = time.perf_counter()
    with terminal.progress() as bar:
        shown = _Shown(bar, chosen)
        streams = decodes(args.model, keep_class=True)
        about = (_stream if streams else _at_once)(args, rule, report, shown)
    seconds = time.perf_counter() - begin
    figures = {"out": args.out, **about, "layers": len(report.converted), "seconds": seconds}
    sizes = {
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "bytes_on_disk": _disk_usage(args.out),
    }
    terminal.emit(args, {**figures, **sizes})
    if args.json != "-":
        print(report)
        size = f"{sizes['bytes_on_disk'] / 1e6:,.1f} MB on disk"
        print(f"{args.out}: {chosen}, {args.method}, {size}, {seconds:.1f} s")


def _stream(args: argparse.Namespace, rule: Any, report: Report, shown: _Shown) -> dict[str, Any]:
    """Converts one of our own decoders, a few layers at a time; returns the notes about it."""
    from pathlib import Path

    from slidejax.lm import convert_files
    from slidejax.lm.reading import read_shell
    from slidejax.prune.model.store import remove

    shown.say(f"reading {args.model}")
    text = args.method != "magnitude" or args.calibration is not None
    loaded, path = read_shell(args.model, args.compute, text=text)
    ids = _calibration_ids(args, loaded)
    chooses = args.mixed or args.budget is not None
    # patterns need all of it, and so does a text of its own
    if chooses or args.sample:
        inputs.check_memory(args, {args.model: inputs.opened(args.model, args)})
    whole = inputs.load(args.model, args) if chooses or args.sample else None
    work = args.work or outputs.work_of(args.out)
    ids = _with_own_text(args, whole, ids, work, shown)
    rules = _rules(args, rule, whole or loaded, ids, shown)
    del whole
    notes: dict[str, Any] = {}

    def about(report: Report) -> dict[str, Any]:
        notes.update(_about(args, loaded.name, ids, report), source_path=loaded.path)
        return notes

    try:
        convert_files(
            path,
            args.out,
            rules,
            args.method,
            _calibration(ids, work, shown),
            dtype=args.compute,
            floats=args.floats,
            replace=args.force,
            about=about,
            report=report,
        )
    except BaseException:
        if ids is not None and any(Path(work).glob("stage-*")):
            kept = (
                f"note: finished layers are kept in {work!r}: the same command goes on from there"
            )
            print(kept, file=sys.stderr)
        raise
    if args.work is None:
        remove(work)
    return notes


def _at_once(args: argparse.Namespace, rule: Any, report: Report, shown: _Shown) -> dict[str, Any]:
    """Converts a Flax model of transformers, in memory; returns the notes about it."""
    from slidejax import huggingface
    from slidejax.checkpoint.space import reserved
    from slidejax.lm.reading import keep_model

    with _claimed(args) as target:
        shown.say(f"reading {args.model}")
        loaded = _load(args)
        ids = _with_own_text(args, loaded, _calibration_ids(args, loaded), args.work, shown)
        rules = _rules(args, rule, loaded, ids, shown)
        calibration = _calibration(ids, args.work, shown)
        with reserved(target, _bytes_of(loaded.model, rules)):
            model = huggingface.convert(
                loaded.model, rules, args.method, calibration, report=report
            )
        about = _about(args, loaded.name, ids, report)
        shown.say(f"writing {args.out}")
        keep_model(args.out, model, loaded, about, args.floats, lost=_lost(args))
    return about


def _lost(args: argparse.Namespace) -> str:
    """The end of an error: whether a conversion that cannot be written is lost, or kept."""
    if args.work is None or args.method == "magnitude":
        return "the converted model is lost"
    return f"finished layers are kept in {args.work!r}: the same command goes on from there"


class _Shown:
    """Shows how far a conversion is: on a bar, or in a line now and then where there is none.

    Args:
      bar: the progress bar.
      chosen: what the model is converted to.
    """

    def __init__(self, bar: Any, chosen: str):
        self._bar, self._chosen = bar, chosen
        self._task = bar.add_task("", total=None)
        self._began: tuple[float, int] | None = None
        self._said = 0.0

    def say(self, what: str) -> None:
        """Says what is done now."""
        self._bar.update(self._task, description=what)

    def stage(self, done: int, total: int) -> None:
        """Says how many stages are done, and how long the others will take."""
        import time

        now = time.monotonic()
        if self._began is None:  # stages that were finished before would look quick
            self._began = now, done
        since, first = self._began
        left = ""
        if done > first:
            seconds = (now - since) / (done - first) * (total - done)
            left = f", {terminal.duration(seconds)} left"
        what = f"to {self._chosen}: stage {done} of {total}{left}"
        self._bar.update(self._task, description=what, completed=done, total=total)
        if not sys.stderr.isatty() and now - self._said > _QUIET and done < total:
            self._said = now
            print(f"converting {what}", file=sys.stderr, flush=True)


# --- before the work ------------------------------------------------------------------------------


def _method(args: argparse.Namespace) -> str:
    """The method, from `--method` and `--data-free`; flags that contradict each other are named."""
    if args.data_free:
        for flag, given in (
            ("--method", args.method not in (None, "magnitude")),
            ("--calibration", args.calibration is not None),
            ("--mixed", bool(args.mixed)),
            ("--budget", args.budget is not None),
            ("--sample", args.sample > 0),
        ):
            if given:
                raise ValueError(f"--data-free uses no text: it does not go with {flag}")
    if args.mixed and args.skip:
        raise ValueError("--mixed chooses for all layers: it does not go with --skip")
    if args.dtype_of and (args.mixed or args.budget is not None):
        chosen = "--mixed" if args.mixed else "--budget"
        raise ValueError(f"{chosen} chooses for all layers: it does not go with --dtype-of")
    method = args.method or ("magnitude" if args.data_free else _METHOD)
    if method == "magnitude":
        for flag, given in (
            (f"--sample {args.sample}", args.sample > 0),
            ("--calibration", args.calibration is not None),
        ):
            if given:
                raise ValueError(
                    f"{flag} is text to calibrate on, and --method magnitude does not calibrate"
                )
    if method == "magnitude" and args.pattern != "dense":
        print(
            f"note: pruning to {args.pattern} by magnitude ruins the text that most models write: "
            f"it is for tests of speed. The default, --method {_METHOD}, keeps them good",
            file=sys.stderr,
        )
    return method


def _claimed(args: argparse.Namespace) -> Any:
    """Tries everything that writing OUT needs, and keeps others away from it in the block."""
    from slidejax.checkpoint.staging import check_adding, claimed
    from slidejax.checkpoint.store import METADATA

    if args.work is not None:
        check_adding(args.work, "--work")
    return claimed(args.out, METADATA, overwrite=args.force, flag="--force")


def _load(args: argparse.Namespace) -> Any:
    """The model that is to be converted."""
    text = args.method != "magnitude" or args.calibration is not None
    loaded = inputs.load(args.model, args, text=text)
    if inputs.is_packed(loaded):
        raise ValueError(
            f"{args.model!r} is converted already; convert the model that it was made from"
        )
    return loaded


def _calibration_ids(args: argparse.Namespace, loaded: Any) -> Any:
    """The token ids to calibrate on, or None if no text is needed."""
    from slidejax.lm import texts

    if loaded.tokenizer is None and (args.method != "magnitude" or args.mixed):
        raise ValueError(
            f"{args.model!r} came without a tokenizer (tokenizer.json), so that it cannot be "
            "calibrated on text: --data-free prunes it by magnitude"
        )
    return inputs.calibration(loaded, args, texts.shipped)


def _with_own_text(
    args: argparse.Namespace, loaded: Any, ids: Any, work: str | None, shown: _Shown
) -> Any:
    """The token ids to calibrate on, with those that the model writes for `--sample`.

    The work folder keeps what the model wrote.
    """
    import numpy as np

    if not args.sample:
        return ids
    shown.say(f"writing {args.sample} sequences to calibrate on")
    own = args.calibration is not None
    written = inputs.written(loaded, ids, args.sample, args.seed, own, work)
    return np.concatenate([ids, written])


def _bytes_of(model: Any, rules: Any) -> int:
    """About how many bytes OUT will have: packed layers, and 2 bytes for each other parameter."""
    import jax

    from slidejax.conversion import functional
    from slidejax.prune.model.convert import planned_report

    made = functional(model)
    report = planned_report(made, rules)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    packed = sum(math.prod(line.shape) for line in report.converted)
    return report.bytes_after + 2 * (parameters - packed)


# --- the work -------------------------------------------------------------------------------------


def _rules(
    args: argparse.Namespace, rule: Any, loaded: Any, ids: Any, shown: _Shown
) -> list[tuple[str, Any]]:
    """The rules of the layers: chosen, or else `rule` for all that are not skipped."""
    from slidejax.huggingface import HIDDEN_LAYERS
    from slidejax.lm import eight_bit, texts
    from slidejax.prune import mixed
    from slidejax.rules import Rule

    if not args.mixed and args.budget is None:
        first: list[tuple[str, Rule | None]] = [(path, None) for path in args.skip]
        first += [(path, Rule(args.pattern, qdtype=dtype)) for path, dtype in args.dtype_of]
        if args.by_layer:
            first.append(eight_bit(args.pattern)[0])  # the down projections, if there are any
        return [*first, (HIDDEN_LAYERS, rule)]
    shown.say("choosing patterns")
    if ids is None:
        ids = inputs.calibration_ids(loaded, args, texts.shipped)
    if args.budget is not None:
        return budget.rules(args, loaded.model, ids)
    return [*mixed(loaded.model, rule, ids, patterns=args.mixed)]


def _calibration(ids: Any, work: str | None, shown: _Shown) -> Any:
    """The token ids as `convert` takes them, with the work folder and the progress; or None."""
    from slidejax.prune import Calibration

    return None if ids is None else Calibration(ids, work=work, progress=shown.stage)


def _about(args: argparse.Namespace, source: str, ids: Any, report: Report) -> dict[str, Any]:
    """The notes in the model's directory about how it was made."""
    return {
        "source": source,
        "pattern": args.pattern if args.budget is None else None,
        "mixed": args.mixed,
        "budget": None if args.budget is None else str(args.budget),
        "dtype": _EIGHT_BIT if args.by_layer else args.dtype or "none",
        "dtype_of": {path: dtype or "none" for path, dtype in args.dtype_of},
        "method": args.method,
        "skipped": args.skip,
        "calibration": None if ids is None else f"{ids.size} tokens of {_named_text(args)}",
        "sampled": args.sample,
        "notes": report.notes,
    }


def _named_text(args: argparse.Namespace) -> str:
    """A name of the calibration text, for the notes."""
    own = ["the model itself"] if args.sample else []
    return ", ".join([*(args.calibration or ["the text that ships with slidejax"]), *own])


def _disk_usage(folder: str) -> int:
    """The bytes of the files in a directory and the folders below it."""
    from pathlib import Path

    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())

"""`slidejax convert`: a model pruned, quantised, packed and written to a directory."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from slidejax.commands import arguments, inputs, terminal

if TYPE_CHECKING:
    from slidejax.rules import Report

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "Prune, quantise and pack a model; write it, its tokenizer and its configuration to OUT."
EXAMPLE = "slidejax convert smollm2 out --pattern 6:8 --method sparsegpt"


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    p.add_argument("model", help=arguments.MODEL)
    p.add_argument("out", help="the directory to write; it appears when it is complete")
    p.add_argument(
        "--pattern",
        type=arguments.pattern,
        required=True,
        metavar="6:8",
        help="pattern of the layers; dense prunes nothing and quantises only",
    )
    p.add_argument(
        "--mixed",
        type=arguments.list_of(arguments.pattern),
        default=[],
        metavar="14:16,…",
        help="choose one of these patterns for each layer, by how much the loss depends on it; the "
        "model then needs at most as many multiplications as with --pattern in every layer",
    )
    p.add_argument(
        "--dtype",
        type=arguments.dtype(none=True),
        default="int8",
        help="dtype of the packed values: int8 (default), float8_e4m3fn, none to keep the model's",
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
    arguments.add_method(p, "magnitude", 64)
    p.add_argument(
        "--work",
        metavar="DIR",
        help="keep finished layers in DIR: a conversion that was stopped goes on from there",
    )
    arguments.add_compute(p)
    arguments.add_json(p)


def run(args: argparse.Namespace) -> None:
    """Converts the model, writes it and prints the report."""
    from slidejax.checkpoint.staging import check_target
    from slidejax.checkpoint.store import METADATA
    from slidejax.lm import serving
    from slidejax.lm.reading import write_model
    from slidejax.rules import Rule
    from slidejax.variants.prepared import weights_of

    if args.mixed and args.skip:
        raise ValueError("--mixed chooses for all layers: it does not go with --skip")
    check_target(args.out, METADATA)
    rule = Rule(args.pattern, qdtype=args.dtype)
    chosen = (
        f"{', '.join(args.mixed)} for the multiplications of {rule}" if args.mixed else str(rule)
    )
    with terminal.progress() as bar:
        task = bar.add_task(f"reading {args.model}", total=3)
        loaded = inputs.load(args.model, args)
        if weights_of(loaded.model.params):
            raise ValueError(
                f"{args.model!r} is converted already; convert the model that it was made from"
            )
        ids = inputs.calibration(loaded, args)
        if args.mixed:
            bar.update(task, description="choosing patterns", completed=1)
        rules = _rules(args, rule, loaded, ids)
        bar.update(task, description=f"converting to {chosen}", completed=1)
        calibration = _calibration(args, ids, bar, task)
        model, report, seconds = serving.convert(loaded.model, rules, args.method, calibration)
        bar.update(task, description=f"writing {args.out}", completed=2)
        about = _about(args, loaded.name, ids, report)
        write_model(args.out, model, loaded, about)
    figures = {"out": args.out, **about, "layers": len(report.converted), "seconds": seconds}
    sizes = {"bytes_before": report.bytes_before, "bytes_after": report.bytes_after}
    terminal.emit(args, {**figures, **sizes})
    if args.json != "-":
        print(report)
        print(f"{args.out}: {chosen}, {args.method}, {seconds:.1f} s")


def _rules(args: argparse.Namespace, rule: Any, loaded: Any, ids: Any) -> list[tuple[str, Any]]:
    """The rules of the layers: chosen for `--mixed`, else `rule` for all that are not skipped."""
    from slidejax.huggingface import HIDDEN_LAYERS
    from slidejax.prune import mixed

    if not args.mixed:
        return [*((path, None) for path in args.skip), (HIDDEN_LAYERS, rule)]
    ids = inputs.calibration_ids(loaded, args) if ids is None else ids
    return [*mixed(loaded.model, rule, ids, patterns=args.mixed)]


def _calibration(args: argparse.Namespace, ids: Any, bar: Any, task: Any) -> Any:
    """The token ids as `convert` takes them, with `--work` and the progress bar; or None."""
    from slidejax.prune import Calibration

    def show(done: int, total: int) -> None:
        bar.update(task, completed=1 + done / total)

    return None if ids is None else Calibration(ids, work=args.work, progress=show)


def _about(args: argparse.Namespace, source: str, ids: Any, report: Report) -> dict[str, Any]:
    """The notes in the model's directory about how it was made."""
    return {
        "source": source,
        "pattern": args.pattern,
        "mixed": args.mixed,
        "dtype": args.dtype or "none",
        "method": args.method,
        "skipped": args.skip,
        "calibration": None if ids is None else f"{ids.size} tokens",
        "notes": report.notes,
    }

"""`slidejax tune`: the implementations measured on this machine, for the choice between them."""

from __future__ import annotations

import argparse
import sys

from slidejax.commands import arguments, bench, inputs, terminal

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "Measure the implementations on this machine, and keep the times for the choice."
EXAMPLE = "slidejax tune --preset llama-3-8b --pattern 6:8 --dry-run"


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    p.add_argument(
        "model",
        nargs="?",
        help="measure this model's layer shapes; a converted one also gives pattern and dtype",
    )
    bench.add_measured(p, "1,16,64,256,1024,4096,16384")
    p.add_argument("--dry-run", action="store_true", help="measure and show, record nothing")
    arguments.add_json(p)


def run(args: argparse.Namespace) -> None:
    """Measures, records and shows the times; each step is named on standard error."""
    from slidejax.bench import tuning

    if args.model and (args.preset or args.shape):
        flag = "--shape" if args.shape else "--preset"
        raise ValueError(
            f"{flag} does not go with MODEL, {args.model!r}, whose layers are measured"
        )
    model = inputs.load(args.model, args, text=False).model if args.model else None
    note = lambda text: print(text, file=sys.stderr)  # noqa: E731
    options = {"model": model, "dry_run": args.dry_run, "note": note}
    entries, path = tuning.measure(bench.shapes(args), **options, **bench.measured(args))
    terminal.emit(args, [{**e, "us": {str(v): us for v, us in e["us"].items()}} for e in entries])
    if args.json != "-":
        print(tuning.table(entries))
    if path is not None:
        print(f"recorded in {path}", file=sys.stderr)

"""`slidejax bench`: linear layers timed side by side."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from slidejax.bench.shapes import PRESETS, default_preset
from slidejax.commands import arguments, terminal

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "add_measured", "measured", "run", "shapes"]

SUMMARY = "Time linear layers: JAX bf16, int8 and fp8 as users write them, and slidejax."
EXAMPLE = "slidejax bench --shape 4096,4096 --rows 1,16 --pattern 6:8 --json bench.json"


def _shape(text: str) -> tuple[int, int]:
    """Numbers of outputs and inputs from "N,K"."""
    parts = arguments.names(text)
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"must be N,K (outputs, inputs), got {text!r}")
    return arguments.positive(parts[0]), arguments.positive(parts[1])


def add_measured(p: argparse.ArgumentParser, rows: str) -> None:
    """Adds the flags that `bench` and `tune` share.

    Args:
      p: the command's parser.
      rows: the default of `--rows` on a GPU, for the help.
    """
    seconds = arguments.at_least(0, above=True)
    p.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="shapes of layers (default: qwen2.5-7b on a GPU, smollm2 on a CPU)",
    )
    p.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="N,K",
        help="outputs,inputs of a layer, in place of a preset; may be repeated",
    )
    arguments.add_renamed(
        p,
        "--dtype",
        "--dtypes",
        type=arguments.list_of(arguments.dtype(none=False)),
        metavar="int8,…",
        help="dtypes of the values: int8, float8_e4m3fn, bfloat16, float16",
    )
    arguments.add_renamed(
        p,
        "--pattern",
        "--patterns",
        type=arguments.list_of(arguments.pattern),
        default=["6:8"],
        metavar="6:8,…",
        help="patterns of the weights (default 6:8)",
    )
    p.add_argument(
        "--rows",
        "-M",
        type=arguments.list_of(arguments.positive),
        metavar="1,16,…",
        help=f"numbers of rows of x (default: {rows}; 1,16 on a CPU)",
    )
    p.add_argument(
        "--warmup",
        type=seconds,
        metavar="S",
        help="seconds before each measurement (default 0.3; 0.02 on a CPU)",
    )
    p.add_argument(
        "--seconds",
        type=seconds,
        metavar="S",
        help="seconds of each measurement (default 0.4; 0.05 on a CPU)",
    )
    p.add_argument(
        "--rounds",
        type=int,
        choices=range(1, 21),
        default=1,
        metavar="R",
        help="measurements of each contender, 1 to 20 (default 1)",
    )


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the flags that `bench` and `tune` share, as arguments of their functions."""
    from slidejax.bench.timing import Clock

    clock = Clock.of_device(args.warmup, args.seconds, args.rounds)
    return {"patterns": args.pattern, "dtypes": args.dtype, "rows": args.rows, "clock": clock}


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(out, in) of the layers to measure; a layer that a block has twice appears twice."""
    return list(args.shape or PRESETS[args.preset or default_preset()])


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_measured(p, "16,256,1024,4096,16384")
    arguments.add_json(p)


def run(args: argparse.Namespace) -> None:
    """Measures and prints the tables; standard error names each step."""
    from slidejax.bench import run as race

    race.set_flags()
    note = lambda text: print(text, file=sys.stderr)  # noqa: E731
    results = race.measure(shapes(args), note=note, **measured(args))
    terminal.emit(args, results)
    if args.json != "-":
        print(race.table(results))

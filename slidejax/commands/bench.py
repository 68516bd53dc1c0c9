"""`slidejax bench`: linear layers timed side by side, alone or in a whole decoder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from slidejax.bench.shapes import MODELS, PRESETS, default_preset
from slidejax.bounds import Bound
from slidejax.commands import arguments, terminal

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "add_measured", "measured", "run", "shapes"]

SUMMARY = (
    "Time linear layers, alone or in a whole decoder: JAX bf16, int8 and fp8 as users write them, "
    "and slidejax."
)
_MOST_LAYERS = 1000  # more than any model has: a slip of the finger must not fill the memory
# Larger arrays have more elements than XLA can count, at which it ends the process.
_SIZE = arguments.Number(Bound(1, 2**24, whole=True))
_LENGTH = arguments.Number(Bound(1, 2**20, whole=True))
_CONTEXT, _STEPS = 512, 32  # the defaults of --context and --steps
EXAMPLE = "slidejax bench --shape 4096,4096 --rows 1,16 --pattern 6:8 --json bench.json"


def _shape(text: str) -> tuple[int, int]:
    """Numbers of outputs and inputs from "N,K"."""
    parts = arguments.names(text)
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(
            f"must be N,K (outputs, inputs), got {arguments.shown(text)}"
        )
    return _SIZE(parts[0]), _SIZE(parts[1])


def _list_or_none(check: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A check for values with commas between them; "none" is an empty list."""
    values = arguments.list_of(check)
    return lambda text: [] if text.strip().lower() == "none" else values(text)


def _prompt(text: str) -> tuple[int, int]:
    """(sequences, tokens of each) from "8x512"."""
    parts = text.lower().split("x")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(
            f"must be SEQUENCESxTOKENS such as 8x512, or none, got {arguments.shown(text)}"
        )
    try:
        sequences, tokens = _LENGTH(parts[0]), _LENGTH(parts[1])
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(
            f"{e} in {arguments.shown(text)}; 8x512 would do"
        ) from None
    if sequences * tokens > _SIZE.bound.end:
        raise argparse.ArgumentTypeError(
            f"must be at most {_SIZE.bound.end} tokens together, got {arguments.shown(text)}"
        )
    return sequences, tokens


def add_measured(p: argparse.ArgumentParser, rows: str) -> None:
    """Adds the flags that `bench` and `tune` share.

    Args:
      p: the command's parser.
      rows: the default of `--rows` on a GPU, for the help.
    """
    seconds = arguments.Number(Bound(0, 3600, above=True))
    layers = p.add_mutually_exclusive_group()
    layers.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="shapes of layers (default: qwen2.5-7b on a GPU, smollm2 on a CPU)",
    )
    layers.add_argument(
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
        type=arguments.list_of(_SIZE),
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
        type=arguments.Number(Bound(1, 20, whole=True)),
        metavar="R",
        help="measurements of each contender, 1 to 20 (default 1)",
    )


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the flags that `bench` and `tune` share, as arguments of their functions."""
    from slidejax.bench.timing import Clock

    clock = Clock.of_device(args.warmup, args.seconds, args.rounds or 1)
    return {"patterns": args.pattern, "dtypes": args.dtype, "rows": args.rows, "clock": clock}


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(out, in) of the layers to measure; a layer that a block has twice appears twice."""
    return list(args.shape or PRESETS[args.preset or default_preset()])


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_measured(p, "16,256,1024,4096,16384")
    arguments.add_json(p)
    group = p.add_argument_group(
        "a whole decoder",
        "With --model the linear layers are timed inside a decoder with random weights.\n"
        "On a GPU each contender then has five rounds of 0.2 s after 0.1 s, unless\n"
        "--rounds, --seconds and --warmup say otherwise. --pattern and --dtype name the\n"
        "weights of slidejax. Dense int8 always takes part, and without --dtype all are\n"
        "int8.",
    )
    group.add_argument(
        "--model",
        choices=list(MODELS),
        help="the model's sizes; tiny is not a real model, and only shows that everything runs",
    )
    group.add_argument(
        "--layers",
        type=arguments.Number(Bound(1, _MOST_LAYERS, whole=True)),
        metavar="L",
        help="blocks of the decoder (default: as many as the model has)",
    )
    group.add_argument(
        "--batch",
        type=_list_or_none(_LENGTH),
        metavar="1,16,…",
        help="numbers of sequences that decode together, or none (default 1,16,64)",
    )
    group.add_argument(
        "--prefill",
        type=_list_or_none(_prompt),
        metavar="8x512,…",
        help="sequences x tokens that a prefill reads, or none (default 8x512)",
    )
    group.add_argument(
        "--context",
        type=_LENGTH,
        metavar="N",
        help="positions of the static KV cache, all read in each step (default 512)",
    )
    group.add_argument(
        "--steps",
        type=_LENGTH,
        metavar="T",
        help="decoding steps in one call, at most --context (default 32)",
    )
    group.add_argument(
        "--profile",
        action="store_true",
        default=None,
        help="also list the kernels of each program, how long they take, and the gaps before them",
    )
    group.add_argument(
        "--at-once",
        type=arguments.positive,
        metavar="N",
        help="programs that are compiled at the same time (default 1); with more, each is first "
        "compiled with two layers alone, so that nothing disturbs XLA's own timing",
    )


_OF_LAYERS = ("preset", "shape", "rows")
_OF_MODELS = ("layers", "batch", "prefill", "context", "steps", "profile", "at_once")


def _check_together(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    for name in _OF_LAYERS if args.model else _OF_MODELS:
        if (value := getattr(args, name)) is not None:
            goes = "does not go with --model" if args.model else "goes with --model only"
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {goes}, got {flag} {_as_typed(name, value)}".rstrip())
    if args.batch == [] and args.prefill == []:
        raise ValueError("--batch none and --prefill none leave nothing to time: give one of them")
    context, steps = args.context or _CONTEXT, args.steps or _STEPS
    if steps > context:
        raise ValueError(f"--steps must be at most --context, {context}, got {steps}")


def _as_typed(name: str, value: Any) -> str:
    """A flag's value as it may have been typed."""
    if value is True:
        return ""
    if name == "prefill":
        return ",".join(f"{batch}x{length}" for batch, length in value) or "none"
    if name == "shape":
        return f" --{name} ".join(f"{out},{inputs}" for out, inputs in value)
    return (",".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def run(args: argparse.Namespace) -> None:
    """Measures and prints the tables; standard error names each step."""
    _check_together(args)
    note = lambda text: print(text, file=sys.stderr)  # noqa: E731
    results, table = (_whole_model if args.model else _layers)(args, note)
    terminal.emit(args, results)
    if args.json != "-":
        print(table)


def _layers(args: argparse.Namespace, note: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """The race of layers alone, and its tables."""
    from slidejax.bench import run as race

    results = race.measure(shapes(args), note=note, **measured(args))
    return results, race.table(results)


def _whole_model(
    args: argparse.Namespace, note: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """The race of whole decoders, and its tables. XLA's flags stay as users of models have them."""
    from slidejax.bench import whole_models

    results = whole_models.measure(
        args.model,
        layers=args.layers,
        batches=[1, 16, 64] if args.batch is None else args.batch,
        prefills=[(8, 512)] if args.prefill is None else args.prefill,
        patterns=args.pattern,
        dtypes=args.dtype,
        context=args.context or _CONTEXT,
        steps=args.steps or _STEPS,
        clock=whole_models.usual_clock(args.warmup, args.seconds, args.rounds),
        profiled=bool(args.profile),
        at_once=args.at_once or 1,
        note=note,
    )
    return results, whole_models.table(results)

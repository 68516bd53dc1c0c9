"""The arguments of ``slidejax bench`` and ``slidejax tune``, and the presets."""

from __future__ import annotations

import argparse
from typing import Any

from slidejax.bench.shapes import PRESETS, default_preset

__all__ = ["add", "add_tune", "measured", "shapes"]


def _shape(text: str) -> tuple[int, int]:
    try:
        out, inputs = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be N,K (outputs, inputs), got {text!r}") from None
    if out < 1 or inputs < 1:
        raise argparse.ArgumentTypeError(f"sizes must be positive, got {text!r}")
    return out, inputs


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _rows(text: str) -> list[int]:
    try:
        rows = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers such as 1,16,256, got {text!r}"
        ) from None
    if min(rows) < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text!r}")
    return rows


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _add_common(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="layer shapes (default: qwen2.5-7b on a GPU, smollm2 on a CPU)",
    )
    p.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="N,K",
        help="outputs,inputs; instead of a preset; may be repeated",
    )
    p.add_argument(
        "--dtypes",
        type=_names,
        metavar="int8,…",
        help="of the values: int8, float8_e4m3fn, bfloat16, float16",
    )
    p.add_argument("--patterns", type=_names, default=["6:8"], metavar="6:8,…")
    p.add_argument(
        "--rows",
        "-M",
        type=_rows,
        metavar="1,16,…",
        help="rows of x (default: 16,256,1024,4096,16384; 1,16 on a CPU)",
    )
    p.add_argument(
        "--warmup",
        type=_seconds,
        help="seconds before each measurement (default 0.3; 0.02 on a CPU)",
    )
    p.add_argument(
        "--seconds", type=_seconds, help="seconds of each measurement (default 0.4; 0.05 on a CPU)"
    )
    p.add_argument(
        "--rounds",
        type=int,
        choices=range(1, 21),
        default=1,
        metavar="R",
        help="turns that each contender gets (default 1)",
    )


def add(p: argparse.ArgumentParser) -> None:
    """The arguments of ``slidejax bench``."""
    _add_common(p)


def add_tune(p: argparse.ArgumentParser) -> None:
    """The arguments of ``slidejax tune``."""
    p.add_argument(
        "model",
        nargs="?",
        help="measure this model's layer shapes; a converted one gives pattern and dtype too",
    )
    _add_common(p)
    p.add_argument("--dry-run", action="store_true", help="measure and show, record nothing")


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(out, in) of the layers that the arguments ask for, each once for every time it is in a block."""
    return list(args.shape or PRESETS[args.preset or default_preset()])


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """What `bench` and `tune` both measure, as their libraries take it."""
    from slidejax.bench.timing import Clock

    clock = Clock.of_device(args.warmup, args.seconds, args.rounds)
    return {"patterns": args.patterns, "dtypes": args.dtypes, "rows": args.rows, "clock": clock}

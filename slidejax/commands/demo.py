"""`slidejax demo`: a model with every pattern beside the original: a table and samples."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slidejax.commands import arguments, inputs, terminal

if TYPE_CHECKING:
    from slidejax.lm.demo import Row

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "Convert a model to every pattern and compare: perplexity, accuracy, bytes, speed, text."
EXAMPLE = "slidejax demo smollm2 --pattern 6:8,2:4 --dtype int8"


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    p.add_argument("model", nargs="?", default="smollm2", help=arguments.MODEL)
    arguments.add_renamed(
        p,
        "--pattern",
        "--patterns",
        type=arguments.list_of(arguments.pattern),
        default=["14:16", "6:8", "4:6", "2:4"],
        metavar="6:8,…",
        help="patterns to convert to (default 14:16,6:8,4:6,2:4)",
    )
    arguments.add_renamed(
        p,
        "--dtype",
        "--dtypes",
        type=arguments.list_of(arguments.dtype(none=True)),
        default=["int8", None],
        metavar="int8,…",
        help="dtypes of the packed values: int8, float8_e4m3fn, none to keep the model's "
        "(default int8,none)",
    )
    p.add_argument(
        "--tokens",
        type=arguments.positive,
        default=4096,
        metavar="N",
        help="tokens to predict (default 4096)",
    )
    arguments.add_text(p)
    arguments.add_method(p, "wanda", 8)
    arguments.add_prompt(p, 40)
    arguments.add_compute(p)
    arguments.add_json(p)


def run(args: argparse.Namespace) -> None:
    """Converts and measures row by row, then prints the table and the samples."""
    from concurrent.futures import ThreadPoolExecutor

    from slidejax.lm import demo, serving

    out = terminal.console()
    with terminal.progress() as bar, ThreadPoolExecutor(1) as pool:
        task = bar.add_task("loading", total=None)
        head = inputs.opened(args.model, args)
        inputs.check_prompt(head, args.prompt, args.max_new_tokens)
        ids, source = inputs.evaluation_ids(head, args.text, args.tokens)
        calibration = inputs.calibration(head, args)
        converted = inputs.is_packed(head)
        loaded = inputs.filled(head, args.model, args)
        total = 1 if converted else 1 + len(args.pattern) * len(args.dtype)
        bar.update(task, total=total + 1, completed=0)
        done: list[Row] = []
        samples: list[tuple[str, serving.Sample]] = []

        def show(step: str, share: float) -> None:
            bar.update(task, description=step, completed=len(done) + share)

        options = {"patterns": args.pattern, "dtypes": args.dtype, "method": args.method}
        for row, model in demo.rows(
            loaded, ids, pool, calibration=calibration, progress=show, **options
        ):
            done.append(row)
            speed = f"{row.tokens_per_second:.1f} tokens/s"
            bar.console.print(
                f"{row.pattern} {row.dtype}: perplexity {row.perplexity:.2f}, {speed}",
                highlight=False,
            )
            # Two models write a sample: the original one, which comes first, and a converted one.
            if len(done) == 1 or (row.pattern == _sampled(args.pattern) and len(samples) < 2):
                sample = serving.Sample(model, loaded, args.prompt, args.max_new_tokens, pool)
                samples.append((f"{row.pattern} {row.dtype}", sample))
        show("writing", 0.5)
        written = [(name, sample.text()) for name, sample in samples]
    terminal.emit(args, [dataclasses.asdict(row) for row in done])
    if args.json != "-":
        _show(out, loaded.name, source, done)
        for name, text in written:
            terminal.show_written(out, name, args.prompt, text)


def _sampled(patterns: Sequence[str]) -> str:
    """The pattern whose model writes a sample."""
    return "6:8" if "6:8" in patterns else patterns[0]


def _show(out: Any, name: str, source: str, rows: Sequence[Row]) -> None:
    """Prints the table, below a line about the device and the text."""
    import jax

    from slidejax.rules import mib

    device = jax.devices()[0].device_kind
    out.print(f"{name} on {device}, {rows[0].tokens} tokens of: {source}", highlight=False)
    out.print(_table(rows))
    if jax.default_backend() == "cpu":
        out.print(
            "A CPU has no sparse tensor cores: look here at quality and size, not at speed.",
            highlight=False,
        )
    prepared = max(row.prepared_bytes for row in rows)
    if prepared:
        out.print(
            "The weights are those of the linear layers, as files hold them. This device serves a "
            f"prepared form of up to {mib(prepared, 1)} MiB, made outside the loop.",
            highlight=False,
        )


def _table(rows: Sequence[Row]) -> Any:
    """The rows as a table of rich."""
    from rich.table import Table

    from slidejax.rules import mib

    table = Table()
    for name in ("pattern", "weights"):
        table.add_column(name)
    for name in ("perplexity", "next token right", "weights, MiB", "convert, s", "tokens/s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.pattern,
            row.dtype,
            f"{row.perplexity:.2f}" if row.perplexity < 1e5 else f"{row.perplexity:.1e}",
            f"{100 * row.next_token_accuracy:.1f} %",
            mib(row.bytes, 1),
            "" if row.convert_seconds is None else f"{row.convert_seconds:.1f}",
            f"{row.tokens_per_second:.1f}",
        )
    return table

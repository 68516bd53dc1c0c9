"""`slidejax eval`: models side by side, on one text or on programs that they write."""

from __future__ import annotations

import argparse
from typing import Any

from slidejax.commands import arguments, humaneval, inputs, terminal
from slidejax.lm.texts import WINDOW

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "Measure perplexity and next-token accuracy on a text, or test programs on HumanEval."
EXAMPLE = "slidejax eval out --against smollm2"

# Tokens of the default text to predict where `--tokens` does not say.
_TOKENS = 4096
# Tokens of a sample to write where `--max-new-tokens` does not say.
_CONTINUATION = 40


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    p.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help=f"{arguments.MODEL}; several are compared with the first",
    )
    p.add_argument(
        "--task",
        choices=("perplexity", "humaneval"),
        default="perplexity",
        help="perplexity: predict a text (default); humaneval: write 164 functions of Python and "
        "run their tests, which needs the extra humaneval",
    )
    arguments.add_text(p)
    p.add_argument(
        "--tokens",
        type=arguments.positive,
        metavar="N",
        help=f"tokens to predict at most (default: {_TOKENS} of the default text, all of a file)",
    )
    p.add_argument(
        "--window",
        type=arguments.positive,
        default=WINDOW,
        metavar="N",
        help=f"predictions in one sequence (default {WINDOW})",
    )
    p.add_argument(
        "--batch",
        type=arguments.positive,
        metavar="N",
        help="sequences at a time (default 8 on a GPU, 2 on a CPU; humaneval: 128, 8)",
    )
    p.add_argument(
        "--against",
        metavar="MODEL",
        help="measure agreement with this model: share of equal first choices, and KL divergence; "
        "humaneval: the share of its solved problems that is kept, on the same problems",
    )
    p.add_argument(
        "--plot",
        type=arguments.plot_file,
        metavar="FILE",
        help="draw where the models lose, and on how many tokens (.png, .svg, .pdf)",
    )
    p.add_argument(
        "--prompt", metavar="TEXT", help="show how each model continues this, side by side"
    )
    p.add_argument(
        "--max-new-tokens",
        type=arguments.positive,
        metavar="N",
        help=f"tokens of a continuation at most (default {_CONTINUATION}; humaneval: "
        f"{humaneval.MAX_NEW_TOKENS})",
    )
    humaneval.add_arguments(p)
    arguments.add_compute(p)
    arguments.add_json(p)


def run(args: argparse.Namespace) -> None:
    """Evaluates the models one after the other and prints one table."""
    humaneval.check(args)
    if args.task == "humaneval":
        humaneval.run(args)
        return
    from slidejax.lm import comparison

    with terminal.progress() as bar:
        task = bar.add_task("reading", total=None)
        heads = {
            name: inputs.opened(name, args, keep_class=False)
            for name in [*args.models, *([args.against] if args.against else [])]
        }
        comparison.check_vocabularies({name: head.model for name, head in heads.items()})
        ids, source = _ids(args, [(name, heads[name]) for name in args.models])
        if args.prompt is not None:
            for name in args.models:
                inputs.check_prompt(heads[name], args.prompt, _new_tokens(args))
        inputs.check_memory(args, heads)
        read = {
            name: inputs.filled(head, name, args, keep_class=False) for name, head in heads.items()
        }
        loaded = [(name, read[name]) for name in args.models]

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, description=f"{name}: predicting", completed=done, total=total)

        bar.update(task, description="compiling")
        rows = comparison.compare(
            loaded,
            ids,
            window=args.window,
            batch=args.batch,
            reference=read[args.against] if args.against else None,
            prompt=args.prompt,
            max_new_tokens=_new_tokens(args),
            progress=show,
        )
    figures = [row.figures(source, args.against) for row in rows]
    terminal.emit(args, figures[0] if len(figures) == 1 else figures)
    if args.json != "-":
        out = terminal.console()
        out.print(f"{rows[0].result.tokens} tokens of {source}", highlight=False)
        out.print(comparison.table(rows, args.against))
        for row in rows:
            if row.text is not None:
                terminal.show_written(out, f"{row.name} ({row.weights})", args.prompt, row.text)
    if args.plot:
        comparison.plot(rows, args.plot, args.window)


def _new_tokens(args: argparse.Namespace) -> int:
    return args.max_new_tokens or _CONTINUATION


def _ids(args: argparse.Namespace, loaded: list[tuple[str, Any]]) -> tuple[Any, str]:
    """Token ids that all models share, and a description of the text.

    Raises:
      ValueError: the models' tokenizers differ.
    """
    limit = args.tokens or (_TOKENS if args.text is None else None)
    ids, source = inputs.evaluation_ids(loaded[0][1], args.text, limit)
    for name, model in loaded[1:]:
        if inputs.evaluation_ids(model, args.text, limit)[0].tolist() != ids.tolist():
            raise ValueError(
                f"{name!r} has another tokenizer than {args.models[0]!r}: "
                "perplexities cannot be compared"
            )
    return ids, source

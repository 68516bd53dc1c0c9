"""`slidejax convert`: a model pruned, quantised, packed and written to a directory.

Without flags it does what is good for most models: 6:8 int8 by SparseGPT, layer by layer, with the
text that ships with the package.
"""

from __future__ import annotations

import argparse
import math
import warnings
from typing import TYPE_CHECKING, Any

from slidejax.commands import arguments, budget, inputs, terminal

if TYPE_CHECKING:
    from pathlib import Path

    from slidejax.rules import Report

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "Prune, quantise and pack a model; write it, its tokenizer and its configuration to OUT."
EXAMPLE = "slidejax convert smollm2 out"
_METHOD = "sparsegpt"


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
    arguments.add_method(p, _METHOD, 64, "prose and code that ship with slidejax")
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
        help="replace OUT, if slidejax wrote it; without this an OUT that exists is refused",
    )
    p.add_argument(
        "--work",
        metavar="DIR",
        help="keep finished layers in DIR: a conversion that was stopped goes on from there",
    )
    arguments.add_compute(p)
    arguments.add_json(p)


def run(args: argparse.Namespace) -> None:
    """Converts the model, writes it and prints the report."""
    from slidejax.checkpoint.target import disk_usage
    from slidejax.lm import serving
    from slidejax.lm.reading import write_model
    from slidejax.rules import Rule

    args.method = _method(args)
    budget.check(args)
    _try_out(args)
    rule = Rule(args.pattern, qdtype=args.dtype)
    chosen = str(rule)
    if args.budget is not None:
        chosen = f"{args.budget} times as fast as dense"
    elif args.mixed:
        chosen = f"{', '.join(args.mixed)} for the multiplications of {rule}"
    with terminal.progress() as bar:
        task = bar.add_task(f"reading {args.model}", total=3)
        loaded = _load(args)
        ids = _calibration_ids(args, loaded)
        if args.mixed or args.budget is not None:
            bar.update(task, description="choosing patterns", completed=1)
        rules = _rules(args, rule, loaded, ids)
        _try_out(args, _bytes_of(loaded.model, rules))
        bar.update(task, description=f"converting to {chosen}", completed=1)
        calibration = _calibration(args, ids, bar, task)
        model, report, seconds = serving.convert(loaded.model, rules, args.method, calibration)
        bar.update(task, description=f"writing {args.out}", completed=2)
        about = _about(args, loaded.name, ids, report)
        write_model(args.out, model, loaded, about, args.floats)
    figures = {"out": args.out, **about, "layers": len(report.converted), "seconds": seconds}
    sizes = {
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "bytes_on_disk": disk_usage(args.out),
    }
    terminal.emit(args, {**figures, **sizes})
    if args.json != "-":
        print(report)
        size = f"{sizes['bytes_on_disk'] / 1e6:,.1f} MB on disk"
        print(f"{args.out}: {chosen}, {args.method}, {size}, {seconds:.1f} s")


# --- before the work ------------------------------------------------------------------------------


def _method(args: argparse.Namespace) -> str:
    """The method, from `--method` and `--data-free`; flags that contradict each other are named."""
    if args.data_free:
        for flag, given in (
            ("--method", args.method not in (None, "magnitude")),
            ("--calibration", args.calibration is not None),
            ("--mixed", bool(args.mixed)),
            ("--budget", args.budget is not None),
        ):
            if given:
                raise ValueError(f"--data-free uses no text: it does not go with {flag}")
    if args.mixed and args.skip:
        raise ValueError("--mixed chooses for all layers: it does not go with --skip")
    method = args.method or ("magnitude" if args.data_free else _METHOD)
    if method == "magnitude" and args.pattern != "dense":
        warnings.warn(
            f"pruning to {args.pattern} by magnitude ruins the text that most models write: it is "
            f"for tests of speed. The default, --method {_METHOD}, keeps them good",
            stacklevel=2,
        )
    return method


def _try_out(args: argparse.Namespace, nbytes: int = 0) -> Path:
    """Tries everything that writing OUT needs."""
    from slidejax.checkpoint.store import METADATA
    from slidejax.checkpoint.target import try_target

    try:
        return try_target(args.out, METADATA, replace=args.force, nbytes=nbytes)
    except ValueError as e:
        hint = "; --force replaces it" if "exists already" in str(e) else ""
        raise ValueError(f"{e}{hint}") from None


def _load(args: argparse.Namespace) -> Any:
    """The model that is to be converted."""
    from slidejax.variants.prepared import weights_of

    text = args.method != "magnitude" or args.calibration is not None
    loaded = inputs.load(args.model, args, text=text)
    if weights_of(loaded.model.params):
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


def _rules(args: argparse.Namespace, rule: Any, loaded: Any, ids: Any) -> list[tuple[str, Any]]:
    """The rules of the layers: chosen, or else `rule` for all that are not skipped."""
    from slidejax.huggingface import HIDDEN_LAYERS
    from slidejax.lm import texts
    from slidejax.prune import mixed

    if not args.mixed and args.budget is None:
        return [*((path, None) for path in args.skip), (HIDDEN_LAYERS, rule)]
    if ids is None:
        ids = inputs.calibration_ids(loaded, args, texts.shipped)
    if args.budget is not None:
        return budget.rules(args, loaded.model, ids)
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
        "pattern": args.pattern if args.budget is None else None,
        "mixed": args.mixed,
        "budget": None if args.budget is None else str(args.budget),
        "dtype": args.dtype or "none",
        "method": args.method,
        "skipped": args.skip,
        "calibration": None if ids is None else f"{ids.size} tokens of {_named_text(args)}",
        "notes": report.notes,
    }


def _named_text(args: argparse.Namespace) -> str:
    """A name of the calibration text, for the notes."""
    return ", ".join(args.calibration or ["the text that ships with slidejax"])

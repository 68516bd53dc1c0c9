"""`slidejax generate`: a model continues a prompt."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from slidejax import bounds
from slidejax.commands import arguments, inputs, terminal

if TYPE_CHECKING:
    from slidejax.lm.models import LoadedModel
    from slidejax.lm.reading import Loaded, LoadedDecoder

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "Continue a prompt, and show the text as it is written."
EXAMPLE = "slidejax generate out --prompt 'The moon is' --max-new-tokens 32"


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    p.add_argument("model", help=arguments.MODEL)
    arguments.add_prompt(p, 64)
    p.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template"
    )
    p.add_argument(
        "--temperature",
        type=arguments.Number(bounds.TEMPERATURE),
        default=0.0,
        metavar="T",
        help="0 (default) takes the likeliest token each time; above 0 draws",
    )
    p.add_argument(
        "--top-k",
        type=arguments.Number(bounds.TOP_K),
        default=0,
        metavar="K",
        help="draw among the K likeliest tokens; 0 (default): among all",
    )
    p.add_argument(
        "--top-p",
        type=arguments.Number(bounds.TOP_P),
        default=1.0,
        metavar="P",
        help="draw among the likeliest tokens whose probabilities sum up to P; 1 (default): among "
        "all",
    )
    p.add_argument(
        "--stop",
        type=arguments.some_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT would be written; may be repeated",
    )
    p.add_argument(
        "--seed",
        type=arguments.Number(bounds.SEED),
        default=0,
        metavar="N",
        help="seed of the draws (default 0)",
    )
    p.add_argument(
        "--cache",
        choices=("bfloat16", "float16", "float32", "int8"),
        metavar="DTYPE",
        help="dtype of the cache of keys and values: bfloat16, float16, float32, or int8, which "
        "takes half of the memory of bfloat16 (default: that of the activations)",
    )
    arguments.add_compute(p)
    arguments.add_json(p)


def run(args: argparse.Namespace) -> None:
    """Generates, and prints the text, and how fast it was to standard error."""
    from slidejax.lm.reading import LoadedDecoder

    head = inputs.opened(args.model, args, keep_class=False)
    ids = _chat(head, args.model, args.prompt) if args.chat else None
    inputs.check_prompt(head, args.prompt if ids is None else ids, args.max_new_tokens)
    inputs.check_memory(args, {args.model: head})
    loaded = inputs.filled(head, args.model, args, keep_class=False)
    if isinstance(loaded, LoadedDecoder):
        figures = _stream(args, loaded, args.prompt if ids is None else ids)
    else:
        figures = _at_once(args, loaded, ids)
    terminal.emit(args, {"model": args.model, "prompt": args.prompt, **figures})
    if args.json != "-":
        print()
        print(_speed(figures), file=sys.stderr)


def _show(args: argparse.Namespace, text: str) -> None:
    """Prints some text at once, unless standard output is for JSON."""
    if args.json != "-":
        print(text, end="", flush=True)


def _stream(args: argparse.Namespace, loaded: LoadedDecoder, prompt: Any) -> dict[str, Any]:
    """Shows the text of a decoder as it comes, and returns the figures."""
    import time

    from slidejax.lm import serving

    begin = time.perf_counter()
    stream = loaded.model.stream(
        prompt,
        params=serving.ready(loaded.model).params,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=args.stop,
        seed=args.seed,
        cache_dtype=args.cache,
    )
    text = ""
    _show(args, "" if args.chat else args.prompt)
    for piece in stream:
        text += piece
        _show(args, piece)
    return {
        "text": text,
        "tokens": stream.steps,
        "finish": stream.finish,
        "seconds": time.perf_counter() - begin,
        "first_token_seconds": stream.first_seconds,
        "tokens_per_second": stream.tokens_per_second,
    }


def _at_once(args: argparse.Namespace, loaded: LoadedModel, ids: Any) -> dict[str, Any]:
    """Shows the text of a Flax model when all of it is there, and returns the figures."""
    from slidejax.lm import serving
    from slidejax.lm.generate import Generator

    for flag, value in (("--stop", args.stop), ("--cache", args.cache)):
        if value:
            raise ValueError(
                f"{flag} needs slidejax's own decoder, and {args.model!r} is a Flax model of "
                "transformers"
            )
    ids = loaded.encode(args.prompt, start=True) if ids is None else ids
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    generator = Generator(serving.ready(loaded.model), args.max_new_tokens, **options)
    written = generator(ids, seed=args.seed)
    assert loaded.tokenizer is not None  # encode has raised otherwise
    text = loaded.tokenizer.decode(written.tokens)
    _show(args, text if args.chat else args.prompt + text)
    return {
        "text": text,
        "tokens": written.steps,
        "seconds": written.seconds,
        "tokens_per_second": written.tokens_per_second,
    }


def _speed(figures: dict[str, Any]) -> str:
    """A line about how long it took."""
    said = [f"{figures['tokens']} tokens"]
    if figures.get("first_token_seconds") is not None:
        said.append(f"the first after {figures['first_token_seconds']:.2f} s with compiling")
    if figures["tokens_per_second"] is not None:
        said.append(f"{figures['tokens_per_second']:.1f} tokens/s")
    return ", ".join(said)


def _chat(loaded: Loaded, name: str, prompt: str) -> list[int]:
    """Token ids of the prompt as a user's message.

    Raises:
      ValueError: the model has no chat template.
    """
    from slidejax.lm.text.tokenizer import Tokenizer

    message = [{"role": "user", "content": prompt}]
    if isinstance(loaded.tokenizer, Tokenizer):
        return loaded.tokenizer.chat(message)
    if loaded.tokenizer is None or not loaded.tokenizer.chat_template:
        raise ValueError(f"{name!r} has no chat template")
    ids = loaded.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True)
    return list(getattr(ids, "input_ids", ids))

"""`slidejax generate`: a model continues a prompt."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from slidejax.commands import arguments, inputs, terminal

if TYPE_CHECKING:
    from slidejax.lm.models import LoadedModel

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "Continue a prompt, as one jitted program."
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
        type=arguments.at_least(0),
        default=0.0,
        metavar="T",
        help="0 (default) takes the likeliest token each time; above 0 draws",
    )
    p.add_argument(
        "--top-k",
        type=arguments.at_least(0, whole=True),
        default=0,
        metavar="K",
        help="draw among the K likeliest tokens; 0 (default): among all",
    )
    p.add_argument(
        "--seed",
        type=arguments.at_least(0, whole=True),
        default=0,
        metavar="N",
        help="seed of the draws (default 0)",
    )
    arguments.add_compute(p)
    arguments.add_json(p)


def run(args: argparse.Namespace) -> None:
    """Generates and prints the text, and prints the speed to standard error."""
    from slidejax.lm import serving
    from slidejax.lm.generate import Generator

    loaded = inputs.load(args.model, args)
    prompt = _chat(loaded, args.model, args.prompt) if args.chat else loaded.encode(args.prompt)
    options = {"temperature": args.temperature, "top_k": args.top_k}
    generator = Generator(serving.ready(loaded.model), args.max_new_tokens, **options)
    written = generator(prompt, seed=args.seed)
    assert loaded.tokenizer is not None  # encode has raised otherwise
    text = loaded.tokenizer.decode(written.tokens)
    figures = {
        "model": args.model,
        "prompt": args.prompt,
        "text": text,
        "tokens": written.steps,
        "seconds": written.seconds,
        "tokens_per_second": written.tokens_per_second,
    }
    terminal.emit(args, figures)
    if args.json != "-":
        print(text if args.chat else args.prompt + text)
        print(f"{written.steps} tokens, {written.tokens_per_second:.1f} tokens/s", file=sys.stderr)


def _chat(loaded: LoadedModel, name: str, prompt: str) -> list[int]:
    """Token ids of the prompt as a user's message.

    Raises:
      ValueError: the model has no chat template.
    """
    if loaded.tokenizer is None or not loaded.tokenizer.chat_template:
        raise ValueError(f"{name!r} has no chat template")
    message = [{"role": "user", "content": prompt}]
    ids = loaded.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True)
    return list(getattr(ids, "input_ids", ids))

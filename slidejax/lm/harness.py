"""A model for the Language Model Evaluation Harness (package `lm_eval`), as it will serve.

    from lm_eval import simple_evaluate
    from slidejax.lm.harness import SlideLM
    results = simple_evaluate(SlideLM("out"), tasks=["lambada_openai"])

If `lm_eval` is installed, the class derives from its `LM` and is registered as `slidejax`: once
this module is imported, `simple_evaluate(model="slidejax", model_args="model=out")` works. The
module can be imported without `lm_eval`, because it uses only the names of the methods and the
requests' `args`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.lm import serving
from slidejax.lm.decoder.model import Decoder
from slidejax.lm.generate import check_generates, end_tokens, generation_options
from slidejax.lm.models import LoadedModel
from slidejax.lm.reading import LoadedDecoder, read_model
from slidejax.lm.text.tokenizer import Tokenizer

__all__ = ["SlideLM"]

try:
    from lm_eval.api import model as _harness
    from lm_eval.api.registry import register_model as _register

    _Base = _harness.LM
except ImportError:
    _Base = object

    def _register(*names: str) -> Callable[[type], type]:
        return lambda cls: cls


# Rows are padded to one of a few lengths, so that few programs are compiled. This is the shortest.
_SHORTEST = 32


def _positive(name: str, value: Any) -> int:
    """A positive whole number; the harness gives those of a command line as text."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or number != float(value):
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    return number


@_register("slidejax")
class SlideLM(_Base):  # type: ignore[misc,valid-type]
    """A causal language model that the harness can ask.

    Args:
      model: a `slidejax.lm.Decoder` with a tokenizer, a `slidejax.models.LoadedModel`, or a name as
        on the command line: "smollm2", a GGUF file, a Hugging Face directory, or a directory from
        `slidejax convert`.
      batch_size: the number of rows that run at a time.
      max_length: tokens in a row; None: the model's positions, at most 2048.
      max_gen_toks: tokens to generate if a request names no number.
      dtype: the dtype of the computation; None: as it was saved, or bfloat16 on a GPU.
      add_bos_token: whether contexts begin with the start-of-text token where the tokenizer puts
        one; None: for Gemma only, as the harness does with models of its own.
      **ignored: arguments that the harness passes to every model (`device`, `max_batch_size`).

    Raises:
      ValueError: if there is no such model, or it came without a tokenizer; or for a batch_size or
        max_gen_toks that is no positive number.
      TypeError: if it is no causal language model.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: Any = None,
        add_bos_token: bool | None = None,
        **ignored: Any,
    ):
        super().__init__()
        if isinstance(model, Decoder):
            model = LoadedDecoder(model, model.config.model_type)
        elif not isinstance(model, (LoadedModel, LoadedDecoder)):
            model = read_model(model, dtype)
        if model.tokenizer is None:
            raise ValueError(f"{model.name} came without a tokenizer (tokenizer.json)")
        if not isinstance(model, LoadedDecoder):
            check_generates(model.model)
        self._loaded, self.tokenizer = model, model.tokenizer
        self._model = serving.ready(model.model)
        if add_bos_token is None:
            add_bos_token = str(model.model.config.model_type).startswith("gemma")
        self._start = model.start if add_bos_token else []
        positions = getattr(self._model.config, "max_position_embeddings", 2048)
        self.max_length = (
            min(positions, 2048) if max_length is None else _positive("max_length", max_length)
        )
        if not 2 <= self.max_length <= positions:
            raise ValueError(
                f"max_length must be in 2..{positions}, the model's positions, got {max_length}"
            )
        self.max_gen_toks = _positive("max_gen_toks", max_gen_toks)
        self.batch_size = 8 if batch_size == "auto" else _positive("batch_size", batch_size)
        self._score_rows = jax.jit(functools.partial(_score_rows, self._model))
        self._writers: dict[tuple, Any] = {}

    # --- called by tasks

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether each is the greedy one.

        The arguments of a request are `(context, continuation)`.
        """
        return self._score([self._encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts. Each token is predicted once, with all context that fits.

        The arguments of a request are `(text,)`.
        """
        parts = [list(self._rolling(self.tok_encode(request.args[0]))) for request in requests]
        scores = iter(self._score([pair for part in parts for pair in part]))
        return [sum(next(scores)[0] for _ in part) for part in parts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuations that the model writes, each up to the first stop.

        The arguments of a request are `(context, {"until": [...], "max_gen_toks": n, ...})`.
        """
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple, list[int]] = {}
        asked = [self._generation(*request.args) for request in requests]
        for i, (ids, stops, how) in enumerate(asked):
            groups.setdefault((_padded(len(ids), self.max_length), stops, how), []).append(i)
        for (length, stops, how), members in groups.items():
            for at in range(0, len(members), self.batch_size):
                part = members[at : at + self.batch_size]
                texts = self._write([asked[i][0] for i in part], length, stops, how)
                for i, text in zip(part, texts, strict=True):
                    answers[i] = text
        return answers

    # --- called by the harness

    @property
    def eot_token_id(self) -> int:
        """A token that ends a text; `generate_until` stops at all of them."""
        if isinstance(self._model, serving.Called):
            end = self.tokenizer.eos_token_id
            return min(self.tokenizer.ends) if end is None else end
        end = self._model.generation_config.eos_token_id
        end = self.tokenizer.eos_token_id if end is None else end
        return int(end[0] if isinstance(end, list) else end)

    @property
    def prefix_token_id(self) -> int:
        """The token before the first one of a text: the start of a text, or else its end."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches tokenised requests."""
        return self._loaded.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's chat template, or None if none is asked for."""
        if not chat_template:
            return None
        name = None if chat_template is True else chat_template
        if isinstance(self.tokenizer, Tokenizer):
            return self.tokenizer.templates.get(name or "default")
        return self.tokenizer.get_chat_template(name)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one prompt. Without a generation prompt its last message goes on."""
        if isinstance(self.tokenizer, Tokenizer):
            return self.tokenizer.render(
                chat_history,
                add_generation_prompt=add_generation_prompt,
                goes_on=not add_generation_prompt,
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, **kwargs: Any) -> list[int]:
        """Token ids, without special tokens around them."""
        return self._loaded.encode(string)

    # --- scoring

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both parts: those of the whole text, cut where the context ends.

        Spaces at the end of the context belong to the continuation.
        """
        bare = context.rstrip()
        context, continuation = bare, context[len(bare) :] + continuation
        if not context:
            return [self.prefix_token_id], self.tok_encode(continuation)
        whole, before = self.tok_encode(context + continuation), self.tok_encode(context)
        return self._begun(whole[: len(before)]), whole[len(before) :]

    def _begun(self, ids: list[int]) -> list[int]:
        """A context with the start of a text, unless a chat template has put it there."""
        return ids if ids[: len(self._start)] == self._start else [*self._start, *ids]

    def _rolling(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Pairs (context, continuation) that predict each token once; the last context is full."""
        size = self.max_length
        if ids:
            yield [self.prefix_token_id], ids[:size]
        for at in range(size, len(ids), size):
            end = min(at + size, len(ids))
            yield ids[end - size - 1 : at], ids[at:end]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether each of its tokens was the likeliest."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        groups: dict[int, list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens does not fit max_length "
                    f"{self.max_length}"
                )
            groups.setdefault(
                _padded(
                    min(len(context) + len(continuation) - 1, self.max_length), self.max_length
                ),
                [],
            ).append(i)
        for length, members in groups.items():
            for at in range(0, len(members), self.batch_size):
                part = members[at : at + self.batch_size]
                ids = np.zeros((self.batch_size, length + 1), np.int32)
                counts = np.zeros((self.batch_size, length), bool)
                for row, i in enumerate(part):
                    whole = (pairs[i][0] + pairs[i][1])[-(self.max_length + 1) :]
                    ids[row, : len(whole)] = whole
                    counts[row, len(whole) - 1 - len(pairs[i][1]) : len(whole) - 1] = True
                scores, greedy = (
                    np.asarray(a) for a in self._score_rows(self._model.params, ids, counts)
                )
                for row, i in enumerate(part):
                    results[i] = float(scores[row]), bool(greedy[row])
        return results

    # --- generating

    def _generation(
        self, context: str, options: dict[str, Any] | None = None
    ) -> tuple[list[int], tuple[str, ...], tuple]:
        """The tokens of the prompt, the stops, and how to write: `_write`'s last argument.

        Raises:
          ValueError: a request asks for something that is not done here.
        """
        options = {k: v for k, v in (options or {}).items() if v is not None}
        stops = options.pop("until", [])
        stops = (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop)
        count = int(options.pop("max_new_tokens", self.max_gen_toks))
        count = min(int(options.pop("max_gen_toks", count)), self.max_length - 1)
        drawn = options.pop("do_sample", None)
        temperature = float(options.pop("temperature", 1.0 if drawn else 0.0))
        sampled = drawn is not False and temperature > 0
        top_k, top_p = int(options.pop("top_k", 0)), float(options.pop("top_p", 1.0))
        if options.get("num_beams") == 1:
            del options["num_beams"]
        if options:
            raise ValueError(f"requests to generate with {options} cannot be honoured")
        ids = self._begun(self.tok_encode(context)) or [self.prefix_token_id]
        room, kept = self.max_length - count, len(self._start)
        if len(ids) > room > kept:  # the end of a long context counts, and its start token
            ids = [*self._start, *ids[len(ids) - (room - kept) :]]
        ids = ids[-room:]
        return ids, stops, (count, *((temperature, top_k, top_p) if sampled else (0.0, 0, 1.0)))

    def _text(self, tokens: list[int], stops: tuple[str, ...]) -> str:
        """The text of new tokens up to the first stop, which may be or hold special tokens."""
        written = self.tokenizer.decode(tokens, skip_special_tokens=False)
        cut = _cut(written, stops)
        if cut == written:
            return self.tokenizer.decode(tokens, skip_special_tokens=True)
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special:
                cut = cut.replace(token.content, "")
        return cut

    def _write(
        self, prompts: list[list[int]], length: int, stops: tuple[str, ...], how: tuple
    ) -> list[str]:
        """The text after each prompt, up to its end or the first stop.

        Args:
          prompts: at most `batch_size` prompts.
          length: the length that prompts of a Flax model are padded to.
          stops: texts that end a text.
          how: the number of tokens to write, temperature, top_k and top_p.
        """
        count, temperature, top_k, top_p = how
        if isinstance(self._model, serving.Called):
            made = self._model.decoder.generate(
                prompts,
                max_new_tokens=count,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop=stops,
                params=self._model.params,
            )
            return [completion.text for completion in made]
        ends = end_tokens(self._model) or {self.eot_token_id}
        if (length, how) not in self._writers:
            options = generation_options(
                self._model, count, ends, temperature=temperature, top_k=top_k, top_p=top_p
            )

            def run(params, ids, mask, key):
                return self._model.generate(
                    ids, attention_mask=mask, params=params, prng_key=key, generation_config=options
                ).sequences[:, length:]

            self._writers[length, how] = jax.jit(run)
        ids = np.full((self.batch_size, length), self.eot_token_id, np.int32)
        mask = np.zeros((self.batch_size, length), np.int32)
        mask[:, -1] = 1  # for rows that only fill up the batch
        # Prompts are padded on the left, because the text goes on at the right end.
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
        new = np.asarray(
            self._writers[length, how](self._model.params, ids, mask, jax.random.PRNGKey(0))
        )[: len(prompts)].tolist()
        rows = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in new]
        return [self._text(row, stops) for row in rows]


def _score_rows(
    model: Any, params: Any, ids: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """For each row, the log-likelihood of the counted tokens, and whether all were ranked first."""
    logits = model(ids[:, :-1], params=params).logits.astype(jnp.float32)
    target = ids[:, 1:, None]
    chosen = jnp.take_along_axis(logits, target, axis=-1)[..., 0] - jax.nn.logsumexp(
        logits, axis=-1
    )
    greedy = jnp.argmax(logits, axis=-1) == target[..., 0]
    return jnp.sum(jnp.where(counts, chosen, 0), axis=-1), jnp.all(greedy | ~counts, axis=-1)


def _padded(length: int, longest: int) -> int:
    """The next power of two, within bounds."""
    return min(max(_SHORTEST, 1 << max(length - 1, 0).bit_length()), longest)


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stops."""
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text

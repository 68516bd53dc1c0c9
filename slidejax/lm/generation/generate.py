"""Many prompts, one batch: `generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Protocol

import jax
import numpy as np

from slidejax.kinds import check_function, shown
from slidejax.lm.generation.placing import fetch, put, start_fetching
from slidejax.lm.generation.programs import BLOCK, Programs, State, bucket
from slidejax.lm.generation.sampling import Sampling, whole
from slidejax.lm.text.stream import TextStream, check_stops
from slidejax.lm.text.tokenizer import Tokenizer
from slidejax.ops.meshes import automatic, beside, on_mesh

__all__ = ["Batch", "Completion", "Writer", "check_writer", "encode_prompt", "generate"]

# Tokens to write before texts are searched for stops.
_WITH_STOPS = 8


class Writer(Protocol):
    """The parts of a model that `generate` needs."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def ends(self) -> Iterable[int]: ...
    @property
    def params(self) -> Any: ...
    @property
    def programs(self) -> Programs: ...


@dataclasses.dataclass(frozen=True)
class Completion:
    """The text that a model wrote after a prompt.

    Attributes:
      text: the text, up to and without the end or the stop; without special tokens. None if the
        model has no tokenizer.
      tokens: the token ids, without the one that ended the text. Where a stop ended it, they go up
        to the token that completed the stop.
      finish: "end" (the model ended its text), "stop", or "length" (`max_new_tokens`).
      prompt_tokens: how many tokens the prompt has.
    """

    text: str | None
    tokens: list[int]
    finish: str
    prompt_tokens: int

    def __str__(self) -> str:
        return "" if self.text is None else self.text


def check_writer(model: Any) -> None:
    """Raises a TypeError if a model is no `Writer`."""
    needed = ("tokenizer", "vocab_size", "context", "ends", "params", "programs")
    lacks = [name for name in needed if not hasattr(type(model), name) and name not in dir(model)]
    if lacks:
        raise TypeError(
            f"model must be a slidejax.lm.Decoder, or have {', '.join(needed)}: "
            f"{type(model).__name__} lacks {', '.join(lacks)}"
        )


# --- prompts --------------------------------------------------------------------------------------


def encode_prompt(
    model: Writer,
    prompt: Any,
    max_new_tokens: int | None,
    name: str,
    limit: str = "max_new_tokens",
) -> list[int]:
    """The token ids of a prompt, checked.

    Args:
      model: the model; its parameters are not read.
      prompt: text or token ids.
      max_new_tokens: how many tokens will be written; None: as many as fit.
      name: what the caller calls the prompt, for errors.
      limit: what the caller calls `max_new_tokens`.

    Raises:
      TypeError: it is neither text nor token ids.
      ValueError: it is empty, leaves the vocabulary, or does not fit the model's context.
    """
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError(f"{name} is text, and the model came without a tokenizer")
        ids = model.tokenizer.encode(prompt) if prompt else []
    else:
        try:
            ids = [whole(i) for i in _sequence(prompt)]
        except TypeError:
            raise TypeError(
                f"{name} must be text or a list of token ids, got {shown(prompt)}"
            ) from None
    if not ids:
        raise ValueError(f"{name} is empty; give some text, or the id of a token to begin with")
    bad = next((i for i in ids if not 0 <= i < model.vocab_size), None)
    if bad is not None:
        raise ValueError(
            f"{name} has token {bad}; the model's tokens are 0 to {model.vocab_size - 1}"
        )
    if len(ids) > model.context:
        raise ValueError(
            f"{name} has {len(ids)} tokens, more than the model's context of {model.context}"
        )
    if max_new_tokens is not None and len(ids) + max_new_tokens > model.context:
        raise ValueError(
            f"{name} has {len(ids)} tokens; with {limit} {max_new_tokens} they exceed the "
            f"model's context of {model.context}"
        )
    return ids


def _sequence(values: Any) -> list[Any]:
    """Values in their order; a TypeError for bytes, mappings and sets.

    Bytes would pass for token ids, and the keys of a mapping, such as a tokenizer's result, for
    texts.
    """
    if isinstance(values, (bytes, bytearray, memoryview, Mapping, Set)):
        raise TypeError
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _listed(prompts: Any) -> tuple[list[Any], bool]:
    """Prompts as a list, and whether there was one alone."""
    if isinstance(prompts, str):
        return [prompts], True
    try:
        given = _sequence(prompts)
    except TypeError:
        raise TypeError(
            f"prompts must be texts or lists of token ids, or one of them, got {prompts!r}"
        ) from None
    if given and all(isinstance(i, (int, np.integer)) for i in given):
        return [given], True
    return given, False


def check_count(max_new_tokens: int | None) -> int | None:
    """The number of tokens to write; None is all that fit.

    Raises:
      ValueError: it is negative or no whole number.
    """
    if max_new_tokens is None:
        return None
    try:
        count = whole(max_new_tokens)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"max_new_tokens must be a whole number from 0, got {max_new_tokens!r}")
    return count


def check_ends(ends: Iterable[int], vocab_size: int) -> frozenset[int]:
    """The tokens that end a text, as the caller of `generate` names them.

    Raises:
      TypeError: they are no token ids.
      ValueError: the model has no such token.
    """
    try:
        found = frozenset(whole(i) for i in ends)
    except TypeError:
        raise TypeError(f"ends must be token ids, got {ends!r}") from None
    bad = next((i for i in sorted(found) if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise ValueError(f"ends has token {bad}; the model's tokens are 0 to {vocab_size - 1}")
    return found


# --- running --------------------------------------------------------------------------------------


class Batch:
    """Prompts that are continued together, block by block.

    Args:
      model: the model.
      prompts: token ids of each prompt, checked.
      counts: how many tokens each is to get, at least one.
      sampling: how tokens are chosen.
      ends: the tokens that end a row.
      params: the parameters; None: the model's own.

    Attributes:
      prompts, counts: as given.
      ends: the token ids that end a row.
    """

    def __init__(
        self,
        model: Writer,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        sampling: Sampling,
        ends: Iterable[int],
        params: Any = None,
    ):
        for leaf in jax.tree.leaves(params):
            if not hasattr(leaf, "dtype"):
                raise TypeError(f"params must be a tree of arrays, got {shown(leaf)} in it")
        self._programs = model.programs
        self._params = automatic(model.params if params is None else params)
        self._place = beside(self._params)
        self.prompts, self.counts, self._kind = prompts, counts, sampling.kind
        # Files may name tokens that the model lacks, and cannot write.
        self.ends = frozenset(i for i in ends if 0 <= i < model.vocab_size)
        some = sorted(self.ends)
        padded = np.array(some + [-1] * (bucket(len(some), 8) - len(some)), np.int32)
        self._settings = put((padded, sampling.draw()), self._place)
        self._context = model.context
        self._state: State | None = None
        self._written = 0
        self._coming: tuple[Any, Any, int] | None = None

    @property
    def left(self) -> int:
        """How many tokens the longest row can still get."""
        return max(self.counts) - self._written

    @property
    def coming(self) -> bool:
        """Whether a call is under way."""
        return self._coming is not None

    def start(self) -> np.ndarray:
        """Reads the prompts; int32 `[rows]`, the first token of each row."""
        rows = bucket(len(self.prompts))
        longest = max(map(len, self.prompts))
        ids = np.zeros((rows, self._programs.prompt_length(longest)), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, prompt in enumerate(self.prompts):
            ids[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        slots = self._programs.cache_length(
            max(len(p) + n for p, n in zip(self.prompts, self.counts, strict=True)),
            self._context,
        )
        live = np.arange(rows) < len(self.prompts)
        arrays = put((ids, lengths, live), self._place)
        with on_mesh(self._params):
            self._state, tokens, bad = self._programs.prefill(
                self._params, *arrays, *self._settings, length=slots, kind=self._kind
            )
        self._check(bad)
        self._written = 1
        return fetch(tokens)[: len(self.prompts)]

    def more(self, live: Sequence[bool], limit: int) -> np.ndarray:
        """Writes up to `limit` tokens; int32 `[rows, tokens]`, -1 where a row has none.

        A program of a fixed number of steps writes as many as it has. Its next call is under way
        before the tokens of this one are read, so that the device does not wait for the host; a
        row that ends by its text has one more call.
        """
        if self._coming is None:
            self._begin(live, limit)
        assert self._coming is not None
        tokens, bad, count = self._coming
        self._coming = None
        if self._programs.steps and self.left:
            self._begin(live, limit)
        self._check(bad)
        return fetch(tokens)[: len(live), :count]

    def _begin(self, live: Sequence[bool], limit: int) -> None:
        """Starts a call, and does not wait for it."""
        state = self._state
        assert state is not None  # start comes first
        limit = min(self._programs.steps or limit, self._programs.block, self.left)
        mask = np.zeros(state.tokens.shape[0], bool)
        mask[: len(live)] = live
        most = np.zeros(mask.shape, np.int32)
        most[: len(live)] = np.clip(np.array(self.counts) - self._written, 0, limit)
        self._state = None  # it is donated
        mask, most = put((mask, most), self._place)
        with on_mesh(self._params):
            self._state, tokens, bad = self._programs.decode(
                self._params, state, mask, *self._settings, most, kind=self._kind
            )
        start_fetching(tokens, bad)
        self._coming = tokens, bad, limit
        self._written += limit

    @staticmethod
    def _check(bad: Any) -> None:
        rows = np.flatnonzero(fetch(bad))
        if rows.size:
            raise ValueError(
                f"the model's logits have nan after prompt {rows[0]}: its weights are damaged, or "
                "its activations overflow"
            )


class Row:
    """The tokens and the text of one prompt so far."""

    def __init__(
        self, tokenizer: Tokenizer | None, stops: Sequence[str], ends: Iterable[int], count: int
    ):
        self._stream = None if tokenizer is None else TextStream(tokenizer, stops)
        self._ends, self._count = ends, count
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.steps = 0  # tokens that were computed, the end included

    def feed(self, tokens: Iterable[int]) -> str:
        """Takes new tokens up to the row's end, and gives the text that is certain now."""
        given = ""
        for token in tokens:
            if self.finish is not None or token < 0:
                break
            self.steps += 1
            if token in self._ends:
                self.finish = "end"
                break
            self.tokens.append(int(token))
            if self._stream is not None:
                given += self._stream.feed([int(token)])
                if self._stream.stopped:
                    self.finish = "stop"
            if self.finish is None and len(self.tokens) == self._count:
                self.finish = "length"
        if self.finish is not None and self._stream is not None:
            given += self._stream.end()
            self._stream = None
        return given


def generate(
    model: Writer,
    prompts: Any,
    *,
    max_new_tokens: int | None = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: str | Iterable[str] | None = None,
    seed: int = 0,
    ends: Iterable[int] | None = None,
    params: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Continues prompts, all in one batch.

    A row does not depend on the others: alone and together it gets the same tokens, but for
    rounding (in float32 the same likeliest tokens). Draws are another matter, because each row of a
    batch draws from its own stream.

    Args:
      model: the model.
      prompts: a list of prompts, of any lengths. A prompt is text, which begins with the start
        token where the model's tokenizer puts one, or a list of token ids, taken as they are. One
        prompt alone may stand in place of the list.
      max_new_tokens: how many tokens to write at most; None: until the context is full.
      temperature, top_k, top_p, seed: how tokens are chosen, see `Sampling`. Only what is given
        here counts; settings in files beside the model do not.
      stop: texts that end the text; they are not part of it. They may span tokens, and may be
        special tokens.
      ends: the tokens that end a text; None: the model's own; empty: none, so that every row gets
        `max_new_tokens`.
      params: other parameters of the same structure; None: the model's own.
      progress: called with the number of tokens written, of the longest row.

    Returns:
      A list of `Completion`s, or one for a single prompt.

    Raises:
      ValueError: an argument is out of range, a prompt is empty, has tokens that the model lacks,
        or does not fit the model's context; or the model computes nan.
      TypeError: a prompt is neither text nor token ids; or an argument is of another type.
    """
    check_writer(model)
    given, alone = _listed(prompts)
    sampling = Sampling(temperature, top_k, top_p, seed)
    stops, count = check_stops(stop), check_count(max_new_tokens)
    named = None if ends is None else check_ends(ends, model.vocab_size)
    check_function(progress, "progress", optional=True)
    if stops and model.tokenizer is None:
        raise ValueError("stop needs a tokenizer, and the model came without one")
    names = ["prompt"] if alone else [f"prompt {i}" for i in range(len(given))]
    ids = [encode_prompt(model, p, count, n) for p, n in zip(given, names, strict=True)]
    counts = [model.context - len(i) if count is None else count for i in ids]
    made = [Completion(None if model.tokenizer is None else "", [], "length", len(i)) for i in ids]
    wanted = [i for i, count in enumerate(counts) if count]
    if wanted:
        batch = Batch(
            model,
            [ids[i] for i in wanted],
            [counts[i] for i in wanted],
            sampling,
            model.ends if named is None else named,
            params,
        )
        for i, completion in zip(wanted, _run(model, batch, stops, progress), strict=True):
            made[i] = completion
    return made[0] if alone else made


def _run(
    model: Writer, batch: Batch, stops: Sequence[str], progress: Callable[[int], None] | None
) -> list[Completion]:
    """Runs a batch to its end."""
    rows = [Row(model.tokenizer, stops, batch.ends, count) for count in batch.counts]
    texts = [row.feed([token]) for row, token in zip(rows, batch.start(), strict=True)]
    while any(row.finish is None for row in rows):
        if progress is not None:
            progress(max(row.steps for row in rows))
        new = batch.more([row.finish is None for row in rows], _WITH_STOPS if stops else BLOCK)
        for i, row in enumerate(rows):
            texts[i] += row.feed(new[i])
    return [
        Completion(
            None if model.tokenizer is None else text, row.tokens, str(row.finish), len(prompt)
        )
        for row, text, prompt in zip(rows, texts, batch.prompts, strict=True)
    ]

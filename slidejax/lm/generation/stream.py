"""One prompt, piece by piece: `Stream`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from slidejax.lm.generation.generate import (
    Batch,
    Row,
    Writer,
    check_count,
    check_writer,
    encode_prompt,
)
from slidejax.lm.generation.programs import BLOCK
from slidejax.lm.generation.sampling import Sampling
from slidejax.lm.text.stream import check_stops

__all__ = ["Stream"]

# A call writes about as many tokens as take this many seconds: text appears smoothly, and the time
# between calls does not count.
_SECONDS = 0.05


class Stream(Iterator[str]):
    """The pieces of text that a model writes after a prompt, as they become certain.

    The pieces joined are the text that `generate` gives. A piece has whole characters only, and
    nothing of a stop. The prompt is checked at once; the model runs when the first piece is asked
    for.

    Args:
      model: the model, with a tokenizer.
      prompt: text or token ids.
      max_new_tokens, temperature, top_k, top_p, stop, seed, params: as for `generate`.

    Attributes:
      tokens: the token ids so far, without the one that ended the text.
      finish: why the text ended, as in `Completion`; None until then.
      prompt_tokens: how many tokens the prompt has.
      first_seconds: from the request for the first piece to the first token, compiling included;
        None until then.
      steps: how many tokens were computed.
      tokens_per_second: the speed after the first token, without the call that may compile; None
        where there was no further call.

    Raises:
      ValueError, TypeError: as `generate`; and there is no tokenizer.
    """

    def __init__(
        self,
        model: Writer,
        prompt: Any,
        *,
        max_new_tokens: int | None = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: str | Iterable[str] | None = None,
        seed: int = 0,
        params: Any = None,
    ):
        check_writer(model)
        sampling = Sampling(temperature, top_k, top_p, seed)
        stops, count = check_stops(stop), check_count(max_new_tokens)
        if model.tokenizer is None:
            raise ValueError("stream gives text, and the model came without a tokenizer")
        ids = encode_prompt(model, prompt, count, "prompt")
        count = model.context - len(ids) if count is None else count
        self.prompt_tokens = len(ids)
        self.first_seconds: float | None = None
        self.tokens_per_second: float | None = None
        self._row: Row | None = None
        self._pieces: Iterator[str] = iter(())
        if count:
            batch = Batch(model, [ids], [count], sampling, model.ends, params)
            self._row = Row(model.tokenizer, stops, batch.ends, count)
            self._pieces = self._run(batch, self._row)

    @property
    def tokens(self) -> list[int]:
        return [] if self._row is None else self._row.tokens

    @property
    def steps(self) -> int:
        return 0 if self._row is None else self._row.steps

    @property
    def finish(self) -> str | None:
        return "length" if self._row is None else self._row.finish

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, batch: Batch, row: Row) -> Iterator[str]:
        begin = time.perf_counter()
        piece = row.feed(batch.start())
        self.first_seconds = time.perf_counter() - begin
        if piece:
            yield piece
        limit, timed, seconds = 1, 0, 0.0
        while row.finish is None:
            # A call that is under way goes on while the reader has a piece, so that time counts.
            begin = begin if batch.coming else time.perf_counter()
            before = row.steps
            piece = row.feed(batch.more([True], limit)[0])
            end = time.perf_counter()
            took, new = end - begin, row.steps - before
            begin = end
            if before > 1:  # the first call may have compiled
                timed, seconds = timed + new, seconds + took
                self.tokens_per_second = timed / seconds
            limit = max(1, min(int(_SECONDS * new / took), 2 * limit, BLOCK))
            if piece:
                yield piece

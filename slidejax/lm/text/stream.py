"""Text as tokens come: whole characters only, and nothing of a stop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slidejax.lm.text.pieces import Utf8
from slidejax.lm.text.tokenizer import Tokenizer, check_text

__all__ = ["TextStream", "check_stops"]


def check_stops(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple.

    Raises:
      TypeError: a stop is not text.
      ValueError: a stop is empty.

    >>> check_stops(None), check_stops("end")
    ((), ('end',))
    """
    try:
        stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    except TypeError:
        raise TypeError(f"stop must be text or a list of texts, got {stop!r}") from None
    for text in stops:
        if not isinstance(text, str):
            raise TypeError(f"stop must be text or a list of texts, got {text!r}")
        if not text:
            raise ValueError("stop must not be empty: every text holds the empty one")
        check_text(text, "stop")
    return stops


class TextStream:
    """Takes tokens and gives the text that is certain.

    A character is given when all of its bytes are there. What could be the beginning of a stop is
    held back until it is known not to be one. Stops are looked for in the text with special tokens
    in it, and the text that is given has none. The stop that is complete first counts; of several
    that are complete at once it is the longest.

    Args:
      tokenizer: what the tokens mean.
      stops: texts that end the stream; they are not given.

    Attributes:
      stopped: whether a stop has come. Nothing is given after it.

    >>> from slidejax.lm.text.examples import byte_tokenizer
    >>> stream = TextStream(byte_tokenizer(), ["end"])
    >>> [stream.feed([byte]) for byte in b"an e"], stream.feed(b"nd."), stream.stopped
    (['a', 'n', ' ', ''], '', True)
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._utf8 = Utf8()
        self._held = ""  # with special tokens
        self._shown: list[bool] = []  # which characters of it are given
        self.stopped = False

    def feed(self, tokens: Iterable[int]) -> str:
        """The text that is certain after these tokens and was not before."""
        return "".join(self._token(token) for token in tokens)

    def end(self) -> str:
        """The rest, when no more tokens come."""
        if self.stopped:
            return ""
        return self._add(self._utf8.end(), True) + self._release(len(self._held))

    def _token(self, token: int) -> str:
        if self.stopped:
            return ""
        data = self._tokenizer.token_bytes(token)
        if not self._tokenizer.is_special(token):
            return self._add(self._utf8.feed(data), True)
        before = self._add(self._utf8.end(), True)
        return before + self._add(data.decode("utf-8", errors="replace"), False)

    def _add(self, text: str, shown: bool) -> str:
        """Takes in some text, character by character, and gives what is certain."""
        if not self._stops or self.stopped:
            return "" if self.stopped or not shown else text
        given = ""
        for character in text:
            self._held += character
            self._shown.append(shown)
            ended = [stop for stop in self._stops if self._held.endswith(stop)]
            if ended:
                given += self._release(len(self._held) - max(map(len, ended)))
                self._held, self._shown, self.stopped = "", [], True
                break
            given += self._release(len(self._held) - self._begun())
        return given

    def _begun(self) -> int:
        """How many of the last characters could be the beginning of a stop."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0

    def _release(self, count: int) -> str:
        """Gives the first characters that are held."""
        given = "".join(
            c for c, shown in zip(self._held[:count], self._shown, strict=False) if shown
        )
        self._held, self._shown = self._held[count:], self._shown[count:]
        return given

"""The bytes of tokens, and text out of them, whole or token by token.

A tokenizer's own decoder sees all tokens at once. A stream sees them one by one, and a token may
end in the middle of a character. So the decoder of tokenizer.json is read here as what it is: a
rule that gives each token its bytes. Then a stream and the whole text are the same by construction.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Pieces", "Utf8", "byte_characters"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def byte_characters() -> dict[str, int]:
    """The byte for which each character stands in a byte-level vocabulary (GPT-2's table).

    Printable characters of Latin-1 stand for themselves. The other bytes take the characters from
    U+0100 on, in order.

    >>> byte_characters()["A"], byte_characters()["Ġ"], len(byte_characters())
    (65, 32, 256)
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class Pieces:
    """The bytes of each token, by the decoder that a tokenizer.json names.

    Args:
      decoder: the value of "decoder" in tokenizer.json.
      where: what to call the file in errors.

    Attributes:
      strips: whether a whole text loses one space at its beginning, which the tokenizer had put
        there.

    Raises:
      NotImplementedError: the decoder does more than give each token its bytes.

    >>> Pieces({"type": "ByteLevel"}).of("Ġmoon")
    b' moon'
    >>> Pieces({"type": "Sequence", "decoders": [
    ...     {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    ...     {"type": "ByteFallback"}, {"type": "Fuse"}]}).of("<0xC3>")
    b'\\xc3'
    """

    def __init__(self, decoder: Mapping[str, Any] | None, where: str = "tokenizer.json"):
        self.strips = False
        self._where = where
        self._byte_level = self._byte_tokens = False
        self._replaced: list[tuple[str, str]] = []
        if decoder is None:
            raise NotImplementedError(
                f"{where} has no decoder: tokens cannot be put together as text"
            )
        self._read(decoder)

    def _read(self, decoder: Mapping[str, Any]) -> None:
        """Takes in one decoder, or one after the other of a sequence."""
        kind = decoder.get("type")
        if kind == "Sequence":
            for part in decoder.get("decoders") or ():
                self._read(part)
        elif kind == "ByteLevel":
            self._byte_level = True
        elif kind == "ByteFallback":
            self._byte_tokens = True
        elif kind == "Replace" and "String" in (decoder.get("pattern") or {}):
            self._replaced.append((decoder["pattern"]["String"], decoder.get("content", "")))
        elif kind == "Metaspace":
            self._replaced.append((decoder.get("replacement", "▁"), " "))
            before = "always" if decoder.get("add_prefix_space", True) else "never"
            self.strips = decoder.get("prepend_scheme", before) != "never"
        elif kind == "Strip" and (decoder.get("content"), decoder.get("stop")) == (" ", 0):
            if decoder.get("start") not in (0, 1):
                raise self._refusal(decoder)
            self.strips = decoder["start"] == 1
        elif kind != "Fuse":
            raise self._refusal(decoder)

    def _refusal(self, decoder: Mapping[str, Any]) -> NotImplementedError:
        return NotImplementedError(
            f"{self._where} decodes with {dict(decoder)!r}; ByteLevel, ByteFallback, Replace, "
            "Metaspace, Fuse and the Strip of one leading space are known"
        )

    def of(self, token: str) -> bytes:
        """The bytes of a token of the model's vocabulary; added tokens are their own text."""
        if self._byte_level:
            table = byte_characters()
            if all(c in table for c in token):
                return bytes(table[c] for c in token)
        if self._byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self._replaced:
            token = token.replace(old, new)
        return token.encode("utf-8", errors="replace")


class Utf8:
    """Bytes to text, as they come. What is no UTF-8 becomes U+FFFD, as in the whole text.

    >>> stream = Utf8()
    >>> stream.feed(b"a\\xc3"), stream.feed(b"\\xa9"), stream.feed(b"\\xe2\\x82"), stream.end()
    ('a', 'é', '', '�')
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """The characters that are complete with these bytes."""
        return self._decoder.decode(data)

    def end(self) -> str:
        """The last text: U+FFFD for a character that was never completed, else nothing."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def joined(pieces: Iterable[tuple[bytes, bool]]) -> Iterable[tuple[str, bool]]:
    """Text of `(bytes, special)` pairs. A special token ends the character before it."""
    stream = Utf8()
    for data, special in pieces:
        if special:
            yield stream.end(), False
            yield data.decode("utf-8", errors="replace"), True
        else:
            yield stream.feed(data), False
    yield stream.end(), False

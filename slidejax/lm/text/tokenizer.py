"""`Tokenizer`: text to token ids and back, with the package `tokenizers` alone.

`slidejax.lm.text.files` reads one from a Hugging Face directory and `slidejax.lm.text.gguf` from
a GGUF file. No code of a model directory runs, and nothing is downloaded.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidejax.files import replacing
from slidejax.kinds import check_kind, shown
from slidejax.lm.text import chat
from slidejax.lm.text.pieces import Pieces, joined

if TYPE_CHECKING:
    import tokenizers

__all__ = ["SPECIAL", "Tokenizer", "check_text", "need_tokenizers"]

# The special tokens that have a name in tokenizer_config.json.
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def need_tokenizers() -> Any:
    """The package `tokenizers`; ImportError says how to get it."""
    try:
        import tokenizers
    except ImportError as e:
        raise ImportError("tokenizers need the extra: pip install 'slidejax[lm]'") from e
    return tokenizers


def check_text(text: str, name: str) -> None:
    """Raises a ValueError for half of a surrogate pair, which no UTF-8 has."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{name} has half of a surrogate pair at {e.start}, {text[e.start]!r}: it is no "
            "Unicode text"
        ) from None


def _decoder(backend: tokenizers.Tokenizer) -> Any:
    """The description of a tokenizer's decoder, or None; the vocabulary is not written for it."""
    return None if backend.decoder is None else json.loads(backend.decoder.__getstate__())


class Tokenizer:
    """Text to token ids and back.

    Args:
      backend: a `tokenizers.Tokenizer`.
      start: the token ids that begin every text in use, such as `(bos,)`; empty for none.
      ends: the token ids that end a text, any of them.
      named: the text of special tokens by name, such as `{"eos_token": "</s>"}`.
      templates: chat templates by name; the one in use is "default".
      where: what to call the file in errors.

    Raises:
      TypeError: the backend is of another kind.
      ValueError: a named token is not in the vocabulary.
      NotImplementedError: the decoder of the tokenizer is not known.

    >>> from slidejax.lm.text.examples import byte_tokenizer
    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.encode("hé"), tokenizer.encode("hé", start=False)
    ([256, 104, 195, 169], [104, 195, 169])
    >>> tokenizer.decode([104, 195, 169, 257]), tokenizer.decode([104, 257], special=True)
    ('hé', 'h</s>')
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        start: Sequence[int] = (),
        ends: Iterable[int] = (),
        named: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
        where: str = "the tokenizer",
    ):
        if not hasattr(backend, "no_truncation"):
            raise TypeError(f"backend must be a tokenizers.Tokenizer, got {shown(backend)}")
        # A file may ask for both, which would cut a text or add to it without a word.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.start = tuple(int(i) for i in start)
        self.ends = frozenset(int(i) for i in ends)
        self.named = dict(named or {})
        self.templates = dict(templates or {})
        self._where = where
        for name, token in self.named.items():
            if backend.token_to_id(token) is None:
                raise ValueError(f"{where}: {name} {token!r} is not in the vocabulary")
        self._pieces = Pieces(_decoder(backend), where)
        self._added = backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in self._added.items() if token.special)
        self._bytes: dict[int, bytes] = {}

    # --- tokens

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, whether or not it is put there in use."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end of a text; `ends` has all tokens that end one."""
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The token that pads."""
        return self._id("pad_token")

    def _id(self, name: str) -> int | None:
        return None if name not in self.named else self.backend.token_to_id(self.named[name])

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text in the vocabulary, or None."""
        return self.backend.token_to_id(token)

    def is_special(self, token: int) -> bool:
        """Whether a token is no text, such as the end of a text."""
        return token in self._special

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token's text; none for an id that the vocabulary lacks."""
        if token not in self._bytes:
            added = self._added.get(token)
            name = self.backend.id_to_token(token) if added is None else added.content
            if added is not None:
                self._bytes[token] = added.content.encode()
            else:
                self._bytes[token] = b"" if name is None else self._pieces.of(name)
        return self._bytes[token]

    # --- text

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Token ids of a text. Special tokens that the text names are taken for such.

        Args:
          text: the text.
          start: begin with the start of a text where the model does in use. What a tokenizer puts
            after a text is left out, since the text may go on.

        Raises:
          TypeError: it is no text.
          ValueError: it has half of a surrogate pair.
        """
        check_text(check_kind(text, str, "text", "a text"), "the text")
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [*self.start, *ids] if start else ids

    def decode(self, ids: Iterable[int], *, special: bool = False, continues: bool = False) -> str:
        """The text of token ids.

        Args:
          ids: token ids. Bytes that are no UTF-8 become U+FFFD.
          special: show special tokens.
          continues: the text goes on after another one. So a leading space is the text's own, and
            not one that the tokenizer puts before every text.

        Raises:
          TypeError, ValueError: one of them is no token id.
        """
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError:
            raise TypeError(f"ids must be token ids, got {shown(ids)}") from None
        if any(not 0 <= i < 2**32 for i in ids):
            raise ValueError(f"ids must be token ids, from 0 on, got {shown(ids)}")
        pairs = [(self.token_bytes(i), self.is_special(i)) for i in ids]
        text = "".join(part for part, hidden in joined(pairs) if special or not hidden)
        strips = self._pieces.strips and not continues
        return text[1:] if strips and text.startswith(" ") else text

    # --- conversations

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        goes_on: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as one prompt, by the model's chat template.

        Args:
          messages: such as `[{"role": "user", "content": "Hello"}]`.
          add_generation_prompt: end where the model's next answer begins.
          goes_on: end where the text of the last message ends, so that the model goes on with it.
          template: the name of one of several templates; None is "default".
          **variables: more names for the template, such as `tools`.

        Raises:
          ValueError: there is no such template, or it refuses the messages.
          ImportError: jinja2 is not installed.
        """
        name = template or "default"
        if not self.templates:
            raise ValueError("the model has no chat template: give it a prompt as text")
        if name not in self.templates:
            there = ", ".join(sorted(self.templates))
            raise ValueError(f"the model has no chat template {name!r}; there is {there}")
        text = chat.render(
            self.templates[name],
            messages,
            add_generation_prompt=add_generation_prompt and not goes_on,
            **{**self.named, **variables},
        )
        if not goes_on:
            return text
        last = str(messages[-1].get("content", "")).strip()
        before, found, _ = text.rpartition(last)
        if not last or not found:
            raise ValueError(
                f"{self._where}: the chat template does not show the last message as it is, so it "
                "cannot go on"
            )
        return before + found

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of `render`; the template itself writes the start of a text.

        Raises:
          ValueError: as `render`; or the template writes nothing for these messages. An empty list
            of ids would be no prompt at all.
        """
        ids = self.encode(self.render(messages, **options), start=False)
        if not ids:
            raise ValueError(f"the chat template writes nothing for these {len(messages)} messages")
        return ids

    # --- files

    def files(self) -> dict[str, bytes]:
        """Contents of tokenizer.json, tokenizer_config.json and generation_config.json.

        transformers reads them, and so does `slidejax.lm.text.files`. The last one only says which
        tokens end a text.
        """
        # Names of templates are data: no file is named after one.
        template: Any = self.templates.get("default")
        if set(self.templates) - {"default"}:
            template = [{"name": n, "template": t} for n, t in sorted(self.templates.items())]
        about: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.named,
        }
        if self.start in ((), (self.bos_token_id,)):
            about["add_bos_token"] = bool(self.start)
        if template is not None:
            about["chat_template"] = template
        ends = {"eos_token_id": sorted(self.ends)}
        return {
            "tokenizer.json": self.backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(about, indent=1).encode(),
            "generation_config.json": json.dumps(ends).encode(),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `files` to a directory, which is made if it is missing."""
        for name, content in self.files().items():
            with replacing(Path(folder) / name) as file:
                file.write(content)

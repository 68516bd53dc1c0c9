"""Builds a tokenizer from the metadata of a GGUF file.

The keys are `tokenizer.ggml.*` (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Two
kinds are known. "gpt2" is a byte-level BPE: the file has its merges, and the name of its
pre-tokenizer stands for a regular expression. "llama" is a BPE of SentencePiece (arXiv 1808.06226):
the file has a score for each token, and the two neighbours whose union has the best score are
merged first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slidejax.checkpoint.gguf_tokenizer import check_tokenizer
from slidejax.checkpoint.staging import GGUF_TOKENIZER
from slidejax.lm.text.tokenizer import Tokenizer, need_tokenizers

if TYPE_CHECKING:
    import tokenizers

__all__ = ["FILE", "from_metadata"]

# A model that came from a GGUF file keeps the metadata of its tokenizer under this name, as JSON.
FILE = GGUF_TOKENIZER

# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The meaning of a pre-tokenizer's name: the regular expression that cuts a text into words (None is
# GPT-2's own, "digits" splits digits one by one before that), and whether a text begins with its
# start token unless a key says otherwise.
_PRE_TOKENIZERS: dict[str, tuple[str | None, bool]] = {
    "default": (None, False),
    "gpt-2": (None, False),
    "smollm": ("digits", False),
    "llama-bpe": (_WORDS % r"\p{N}{1,3}", True),
    "llama3": (_WORDS % r"\p{N}{1,3}", True),
    "llama-v3": (_WORDS % r"\p{N}{1,3}", True),
    "qwen2": (_WORDS % r"\p{N}", False),
    "deepseek-r1-qwen": (_WORDS % r"\p{N}", False),
    "tekken": (_TEKKEN, True),
}

# These take a word that is a token as it is, without looking at the merges.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")

# Control tokens with these names end an answer, whatever the keys say. Many files name only one.
_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>")


def from_metadata(metadata: Mapping[str, Any], where: str = "the GGUF file") -> Tokenizer:
    """The tokenizer that a GGUF file describes.

    Args:
      metadata: keys and values of the file.
      where: what to call the file in errors.

    Raises:
      ValueError: a key is missing or does not fit the others.
      NotImplementedError: the tokenizer is of another kind, which is named.

    >>> from_metadata({
    ...     "tokenizer.ggml.model": "llama",
    ...     "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"],
    ...     "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -4.0, -5.0, -6.0, -1.0, -2.0],
    ...     "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
    ...     "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    ... }).encode("ab ab")
    [1, 7, 7]
    """
    check_tokenizer(metadata, where)
    reader = _Reader(metadata, where)
    kind = reader.require("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, start = _byte_level(reader)
    elif kind == "llama":
        backend, start = _sentence_piece(reader), True
    else:
        raise NotImplementedError(
            f"{where} has a tokenizer of kind {kind!r}; 'gpt2' and 'llama' can be built"
        )
    _add_tokens(backend, reader)
    named = reader.named()
    begins = metadata.get("tokenizer.ggml.add_bos_token")
    begins = start and "bos_token" in named if begins is None else bool(begins)
    if begins and "bos_token" not in named:
        raise ValueError(f"{where} has add_bos_token and no tokenizer.ggml.bos_token_id")
    first = [backend.token_to_id(named["bos_token"])] if begins else []
    if begins:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(
            single=[named["bos_token"], "$A"],
            pair=[named["bos_token"], "$A", "$B"],
            special_tokens=[(named["bos_token"], first[0])],
        )
    return Tokenizer(
        backend,
        start=first,
        ends=reader.ends(),
        named=named,
        templates=reader.templates(),
        where=where,
    )


class _Reader:
    """The metadata, with errors that name the file."""

    def __init__(self, metadata: Mapping[str, Any], where: str):
        self.metadata, self.where = metadata, where
        self.tokens: Sequence[str] = self.require("tokenizer.ggml.tokens")
        self.types = self._list("tokenizer.ggml.token_type", _NORMAL)

    def require(self, key: str) -> Any:
        if self.metadata.get(key) is None:
            raise ValueError(f"{self.where} has no key {key!r}")
        return self.metadata[key]

    def _list(self, key: str, default: Any) -> Sequence[Any]:
        values = self.metadata.get(key)
        return [default] * len(self.tokens) if values is None else values

    def scores(self) -> Sequence[float]:
        self.require("tokenizer.ggml.scores")
        return self._list("tokenizer.ggml.scores", 0.0)

    def of_type(self, *kinds: int) -> list[str]:
        return [t for t, kind in zip(self.tokens, self.types, strict=True) if kind in kinds]

    def _token(self, key: str) -> str | None:
        """The text of the token whose id a key has."""
        i = self.metadata.get(key)
        return None if i is None else self.tokens[i]

    def named(self) -> dict[str, str]:
        """The named special tokens."""
        keys = {
            "bos_token": "bos",
            "eos_token": "eos",
            "unk_token": "unknown",
            "pad_token": "padding",
        }
        found = {name: self._token(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
        return {name: token for name, token in found.items() if token is not None}

    def ends(self) -> set[int]:
        """The tokens that end a text or an answer."""
        keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        found = {int(self.metadata[key]) for key in keys if self._token(key) is not None}
        pairs = zip(self.tokens, self.types, strict=True)
        return found | {i for i, (t, kind) in enumerate(pairs) if kind == _CONTROL and t in _ENDS}

    def templates(self) -> dict[str, str]:
        """Chat templates by name; further ones have their names at the end of their keys."""
        prefix = "tokenizer.chat_template."
        names = {"tokenizer.chat_template": "default"} | {
            f"{prefix}{name}": name for name in self.metadata.get("tokenizer.chat_templates") or ()
        }
        found = {name: self.metadata.get(key) for key, name in names.items()}
        return {name: text for name, text in found.items() if text is not None}


def _byte_level(reader: _Reader) -> tuple[tokenizers.Tokenizer, bool]:
    """A byte-level BPE, and whether its texts begin with the start token."""
    package = need_tokenizers()
    name = reader.metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise NotImplementedError(
            f"{reader.where} has the pre-tokenizer {name!r}; known are {', '.join(_PRE_TOKENIZERS)}"
        )
    words, start = _PRE_TOKENIZERS[name]
    merges = [tuple(m.split(" ", 1)) for m in reader.require("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(reader.tokens)}
    try:
        model = package.models.BPE(
            vocab=vocabulary, merges=merges, ignore_merges=name in _WHOLE_WORDS
        )
    except Exception as e:  # it has no exceptions of its own
        raise ValueError(
            f"{reader.where}: 'tokenizer.ggml.merges' do not fit 'tokenizer.ggml.tokens': {e}"
        ) from e
    backend = package.Tokenizer(model)
    pre = package.pre_tokenizers
    if words is None:
        backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    else:
        first = (
            pre.Digits(individual_digits=True)
            if words == "digits"
            else pre.Split(package.Regex(words), behavior="isolated")
        )
        byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=words == "digits")
        backend.pre_tokenizer = pre.Sequence([first, byte_level])
    if name in ("qwen2", "deepseek-r1-qwen"):
        backend.normalizer = package.normalizers.NFC()
    backend.decoder = package.decoders.ByteLevel()
    return backend, start


def _sentence_piece(reader: _Reader) -> tokenizers.Tokenizer:
    """A BPE of SentencePiece, with bytes for what the vocabulary lacks."""
    package = need_tokenizers()
    vocabulary = {token: i for i, token in enumerate(reader.tokens)}
    unknown = reader.of_type(_UNKNOWN)
    model = package.models.BPE(
        vocab=vocabulary,
        merges=_merges(reader),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=bool(reader.of_type(_BYTE)),
    )
    backend = package.Tokenizer(model)
    # A text and what follows a special token begin with a space, which is written "▁".
    prefixed = reader.metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = package.normalizers.Replace(" ", "▁")
    backend.normalizer = (
        package.normalizers.Sequence([package.normalizers.Prepend("▁"), replace])
        if prefixed
        else replace
    )
    parts = [
        package.decoders.Replace("▁", " "),
        package.decoders.ByteFallback(),
        package.decoders.Fuse(),
    ]
    if prefixed:
        parts.append(package.decoders.Strip(" ", 1, 0))
    backend.decoder = package.decoders.Sequence(parts)
    return backend


def _merges(reader: _Reader) -> list[tuple[str, str]]:
    """The merges that scores stand for, the best first."""
    scores = dict(zip(reader.tokens, reader.scores(), strict=True))
    mergeable = set(reader.of_type(_NORMAL, _USER_DEFINED))
    found = []
    for order, token in enumerate(reader.tokens):
        if token not in mergeable:
            continue
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        parts = [pair for pair in splits if pair[0] in mergeable and pair[1] in mergeable]
        found += [(-scores[token], order, len(left), left, right) for left, right in parts]
    return [(left, right) for *_, left, right in sorted(found)]


def _add_tokens(backend: tokenizers.Tokenizer, reader: _Reader) -> None:
    """Control and user-defined tokens are matched whole, before any merge."""
    from tokenizers import AddedToken

    control = reader.of_type(_CONTROL, _UNKNOWN)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    defined = reader.of_type(_USER_DEFINED)
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in defined])

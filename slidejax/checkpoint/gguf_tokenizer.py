"""Checks the metadata of a GGUF file's tokenizer: their types, and whether they fit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["check_tokenizer"]

_PREFIX = "tokenizer.ggml."
_TOKENS, _MERGES = f"{_PREFIX}tokens", f"{_PREFIX}merges"

# The test of a key's value, and the same in words. Keys that are not here are not read.
_TEXT = ("a text", lambda value: isinstance(value, str))
_TRUTH = ("true or false", lambda value: type(value) is bool)
_TEXTS = ("a list of texts", lambda value: _all(value, lambda one: isinstance(one, str)))
_INTEGERS = ("a list of integers", lambda value: _all(value, lambda one: type(one) is int))
_SCORES = ("a list of numbers", lambda value: _all(value, lambda one: _is_number(one)))
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "tokenizer.chat_template": _TEXT,
    "tokenizer.chat_templates": _TEXTS,
    f"{_PREFIX}model": _TEXT,
    f"{_PREFIX}pre": _TEXT,
    f"{_PREFIX}add_bos_token": _TRUTH,
    f"{_PREFIX}add_space_prefix": _TRUTH,
    _TOKENS: _TEXTS,
    _MERGES: _TEXTS,
    f"{_PREFIX}token_type": _INTEGERS,
    f"{_PREFIX}scores": _SCORES,
}
# Lists with an entry for each token, and ids of tokens.
_EACH = (f"{_PREFIX}token_type", f"{_PREFIX}scores")
_IDS = tuple(
    f"{_PREFIX}{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
)


def _all(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value == value  # not nan


def check_tokenizer(values: Mapping[str, Any], where: str) -> None:
    """Raises a ValueError if a key of a tokenizer has a wrong type or contradicts another one.

    Args:
      values: the metadata; other keys may be among them. A missing key is no error here.
      where: what to call the file.

    >>> check_tokenizer({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.eos_token_id": 0}, "x")
    >>> check_tokenizer({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.eos_token_id": 7}, "x")
    Traceback (most recent call last):
    ValueError: x: 'tokenizer.ggml.eos_token_id' must be in 0..0 for 1 tokens, got 7
    """
    for key, (wanted, is_right) in _KINDS.items():
        value = values.get(key)
        if value is not None and not is_right(value):
            raise ValueError(f"{where}: {key!r} must be {wanted}, got {value!r:.80}")
    tokens = values.get(_TOKENS)
    if tokens is None:
        return
    counts = Counter(token for token in tokens if token)  # files fill up with tokens without a text
    twice = next((token for token, count in counts.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: {_TOKENS!r} has {twice!r:.80} twice")
    if values.get(f"{_PREFIX}model") == "gpt2":
        _check_merges(values.get(_MERGES) or (), frozenset(tokens), where)
    for key in _EACH:
        if values.get(key) is not None and len(values[key]) != len(tokens):
            raise ValueError(
                f"{where}: {key!r} has {len(values[key])} entries for {len(tokens)} tokens"
            )
    for key in _IDS:
        token = values.get(key)
        if token is not None and (type(token) is not int or not 0 <= token < len(tokens)):
            raise ValueError(
                f"{where}: {key!r} must be in 0..{len(tokens) - 1} for {len(tokens)} tokens, got "
                f"{token!r:.80}"
            )


def _check_merges(merges: Iterable[str], tokens: frozenset[str], where: str) -> None:
    """Raises a ValueError for a merge that is no pair of tokens which make another one."""
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not left or not right or not tokens.issuperset((left, right, left + right)):
            raise ValueError(
                f"{where}: {_MERGES!r} must be pairs of tokens that make another one, got "
                f"{merge!r:.80}"
            )

"""Small tokenizers for doctests and tests; nothing is read or downloaded."""

from __future__ import annotations

from slidejax.lm.text.pieces import byte_characters
from slidejax.lm.text.tokenizer import Tokenizer, need_tokenizers

__all__ = ["byte_tokenizer"]


def byte_tokenizer(*special: str, ends: tuple[str, ...] = ("</s>",)) -> Tokenizer:
    """One token for each byte, whose id is the byte, then `<s>`, `</s>` and further special ones.

    Args:
      *special: further special tokens, with ids from 258 on.
      ends: the special tokens that end a text.

    >>> byte_tokenizer("<|im_end|>").token_id("<|im_end|>")
    258
    """
    tokenizers = need_tokenizers()
    model = tokenizers.models.BPE(vocab=byte_characters(), merges=[])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    names = ("<s>", "</s>", *special)
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
    return Tokenizer(
        backend,
        start=(256,),
        ends=[backend.token_to_id(end) for end in ends],
        named={"bos_token": "<s>", "eos_token": "</s>"},
    )

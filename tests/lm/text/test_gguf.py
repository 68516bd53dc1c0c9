"""Tokenizers out of GGUF metadata: merges by scores, words by names, starts and ends."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_examples import sentence_piece

from slidejax.lm.text.gguf import from_metadata
from slidejax.lm.text.pieces import byte_characters

PIECES = ["▁", "a", "b", "c", "ab", "bc", "▁a", "abc", "aa", "▁ab", "aab", "cb", "▁▁", "▁▁▁"]


def metadata(pieces, scores, **more):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(scores),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }


def by_definition(text, scores):
    """SentencePiece's BPE: the neighbours whose union has the best score are merged, leftmost."""
    symbols = list(("▁" + text).replace(" ", "▁"))
    while True:
        pairs = [
            (scores[left + right], -i)
            for i, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in scores
        ]
        if not pairs:
            break
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    found = []
    for symbol in symbols:
        found += [symbol] if symbol in scores else [f"<0x{b:02X}>" for b in symbol.encode()]
    return found


@given(st.permutations(range(len(PIECES))), st.text(st.sampled_from("abc é"), max_size=14))
def test_merges_follow_the_scores(order, text):
    scores = {piece: -float(rank) for piece, rank in zip(PIECES, order, strict=True)}
    tokenizer = from_metadata(metadata(PIECES, scores.values()))
    ids = tokenizer.encode(text, start=False)
    got = [tokenizer.backend.id_to_token(i) for i in ids]
    # An empty text stays empty: there is nothing that a space could stand before.
    assert got == (by_definition(text, scores) if text else [])


def test_starts_by_the_key_or_else_by_the_kind():
    assert sentence_piece().encode("a")[0] == 1
    assert sentence_piece(**{"tokenizer.ggml.add_bos_token": False}).start == ()
    assert byte_level("gpt-2").start == () and byte_level("qwen2").start == ()
    assert byte_level("llama-bpe").start == (256,) and byte_level("tekken").start == (256,)
    assert byte_level("gpt-2", **{"tokenizer.ggml.add_bos_token": True}).start == (256,)
    with pytest.raises(ValueError, match="add_bos_token"):
        byte_level("gpt-2", bos=None, **{"tokenizer.ggml.add_bos_token": True})


def test_user_defined_tokens_are_matched_whole_and_are_text():
    tokenizer = sentence_piece()
    ids = tokenizer.encode("a<user>b", start=False)
    assert 3 in ids and tokenizer.decode(ids).replace(" ", "") == "a<user>b"
    assert not tokenizer.is_special(3) and tokenizer.is_special(2)


def byte_level(pre, bos=256, **more):
    special = ["<s>", "<|im_end|>", "<|eot|>", "<|endoftext|>"]
    tokens = [*sorted(byte_characters(), key=byte_characters().get), *special]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 4,
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": 256,
        **({} if pre is None else {"tokenizer.ggml.pre": pre}),
    }
    return from_metadata({**keys, **more})


def words(pre, text):
    found = byte_level(pre).backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[a:b] for _, (a, b) in found]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["It", "'s", " IT", "'", "S", " 12345", "!?", " ", " x", "\n", "\n", "y"]),
        (None, ["It", "'s", " IT", "'", "S", " 12345", "!?", " ", " x", "\n", "\n", "y"]),
        ("smollm", ["It", "'s", " IT", "'", "S", " ", *"12345", "!?", " ", " x", "\n", "\n", "y"]),
        ("llama-bpe", ["It", "'s", " IT", "'S", " ", "123", "45", "!?", " ", " x", "\n\n", "y"]),
        ("qwen2", ["It", "'s", " IT", "'S", " ", *"12345", "!?", " ", " x", "\n\n", "y"]),
        ("tekken", ["It", "'s", " IT", "'S", " ", *"12345", "!?", " ", " x", "\n\n", "y"]),
    ],
)
def test_the_name_of_the_pre_tokenizer_says_how_words_are_cut(pre, expected):
    assert words(pre, "It's IT'S 12345!?  x\n\ny") == expected


def test_a_word_that_is_a_token_needs_no_merges_where_the_name_says_so():
    more = {
        "tokenizer.ggml.tokens": [*"abc", "abc", "<s>"],
        "tokenizer.ggml.token_type": [1] * 4 + [3],
    }
    ids = {"tokenizer.ggml.bos_token_id": 4, "tokenizer.ggml.eos_token_id": 4}
    whole = byte_level("llama-bpe", **more, **ids)
    merged = byte_level("qwen2", **more, **ids)
    assert whole.encode("abc", start=False) == [3]
    assert merged.encode("abc", start=False) == [0, 1, 2]


def test_all_ends_end_a_text():
    assert byte_level("qwen2").ends == {256, 257, 259}
    assert byte_level("qwen2", **{"tokenizer.ggml.eot_token_id": 258}).ends == {256, 257, 258, 259}


def test_chat_templates_have_names():
    tokenizer = byte_level(
        "qwen2",
        **{
            "tokenizer.chat_template": "one",
            "tokenizer.chat_templates": ["tools"],
            "tokenizer.chat_template.tools": "two",
        },
    )
    assert tokenizer.templates == {"default": "one", "tools": "two"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, NotImplementedError, "'bert'"),
        ({"tokenizer.ggml.pre": "new"}, NotImplementedError, "pre-tokenizer 'new'"),
        ({"tokenizer.ggml.tokens": None}, ValueError, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, ValueError, "tokenizer.ggml.merges"),
        (
            {"tokenizer.ggml.merges": ["x yy"]},
            ValueError,
            "merges' must be pairs of tokens that make",
        ),
        ({"tokenizer.ggml.merges": ["xy"]}, ValueError, "merges"),
        ({"tokenizer.ggml.token_type": [1]}, ValueError, "1 entries for 260 tokens"),
        (
            {"tokenizer.ggml.eos_token_id": 260},
            ValueError,
            "eos_token_id' must be in 0..259 for 260 tokens, got 260",
        ),
    ],
)
def test_what_cannot_be_built_is_named(change, error, message):
    with pytest.raises(error, match=message):
        byte_level("qwen2", **change)

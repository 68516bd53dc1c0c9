"""The bytes of tokens against the decoders of the package `tokenizers`."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_examples import sentence_piece

from slidejax.lm.text.pieces import Pieces, Utf8, byte_characters

tokenizers = pytest.importorskip("tokenizers")


def test_the_table_of_bytes_is_that_of_the_package():
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert set(byte_characters()) == set(level.alphabet())
    for text in ("A", "\n", "é", " ", "\x00\x7f", "ÿ日"):
        ((word, _),) = level.pre_tokenize_str(text)
        assert bytes(byte_characters()[c] for c in word) == text.encode()


@given(st.text(max_size=12))
def test_byte_level_text_comes_back(text):
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [word for word, _ in level.pre_tokenize_str(text)]
    pieces = Pieces({"type": "ByteLevel"})
    assert b"".join(map(pieces.of, words)) == text.encode()
    assert tokenizers.decoders.ByteLevel().decode(words) == text


@given(st.text(st.characters(exclude_characters="▁"), max_size=12))
def test_sentence_piece_text_comes_back(text):
    for prefix in (True, False):
        tokenizer = sentence_piece(prefix)
        ids = tokenizer.encode(text, start=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.backend.decode(ids) == text


@given(st.binary(max_size=20), st.lists(st.integers(0, 20), max_size=3))
def test_bytes_as_they_come_are_the_same_as_at_once(data, cuts):
    stream, at = Utf8(), sorted({0, *(c for c in cuts if c < len(data)), len(data)})
    parts = [stream.feed(data[a:b]) for a, b in itertools.pairwise(at)]
    assert "".join(parts) + stream.end() == data.decode("utf-8", errors="replace")


def test_a_metaspace_is_a_space():
    for decoder, strips in (
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}, True),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}, False),
        ({"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}, True),
    ):
        pieces = Pieces(decoder)
        assert pieces.of("▁moon") == b" moon" and pieces.strips == strips


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##"},
        {"type": "Strip", "content": " ", "start": 2, "stop": 0},
        {"type": "Strip", "content": " ", "start": 0, "stop": 1},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "CTC"}]},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""},
    ],
)
def test_decoders_that_are_not_known_are_refused(decoder):
    with pytest.raises(NotImplementedError, match=r"tokenizer\.json"):
        Pieces(decoder)

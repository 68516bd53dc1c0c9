"""Streams of text: the pieces join to the whole, whatever the tokens, and stops are cut off."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_examples import sentence_piece

from slidejax.lm.text.examples import byte_tokenizer
from slidejax.lm.text.stream import TextStream, check_stops

TOKENIZER = byte_tokenizer("<a>", "<b>")
A, B = 258, 259
TEXTS = st.text(st.sampled_from("ab<> é日🤗\ufffd\x00"), max_size=20)


def pieces(stream, tokens):
    return [*(stream.feed([token]) for token in tokens), stream.end()]


@given(st.lists(st.integers(0, 265), max_size=40))
def test_any_tokens_join_to_the_whole_text(tokens):
    """Bytes that are no UTF-8, special tokens, and ids that the vocabulary lacks."""
    got = pieces(TextStream(TOKENIZER), tokens)
    assert "".join(got) == TOKENIZER.decode(tokens)
    with_stop = pieces(TextStream(TOKENIZER, ["no text has this"]), tokens)
    assert "".join(with_stop) == TOKENIZER.decode(tokens)


@given(TEXTS)
def test_no_piece_ends_inside_a_character(text):
    for piece in pieces(TextStream(TOKENIZER), text.encode()):
        assert all(c in text for c in piece)


@given(st.lists(st.integers(0, 7 + 4 + 256), max_size=30))
def test_a_sentence_piece_stream_goes_on_after_its_prompt(tokens):
    """The first token's space is the text's own, since a prompt stands before it."""
    tokenizer = sentence_piece()
    got = "".join(pieces(TextStream(tokenizer), tokens))
    assert got == tokenizer.decode(tokens, continues=True)


def cut(text, stops):
    """The text before the stop that is complete first; of several the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    TEXTS,
    st.lists(st.text(st.sampled_from("ab<é日"), min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_stop_that_is_complete_first(text, stops):
    stream = TextStream(TOKENIZER, stops)
    got = "".join(pieces(stream, text.encode()))
    assert (got, stream.stopped) == cut(text, stops)


@given(
    st.lists(st.sampled_from([*b"ab<>", A, B]), max_size=15),
    st.lists(
        st.sampled_from(["<a>", "<b>", "a<b>", "<a>b", "<a><b>", "b<", "<a", "ab"]), max_size=3
    ),
)
def test_stops_see_special_tokens_and_the_text_has_none(tokens, stops):
    stream = TextStream(TOKENIZER, stops)
    got = "".join(pieces(stream, tokens))
    shown, raw = [], ""
    for token in tokens:
        name = {A: "<a>", B: "<b>"}.get(token)
        shown += [name is None] * len(name or "x")
        raw += name or chr(token)
    before, stopped = cut(raw, stops)
    assert stream.stopped == stopped
    assert got == "".join(c for c, show in zip(before, shown, strict=False) if show)


def test_what_could_begin_a_stop_is_held_back_and_no_more():
    stream = TextStream(TOKENIZER, ["abc", "bx"])
    assert [stream.feed([byte]) for byte in b"zaabd"] == ["z", "", "a", "", "abd"]
    assert stream.feed(b"ab") == "" and stream.end() == "ab"


def test_stops_are_checked():
    assert check_stops(["a", "b"]) == ("a", "b")
    with pytest.raises(ValueError, match="stop must not be empty"):
        check_stops(["a", ""])
    with pytest.raises(TypeError, match="stop must be text"):
        check_stops([1])

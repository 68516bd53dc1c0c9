"""A stream gives what `generate` gives, in pieces."""

import numpy as np
import pytest
from fake_writer import FakeWriter

from slidejax.lm.generation import Stream, generate

pytestmark = pytest.mark.usefixtures("steps")
A = 258


@pytest.mark.parametrize("options", [{}, {"stop": "\ufffd"}, {"temperature": 1.5, "seed": 4}])
@pytest.mark.parametrize("ends", [(), (7, 90, 200)])
def test_the_pieces_join_to_the_text(options, ends):
    model = FakeWriter(ends=ends, seed=2)
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, 256, 5).tolist()
        stream = Stream(model, prompt, max_new_tokens=70, **options)
        pieces = list(stream)
        whole = generate(model, prompt, max_new_tokens=70, **options)
        assert "".join(pieces) == whole.text and all(pieces)
        assert (stream.tokens, stream.finish) == (whole.tokens, whole.finish)
        assert stream.prompt_tokens == 5 and stream.first_seconds > 0
        assert list(stream) == []


def test_a_piece_has_whole_characters():
    model = FakeWriter(steps=0)
    text = "aé日🤗"
    first = model.script(text)
    assert list(Stream(model, [first], max_new_tokens=9)) == ["é", "日", "🤗"]
    cut = list(Stream(model, [first], max_new_tokens=4))
    assert cut == ["é", "\ufffd"]  # two bytes of three, and no more are coming


def test_one_program_writes_whatever_the_size_of_a_piece():
    model = FakeWriter()
    list(Stream(model, [1, 2, 3], max_new_tokens=40))
    generate(model, [4, 5], max_new_tokens=40)
    assert [kind for kind, *_ in model.programs.traced] == ["prefill", "decode"]


def test_a_stop_ends_a_stream_and_nothing_of_it_is_given():
    model = FakeWriter()
    model.script("abcdefghij", A)
    stream = Stream(model, [ord("a")], max_new_tokens=10, stop=["ghi", "efx"])
    assert "".join(stream) == "bcdef" and stream.finish == "stop"


def test_nothing_asked_for_is_an_empty_stream():
    model = FakeWriter()
    stream = Stream(model, "ab", max_new_tokens=0)
    assert list(stream) == [] and stream.finish == "length" and stream.tokens == []
    assert model.programs.traced == []


def test_errors_come_before_the_first_piece():
    model = FakeWriter(context=64)
    with pytest.raises(ValueError, match="empty"):
        Stream(model, "")
    with pytest.raises(ValueError, match="context of 64"):
        Stream(model, "abc")  # 128 tokens by default
    with pytest.raises(ValueError, match="tokenizer"):
        Stream(FakeWriter(tokenizer=False), [1])

"""Ends, stops and lengths at every step of a call, several rows at once, against a plain loop."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from fake_writer import VOCAB, FakeWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slidejax.lm.generation import Stream, generate
from slidejax.lm.generation.programs import BLOCK

A, B = 258, 259  # the special tokens <a> and <b>
RING = [*b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN", A, B]  # tokens that a model writes for ever
NAMES = {A: "<a>", B: "<b>"}


@functools.cache
def writer(steps):
    """One model for all examples, so that its programs are compiled once."""
    return FakeWriter(steps=steps, context=64)


def around(model, ring):
    """Makes the model write a ring of tokens, from whichever it begins with."""
    table = np.zeros((VOCAB, VOCAB), np.float32)
    table[ring, np.roll(ring, -1)] = 100.0
    model.params = {"says": jnp.asarray(table)}
    return model


def expected(ring, begin, count, stops, ends):
    """The text, the tokens and the finish of a row that begins with a token."""
    raw, shown, tokens = "", [], []
    for i in range(count):
        token = ring[(ring.index(begin) + 1 + i) % len(ring)]
        if token in ends:
            return visible(raw, shown), tokens, "end"
        tokens.append(token)
        for character in NAMES.get(token, chr(token)):
            raw += character
            shown.append(token not in NAMES)
            ended = [stop for stop in stops if raw.endswith(stop)]
            if ended:
                before = len(raw) - max(map(len, ended))
                return visible(raw[:before], shown), tokens, "stop"
    return visible(raw, shown), tokens, "length"


def visible(raw, shown):
    return "".join(c for c, show in zip(raw, shown, strict=False) if show)


@st.composite
def problems(draw):
    ring = draw(st.permutations(RING))
    raw = "".join(NAMES.get(token, chr(token)) for token in [*ring, *ring])
    cuts = st.tuples(st.integers(0, len(ring) - 1), st.integers(1, 12))
    stops = [raw[at : at + size] for at, size in draw(st.lists(cuts, max_size=3))]
    ends = draw(st.lists(st.sampled_from(RING), max_size=2))
    begins = draw(st.lists(st.sampled_from(RING), min_size=1, max_size=4))
    return ring, stops, ends, begins, draw(st.integers(1, 40))


@pytest.mark.parametrize("steps", [0, 8], ids=["asking loop", "fixed loop"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(problems())
def test_rows_end_where_a_plain_loop_ends(steps, problem):
    ring, stops, ends, begins, count = problem
    model = around(writer(steps), ring)
    want = [expected(ring, begin, count, stops, ends) for begin in begins]
    options = {"max_new_tokens": count, "stop": stops}
    got = generate(model, [[begin] for begin in begins], ends=ends, **options)
    assert [(c.text, c.tokens, c.finish) for c in got] == want
    model.ends = ends
    stream = Stream(model, [begins[0]], **options)
    text = "".join(stream)
    assert (text, stream.tokens, stream.finish) == want[0]


@pytest.mark.parametrize("steps", [0, 8], ids=["asking loop", "fixed loop"])
@pytest.mark.parametrize("at", [0, 1, 7, 8, 9, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1])
def test_the_edges_of_a_call(steps, at):
    """The first token of all, the last one of a call and the first one of the next."""
    model = around(writer(steps), RING)
    end, last = RING[at + 1], RING[at]
    got = generate(model, [RING[0]], max_new_tokens=40, ends=[end])
    assert (got.tokens, got.finish) == (RING[1 : at + 1], "end")
    got = generate(model, [RING[0]], max_new_tokens=40, stop=chr(end), ends=())
    assert (got.tokens, got.finish) == (RING[1 : at + 2], "stop")
    if at > 1:
        across = chr(last) + chr(end)
        got = generate(model, [RING[0]], max_new_tokens=40, stop=across, ends=())
        assert (got.text, got.finish) == (bytes(RING[1:at]).decode(), "stop")
    for count in (at, at + 1):  # the length and the end come together
        got = generate(model, [RING[0]], max_new_tokens=count, ends=[end])
        assert got.tokens == RING[1 : at + 1] and got.finish == ("end", "length")[count == at]


@pytest.mark.parametrize("steps", [0, 8], ids=["asking loop", "fixed loop"])
@pytest.mark.parametrize("context", [33, 40, 64])
def test_prompts_that_fill_the_context_but_for_some_tokens(steps, context):
    model = FakeWriter(steps=steps, context=context, chunk=16)
    rows = [prompt(context - left) for left in (0, 1, 2, 9, 17)]
    got = generate(model, rows, max_new_tokens=None)
    assert [len(c.tokens) for c in got] == [0, 1, 2, 9, 17]
    for row, completion in zip(rows, got, strict=True):
        assert generate(model, row, max_new_tokens=None) == completion
    with pytest.raises(ValueError, match=f"context of {context}"):
        generate(model, rows[1], max_new_tokens=2)


def prompt(length):
    return np.random.default_rng(length).integers(0, 256, length).tolist()


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.5}])
def test_a_row_draws_the_same_in_a_batch_of_any_size(options):
    model = FakeWriter()
    rows = [prompt(n) for n in (3, 20, 7, 1, 40)]
    options = {"max_new_tokens": 20, "temperature": 1.5, "seed": 2**32 - 1, **options}
    together = generate(model, rows, **options)
    for size in range(1, 5):
        assert generate(model, rows[:size], **options) == together[:size]
    assert generate(model, rows[0], **options) == together[0]


def test_a_top_k_of_all_tokens_or_more_is_all_tokens():
    model = FakeWriter()
    options = {"max_new_tokens": 20, "temperature": 1.5, "top_p": 0.9, "seed": 5}
    want = generate(model, prompt(5), top_k=0, **options)
    for top_k in (VOCAB, VOCAB + 1, 2**31 - 1):
        assert generate(model, prompt(5), top_k=top_k, **options) == want

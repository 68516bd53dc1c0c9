"""Generation with a fake decoder: the right tokens, few programs, and clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_writer import VOCAB, FakeWriter, greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from slidejax.lm.generation import Sampling, generate
from slidejax.lm.generation.generate import Batch
from slidejax.lm.generation.programs import BLOCK, Programs

pytestmark = pytest.mark.usefixtures("steps")
A, B = 258, 259  # the special tokens <a> and <b>


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def test_the_tokens_are_the_likeliest_ones_however_long_the_prompt_is():
    model = FakeWriter(chunk=32)
    for length in (1, 15, 16, 17, 31, 32, 33, 64, 65, 100, 129):
        ids = prompt(length, length)
        got = generate(model, ids, max_new_tokens=9)
        assert got.tokens == greedy(model.params, ids, 9)
        assert (got.finish, got.prompt_tokens) == ("length", length)


def test_rows_of_a_batch_do_not_depend_on_each_other():
    model = FakeWriter(chunk=32)
    prompts = [prompt(n, n) for n in (3, 70, 16, 33, 1)]
    together = generate(model, prompts, max_new_tokens=40)
    assert [c.tokens for c in together] == [greedy(model.params, p, 40) for p in prompts]
    for ids, completion in zip(prompts, together, strict=True):
        assert generate(model, ids, max_new_tokens=40) == completion


def test_more_tokens_than_a_block():
    model = FakeWriter()
    got = generate(model, [5, 6], max_new_tokens=3 * BLOCK + 5)
    assert got.tokens == greedy(model.params, [5, 6], 3 * BLOCK + 5)


def test_any_of_several_ends_ends_a_row_and_the_others_go_on():
    free = FakeWriter()
    prompts = [prompt(4, s) for s in range(6)]
    texts = [c.tokens for c in generate(free, prompts, max_new_tokens=20)]
    ends = (texts[0][3], texts[1][7])
    got = generate(FakeWriter(ends=ends), prompts, max_new_tokens=20)
    for tokens, completion in zip(texts, got, strict=True):
        stop = next((i for i, t in enumerate(tokens) if t in ends), None)
        assert completion.tokens == tokens[:stop]
        assert completion.finish == ("length" if stop is None else "end")
    assert {c.finish for c in got} == {"end", "length"}


def test_one_program_for_a_bucket_of_lengths_and_one_for_decoding():
    model = FakeWriter(chunk=32)
    generate(model, prompt(20), max_new_tokens=40)
    assert [t[0] for t in model.programs.traced] == ["prefill", "decode"]
    for length in (17, 25, 32):  # the same bucket of prompts, and of all tokens
        for options in ({}, {"stop": "zz"}):
            generate(model, prompt(length, length), max_new_tokens=30, **options)
    assert len(model.programs.traced) == 2
    generate(model, prompt(9), max_new_tokens=40)  # a shorter prompt, as many tokens in all
    assert [t[0] for t in model.programs.traced] == ["prefill", "decode", "prefill"]
    before = len(model.programs.traced)
    for temperature in (0.5, 1.0):  # drawing is another program, whatever the numbers are
        for seed in (1, 2):
            generate(model, prompt(20), max_new_tokens=40, temperature=temperature, seed=seed)
    assert len(model.programs.traced) == before + 2
    for top_k, top_p in ((5, 0.9), (0, 0.5), (40, 1.0)):
        options = {"temperature": 1.0, "top_k": top_k, "top_p": top_p}
        generate(model, prompt(20), max_new_tokens=40, **options)
    assert len(model.programs.traced) == before + 4


def test_jax_compiles_no_more_than_these_two():
    model = FakeWriter()
    names = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        generate(model, [prompt(20), prompt(31)], max_new_tokens=40)
        first = len(names)
        generate(model, [prompt(18, 1), prompt(3, 1)], max_new_tokens=60)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first == 2 and len(names) == 2


def test_the_cache_is_donated():
    model = FakeWriter()
    state, *_ = model.programs.prefill(
        model.params,
        np.zeros((1, 16), np.int32),
        np.ones(1, np.int32),
        np.ones(1, bool),
        np.full(8, -1, np.int32),
        Sampling().draw(),
        length=64,
        kind="greedy",
    )
    arguments = (np.ones(1, bool), np.full(8, -1, np.int32), Sampling().draw(), np.int32(2))
    model.programs.decode(model.params, state, *arguments, kind="greedy")
    assert state.cache["ids"].is_deleted()


@pytest.mark.parametrize("count", [9, 10, 25])
def test_the_next_call_is_under_way_while_the_host_reads(count):
    """Where a call has a fixed number of steps; the tokens are the same, and nothing is left."""
    model = FakeWriter(steps=4)
    batch = Batch(model, [[5, 6]], [count], Sampling(), ())
    tokens, ahead = [*batch.start()], []
    while len(tokens) < count:
        tokens += batch.more([True], 1)[0].tolist()
        ahead.append(batch.coming)
    assert tokens == greedy(model.params, [5, 6], count)
    assert ahead == [True] * (len(ahead) - 1) + [False]
    asked = Batch(FakeWriter(steps=0), [[5, 6]], [count], Sampling(), ())
    asked.start()
    assert asked.more([True], 1).shape == (1, 1) and not asked.coming


def test_a_step_beyond_the_limit_changes_nothing():
    """A call of eight steps that is to take three is a call of three."""
    limited, exact = FakeWriter(steps=8), FakeWriter(steps=3)
    states = []
    for model in (limited, exact):
        ends, live, draw = np.full(8, -1, np.int32), np.ones(2, bool), Sampling().draw()
        ids, lengths = np.array([[5, 6] * 8, [7, 0] * 8], np.int32), np.array([2, 1], np.int32)
        read = model.programs.prefill
        state, *_ = read(model.params, ids, lengths, live, ends, draw, length=8, kind="greedy")
        write = model.programs.decode
        state, tokens, bad = write(
            model.params, state, live, ends, draw, np.int32(3), kind="greedy"
        )
        assert (np.asarray(tokens)[:, 3:] == -1).all() and not bad.any()
        states.append((state, tokens[:, :3]))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_sampling_is_the_same_for_every_size_of_block():
    """A stop makes blocks shorter; a draw depends on the position alone."""
    model = FakeWriter()
    options = {"max_new_tokens": 50, "temperature": 2.0, "seed": 3}
    one = generate(model, [5, 6], **options)
    other = generate(model, [5, 6], stop="no text has this", **options)
    assert one.tokens == other.tokens
    assert one.tokens != generate(model, [5, 6], **{**options, "seed": 4}).tokens
    assert generate(model, [5, 6], **options, top_k=1).tokens == greedy(model.params, [5, 6], 50)


# --- text -----------------------------------------------------------------------------------------


def test_text_prompts_begin_with_the_start_and_ids_are_taken_as_they_are():
    model = FakeWriter()
    text = generate(model, "hé", max_new_tokens=5)
    assert text == generate(model, [256, *"hé".encode()], max_new_tokens=5)
    assert text.prompt_tokens == 4 and str(text) == text.text
    assert text == generate(model, jax.numpy.array([256, *"hé".encode()]), max_new_tokens=5)
    both = generate(model, ["hé", [1, 2]], max_new_tokens=5)
    assert both[0] == text and both[1].tokens == greedy(model.params, [1, 2], 5)


def test_a_stop_may_span_tokens_and_is_not_part_of_the_text():
    model = FakeWriter()
    model.script("abcdefghijklmnop")
    got = generate(model, [ord("a")], max_new_tokens=12, stop=["ghx", "fgh", "m"])
    assert (got.text, got.finish) == ("bcde", "stop")
    assert bytes(got.tokens) == b"bcdefgh"
    one, other = generate(model, [[ord("a")], [ord("k")]], max_new_tokens=12, stop="fgh")
    assert one.text == "bcde" and other.text.startswith("lmnop")


def test_a_special_token_can_be_a_stop_or_part_of_one():
    model = FakeWriter()
    model.script("abcd", A)
    assert generate(model, [ord("a")], max_new_tokens=4, stop="<a>").text == "bcd"
    assert generate(model, [ord("a")], max_new_tokens=4, stop="d<a>").text == "bc"
    got = generate(model, [ord("a")], max_new_tokens=4)
    assert got.text == "bcd" and got.tokens[-1] == A and got.finish == "length"


def test_nothing_asked_for_is_nothing_run():
    model = FakeWriter()
    assert generate(model, "abc", max_new_tokens=0).text == ""
    assert [c.tokens for c in generate(model, [[1], [2]], max_new_tokens=0)] == [[], []]
    assert generate(model, [], max_new_tokens=4) == []
    assert model.programs.traced == []


def test_until_the_context_is_full():
    model = FakeWriter(context=40)
    got = generate(model, [prompt(40), prompt(7), prompt(38)], max_new_tokens=None)
    assert [len(c.tokens) for c in got] == [0, 33, 2]
    assert got[1].tokens == greedy(model.params, prompt(7), 33)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("", {}, ValueError, "prompt is empty"),
        ([[1], []], {}, ValueError, "prompt 1 is empty"),
        (["a", ""], {}, ValueError, "prompt 1 is empty"),
        ([1, VOCAB], {}, ValueError, f"token {VOCAB}.*0 to {VOCAB - 1}"),
        ([[1], [3, -2]], {}, ValueError, "prompt 1 has token -2"),
        ([1] * 65, {}, ValueError, "65 tokens, more than the model's context of 64"),
        ([1] * 60, {"max_new_tokens": 5}, ValueError, "max_new_tokens 5.*context of 64"),
        ([1.5], {}, TypeError, "prompt"),
        (7, {}, TypeError, "prompts"),
        ("a", {"max_new_tokens": -1}, ValueError, "max_new_tokens"),
        ("a", {"max_new_tokens": 1.5}, ValueError, "max_new_tokens"),
        ("a", {"stop": ""}, ValueError, "stop"),
        ("a", {"stop": [3]}, TypeError, "stop"),
        ("a", {"stop": 3}, TypeError, "stop"),
        ("a", {"stop": "\ud800"}, ValueError, "stop"),
        ("a", {"temperature": -1}, ValueError, "temperature"),
        ("a", {"max_new_tokens": True}, ValueError, "max_new_tokens"),
        ("a", {"ends": 3}, TypeError, "ends"),
        ("a", {"ends": [1.5]}, TypeError, "ends"),
        ("a", {"ends": ["</s>"]}, TypeError, "ends"),
        ("a", {"ends": [-1]}, ValueError, "ends has token -1"),
        ("a", {"ends": [2**40]}, ValueError, f"ends has token {2**40}"),
        ("a", {"progress": 3}, TypeError, "progress"),
        # What looks like token ids, or like texts, and is something else.
        (b"ab", {}, TypeError, "prompts must be texts or lists of token ids"),
        ([b"ab"], {}, TypeError, "prompt 0 must be text or a list of token ids"),
        ({"input_ids": [[1]], "attention_mask": [[1]]}, {}, TypeError, "prompts must be"),
        ([{"role": "user"}], {}, TypeError, "prompt 0 must be"),
        ({1, 2}, {}, TypeError, "prompts must be"),
        ([True, False], {}, TypeError, "must be text or a list of token ids"),
        (["a", "\ud800"], {}, ValueError, "surrogate"),
        (np.array(3), {}, TypeError, "prompts must be"),
    ],
)
def test_bad_arguments_are_one_clear_error_before_anything_runs(prompts, options, error, message):
    model = FakeWriter(context=64)
    with pytest.raises(error, match=message):
        generate(model, prompts, **{"max_new_tokens": 4, **options})
    assert model.programs.traced == []


def test_prompts_may_be_arrays_of_any_kind():
    model = FakeWriter(context=64)
    expected = generate(model, [1, 2], max_new_tokens=3)
    for kind in (np.array([1, 2]), jnp.array([1, 2]), (1, np.int64(2)), range(1, 3)):
        assert generate(model, kind, max_new_tokens=np.int64(3)) == expected
        assert generate(model, [kind], max_new_tokens=3, seed=np.uint32(7)) == [expected]


def test_an_end_that_the_model_cannot_write_ends_nothing():
    model = FakeWriter(context=64)
    expected = generate(model, [1, 2], max_new_tokens=3, ends=[])
    model.ends = (-1, 2**40)
    assert generate(model, [1, 2], max_new_tokens=3) == expected


def test_without_a_tokenizer_ids_are_all_there_is():
    model = FakeWriter(tokenizer=False)
    got = generate(model, [5, 6], max_new_tokens=3)
    assert got.text is None and got.tokens == greedy(model.params, [5, 6], 3)
    for options in ({"prompts": "a"}, {"prompts": [5], "stop": "x"}):
        with pytest.raises(ValueError, match="came without"):
            generate(model, max_new_tokens=3, **options)


def test_a_model_that_computes_nan_says_so():
    model = FakeWriter()
    bad = model.params["says"].at[7, 3].set(np.nan)
    with pytest.raises(ValueError, match="nan after prompt 1"):
        generate(model, [[5], [7]], max_new_tokens=1, params={"says": bad})
    free = generate(model, [5, 6], max_new_tokens=30).tokens
    late = model.params["says"].at[free[20]].set(np.nan)
    with pytest.raises(ValueError, match="nan after prompt 0"):
        generate(model, [5, 6], max_new_tokens=30, params={"says": late})


@settings(max_examples=30)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 6000))
def test_buckets_hold_what_they_must(tokens, more, context):
    length = Programs.prompt_length(tokens)
    assert tokens <= length < max(2 * tokens, 17)
    total = min(tokens + more, max(context, tokens))
    slots = Programs.cache_length(total, context)
    assert total <= slots and (slots <= max(context, total))

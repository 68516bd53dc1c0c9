"""Jitted generation: the same tokens as transformers' own loop, one compilation, clear errors."""

import jax
import numpy as np
import pytest

from slidejax.lm.generate import Generator

PROMPT = [5, 17, 3, 200]


def test_the_same_tokens_as_transformers(tiny_llama):
    got = Generator(tiny_llama, 5, stop=False)(PROMPT)
    options = {"max_new_tokens": 5, "eos_token_id": 259, "pad_token_id": 0}
    expected = jax.jit(lambda ids: tiny_llama.generate(ids, **options).sequences)(
        np.array([PROMPT])
    )
    assert got.tokens == list(expected[0, 4:]) and got.steps == 5
    assert got.tokens_per_second == pytest.approx(5 / got.seconds)


def test_it_stops_at_the_end_of_text(tiny_llama):
    free = Generator(tiny_llama, 6, stop=False)(PROMPT).tokens
    tiny_llama.generation_config.eos_token_id = free[2]
    first = free.index(free[2])
    got = Generator(tiny_llama, 6)(PROMPT)
    assert got.tokens == free[:first] and got.steps == first + 1
    tiny_llama.generation_config.eos_token_id = [free[2], free[2] + 1]  # as Llama 3 has it
    assert Generator(tiny_llama, 6)(PROMPT).tokens == free[:first]


def test_it_compiles_once_for_a_prompt_length(tiny_llama, monkeypatch):
    generator = Generator(tiny_llama, 2)
    generator(PROMPT)
    monkeypatch.setattr(type(tiny_llama), "generate", lambda *a, **k: pytest.fail("traced again"))
    generator(PROMPT[::-1])
    doubled = {
        **tiny_llama.params,
        "lm_head": {"kernel": tiny_llama.params["lm_head"]["kernel"] * 2},
    }
    generator(PROMPT, params=doubled)


def test_sampling_follows_the_seed(tiny_llama):
    generator = Generator(tiny_llama, 8, temperature=5.0, stop=False)
    assert generator(PROMPT, seed=1).tokens == generator(PROMPT, seed=1).tokens
    assert generator(PROMPT, seed=1).tokens != generator(PROMPT, seed=2).tokens
    greedy = Generator(tiny_llama, 8, stop=False)(PROMPT).tokens
    assert Generator(tiny_llama, 8, temperature=5.0, top_k=1, stop=False)(PROMPT).tokens == greedy


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one"),
        ([259], "0..258"),
        ([1] * 127, "128 positions"),
        ([[1]], "at least one"),
    ],
)
def test_bad_prompts(tiny_llama, prompt, message):
    with pytest.raises(ValueError, match=message):
        Generator(tiny_llama, 4)(prompt)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
    ],
)
def test_bad_options(tiny_llama, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Generator(tiny_llama, **options)

"""Perplexity, accuracy and agreement against the same figures computed token by token in NumPy."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidejax.lm.evaluate import Evaluator, evaluate, windows

TOKENS = np.random.default_rng(3).integers(0, 256, 75)


@given(tokens=st.lists(st.integers(0, 99), min_size=2, max_size=40), length=st.integers(1, 12))
def test_every_token_but_the_first_is_predicted_once(tokens, length):
    ids, counts = windows(tokens, length)
    predicted = ids[:, 1:][counts == 1]
    np.testing.assert_array_equal(predicted, tokens[1:])
    np.testing.assert_array_equal(ids[:, :-1][counts == 1], tokens[:-1])


@pytest.mark.parametrize(("tokens", "length"), [([1], 4), ([[1, 2]], 4), ([1, 2, 3], 0)])
def test_windows_refuses(tokens, length):
    with pytest.raises(ValueError, match="must be"):
        windows(tokens, length)


def distributions(model, tokens, window):
    """log p [token, vocabulary] for each predicted token, from one window at a time."""
    run = jax.jit(lambda p, i: model(i, params=p).logits)
    rows = []
    for start in range(0, len(tokens) - 1, window):
        context = np.zeros(
            (1, window), np.int32
        )  # padded on the right, which a causal model cannot see
        part = tokens[start : min(start + window, len(tokens) - 1)]
        context[0, : len(part)] = part
        rows.append(np.asarray(run(model.params, context), np.float64)[0, : len(part)])
    logits = np.concatenate(rows)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_against_numpy(tiny_config, tiny_params, tiny_llama, batch):
    from slidejax.huggingface import build

    other = build(tiny_config, jax.tree.map(lambda p: p * 1.1, tiny_params))
    seen = []
    got = evaluate(
        tiny_llama,
        TOKENS,
        window=20,
        batch=batch,
        reference=other,
        progress=lambda *a: seen.append(a),
    )
    log_p, log_q = distributions(tiny_llama, TOKENS, 20), distributions(other, TOKENS, 20)
    target = TOKENS[1:]
    assert got.tokens == 74
    assert got.perplexity == pytest.approx(math.exp(-log_p[np.arange(74), target].mean()), rel=1e-5)
    assert got.next_token_accuracy == pytest.approx((log_p.argmax(-1) == target).mean())
    np.testing.assert_allclose(got.losses, -log_p[np.arange(74), target], rtol=1e-4, atol=1e-5)
    assert got.agreement.top1 == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean())
    assert got.agreement.kl == pytest.approx(
        (np.exp(log_q) * (log_q - log_p)).sum(-1).mean(), rel=1e-4
    )
    assert seen[-1] == (74, 74) and [s[0] for s in seen] == sorted(s[0] for s in seen)


def test_a_model_agrees_with_itself(tiny_llama):
    got = evaluate(tiny_llama, TOKENS, window=30, reference=tiny_llama)
    assert got.agreement.top1 == 1 and got.agreement.kl == pytest.approx(0, abs=1e-6)


def test_parameters_can_be_given(tiny_llama):
    zeros = jax.tree.map(np.zeros_like, tiny_llama.params)
    got = evaluate(tiny_llama, TOKENS, zeros, window=30)
    assert got.perplexity == pytest.approx(
        tiny_llama.config.vocab_size, rel=1e-5
    )  # the uniform distribution


def test_parameters_of_one_structure_share_a_program(tiny_llama, monkeypatch):
    evaluator = Evaluator(tiny_llama, window=30)
    first = evaluator(TOKENS)
    monkeypatch.setattr(type(tiny_llama), "__call__", lambda *a, **k: pytest.fail("traced again"))
    assert evaluator(TOKENS) == first
    assert (
        evaluator(TOKENS, jax.tree.map(np.zeros_like, tiny_llama.params)).perplexity
        != first.perplexity
    )


def test_a_ruined_model_shows(tiny_llama):
    nan = jax.tree.map(lambda p: np.full(p.shape, np.nan, p.dtype), tiny_llama.params)
    assert math.isnan(evaluate(tiny_llama, TOKENS, nan, window=30).perplexity)
    huge = jax.tree.map(lambda p: p * np.float32(1e3), tiny_llama.params)
    assert evaluate(tiny_llama, TOKENS, huge, window=30).perplexity == math.inf


@pytest.mark.parametrize(
    ("tokens", "window", "message"),
    [
        ([5], 8, "at least two"),
        ([1, 259], 8, "0..258"),
        ([1, -1], 8, "-1"),
        ([1, 2], 129, "128 positions"),
    ],
)
def test_bad_input(tiny_llama, tokens, window, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_llama, tokens, window=window)

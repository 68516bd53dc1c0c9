"""Distillation: the loss, rows of text, and text that a model writes itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from slidejax.train import distill


def test_sampled_text_is_the_models(tiny_llama):
    dense = tiny_llama
    prompts = np.array([[5, 6], [7, 8], [9, 10]])
    rows = distill.sample(dense, prompts, 12, batch=2, seed=1)
    assert rows.shape == (3, 12) and (rows[:, :2] == prompts).all() and rows.max() < 259
    np.testing.assert_array_equal(rows, distill.sample(dense, prompts, 12, batch=2, seed=1))
    assert not np.array_equal(rows, distill.sample(dense, prompts, 12, batch=2, seed=2))
    cold = distill.sample(dense, prompts, 12, temperature=1e-4)
    options = {"max_length": 12, "do_sample": False, "eos_token_id": 259, "pad_token_id": 0}
    greedy = jax.jit(lambda ids: dense.generate(ids, **options).sequences)(prompts)
    np.testing.assert_array_equal(cold, greedy)


def test_the_prompts_must_be_shorter_than_the_rows(tiny_llama):
    for prompts in (np.zeros((2, 4), int), np.zeros(3, int), np.zeros((0, 2), int)):
        with pytest.raises(ValueError, match="prompt < 4"):
            distill.sample(tiny_llama, prompts, 4)


def test_the_loss_is_the_divergence_and_the_distance_of_hidden_states(tiny_llama):
    ids = np.arange(24).reshape(2, 12)
    teacher = tiny_llama.params
    student = jax.tree.map(lambda leaf: 0.9 * leaf, teacher)
    run = jax.jit(lambda params: tiny_llama(ids, params=params, output_hidden_states=True))
    mine, theirs = run(student), run(teacher)
    divergence = distill.kl_divergence(mine.logits, theirs.logits)
    assert float(divergence) > 0
    loss = jax.jit(distill.distillation_loss(tiny_llama, tiny_llama))
    np.testing.assert_allclose(loss(student, ids, teacher), divergence, rtol=1e-5)
    np.testing.assert_allclose(loss(teacher, ids, teacher), 0, atol=1e-6)
    pairs = [
        (np.asarray(a), np.asarray(b))
        for a, b in zip(mine.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    distance = np.mean([(((a - b) ** 2).sum(-1) / (b**2).sum(-1)).mean() for a, b in pairs])
    both = jax.jit(distill.distillation_loss(tiny_llama, tiny_llama, hidden=0.5))
    both = both(student, ids, teacher)
    np.testing.assert_allclose(both, divergence + 0.5 * distance, rtol=1e-4)


def test_the_teacher_gets_no_gradient(tiny_llama):
    loss = distill.distillation_loss(tiny_llama, tiny_llama, hidden=1.0)
    student = jax.tree.map(lambda leaf: 0.9 * leaf, tiny_llama.params)
    ids = np.arange(8)[None]
    gradient = jax.jit(jax.grad(lambda teacher: loss(student, ids, teacher)))(tiny_llama.params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(gradient))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3))
def test_rows_are_the_beginning_of_each_text(tokens, length, texts):
    ids = np.arange(texts * tokens).reshape(texts, tokens)
    if tokens < length:
        with pytest.raises(ValueError, match="fill no row"):
            distill.rows_of(ids, length)
        return
    rows = distill.rows_of(ids, length)
    assert rows.dtype == np.int32 and rows.shape[1] == length
    np.testing.assert_array_equal(rows.reshape(texts, -1), ids[:, : tokens // length * length])


def test_tokens_are_integers():
    with pytest.raises(ValueError, match="token ids"):
        distill.rows_of([0.5, 1.0], 1)

"""Distillation: the loss, rows of text, and text that a model writes itself."""

import numpy as np
import pytest

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
    greedy = dense.generate(
        prompts, max_length=12, do_sample=False, eos_token_id=259, pad_token_id=0
    ).sequences
    np.testing.assert_array_equal(cold, greedy)

"""Tokens that a decoder lacks are never read as others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.lm.decoder import apply, init_cache
from slidejax.lm.decoder.examples import tiny
from slidejax.train import sample

BAD = np.array([[1, 2, 3, 64] * 8], np.int32)


@pytest.mark.parametrize("token", [64, 1000, -1])
def test_a_token_that_is_not_there_is_an_error_or_nan(token):
    model = tiny(num_layers=1)
    ids = jnp.array([[1, 2, token, 3], [4, 5, 6, 7]])
    with pytest.raises(ValueError, match=f"0 to 63, got {token}"):
        model(ids)
    logits = np.asarray(jax.jit(lambda ids: model(ids))(ids))
    assert np.isnan(logits[0, 2:]).all() and np.isfinite(logits[1]).all()


def test_padding_may_have_any_id():
    model = tiny(num_layers=1)
    ids, positions = np.array([[1, 2, -7], [64, 3, 4]]), np.array([[0, 1, -1], [-1, 0, 1]])
    for cache in (None, init_cache(model.config, 2, 8, "float32")):
        run = jax.jit(lambda *rows: apply(model.config, model.params, *rows, last=True)[0])
        logits = run(ids, positions, cache)
        for row, alone in zip(np.asarray(logits), ([[1, 2]], [[3, 4]]), strict=True):
            np.testing.assert_allclose(row, np.asarray(model(np.array(alone)))[0, -1], atol=1e-5)


def test_calibration_on_them_is_an_error():
    model = tiny(num_layers=1)
    with pytest.raises(ValueError, match="calibration must be token ids from 0 to 63, got 1 to 64"):
        sj.lm.convert(model, "6:8", "wanda", BAD)
    with pytest.raises(ValueError, match="calibration must be token ids from 0 to 63"):
        sj.prune.mixed(model, "6:8", BAD, patterns=("14:16", "2:4"))
    converted = sj.lm.convert(model, "6:8")
    with pytest.raises(ValueError, match=r"0\.\.63"):
        sj.recover(converted, model, np.repeat(BAD, 4, 0), steps=1, window=8)


def doors(model, tmp_path):
    """All that calibrates a decoder."""
    sj.lm.save(model, tmp_path / "dense")
    yield lambda tokens: sj.lm.convert(model, "6:8", "wanda", tokens)
    yield lambda tokens: sj.prune.convert(model, "6:8", sj.prune.Calibration(tokens))
    yield lambda tokens: sj.prune.mixed(model, "6:8", tokens, patterns=("14:16", "2:4"))
    yield lambda tokens: sj.lm.convert_files(
        tmp_path / "dense", tmp_path / "out", "6:8", "wanda", tokens
    )


def test_rows_longer_than_the_context_are_refused_before_the_work(tmp_path):
    """Positions that no training has seen would say nothing about the model in use."""
    model = tiny(num_layers=1)
    for convert in doors(model, tmp_path):
        with pytest.raises(ValueError, match=r"rows of 129 tokens, .* context of 128"):
            convert(np.ones((2, 129), np.int32))
        with pytest.raises(ValueError, match="calibration must be token ids from 0 to 63"):
            convert(BAD)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="length must be at most the model's context, 128"):
        sample(model, np.ones((2, 4), np.int32), 129)
    with pytest.raises(ValueError, match="prompts must be token ids from 0 to 63"):
        sample(model, BAD, 60)


def test_padding_in_calibration_may_have_any_id_and_length():
    ids, positions = np.full((8, 130), -7), np.full((8, 130), -1)
    ids[:, :16], positions[:, :16] = np.arange(1, 17), np.arange(16)
    sj.prune.convert(tiny(num_layers=1), "6:8", [(ids, positions)], method="wanda")

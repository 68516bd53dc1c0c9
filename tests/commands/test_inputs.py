"""Models and texts that the arguments name."""

import argparse
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from command_line import SENTENCES

from slidejax.commands import inputs
from slidejax.lm import texts
from slidejax.lm.decoder.examples import tiny


@pytest.fixture(scope="module")
def loaded(model):
    return inputs.load(model, argparse.Namespace(compute="float32"))


def test_the_model_computes_in_the_dtype_that_is_asked_for(model):
    for dtype in ("bfloat16", "float32"):
        found = inputs.load(model, argparse.Namespace(compute=dtype))
        assert np.dtype(found.model.dtype).name == dtype
    assert inputs.load(model, argparse.Namespace()).name == "dense"


def test_one_token_more_than_is_predicted(loaded, text):
    whole, source = inputs.evaluation_ids(loaded, text, None)
    assert source == text and whole.tolist() == loaded.encode(SENTENCES * 2)
    ids, _ = inputs.evaluation_ids(loaded, text, 20)
    assert ids.dtype == np.int32 and ids.tolist() == whole[:21].tolist()


def test_the_default_text_is_named(loaded):
    ids, source = inputs.evaluation_ids(loaded, None, 10)
    assert len(ids) == 11 and "Python" in source


def test_a_text_of_one_token(loaded, tmp_path):
    (tmp_path / "short").write_text("a")
    with pytest.raises(ValueError, match="short has 1 tokens; at least two are needed"):
        inputs.evaluation_ids(loaded, str(tmp_path / "short"), None)


MANY_TOKENS = SimpleNamespace(vocab_size=2**31 - 1)


def calibration_arguments(**changes):
    usual = {"calibration": None, "method": "wanda", "sequences": 2, "seed": None}
    return argparse.Namespace(**usual | changes)


def test_calibration_is_as_long_as_the_positions_allow(loaded):
    ids = inputs.calibration(loaded, calibration_arguments())
    assert ids.shape == (2, 128)  # the tiny Llama has 128 positions
    drawn = inputs.calibration(loaded, calibration_arguments(seed=1))
    assert drawn.shape == ids.shape and not np.array_equal(drawn, ids)


def test_magnitude_needs_no_calibration(loaded, text):
    assert inputs.calibration(loaded, calibration_arguments(method="magnitude")) is None
    ids = inputs.calibration(loaded, calibration_arguments(method="magnitude", calibration=[text]))
    assert ids.ravel().tolist() == loaded.encode(SENTENCES * 2)[: ids.size]


def test_a_short_text_gives_whole_batches(loaded, tmp_path):
    """All calibration programs run a batch of four sequences at a time."""
    (tmp_path / "text").write_text(SENTENCES * 2)
    tokens = len(loaded.encode(SENTENCES * 2))
    for times, expected in ((1, tokens // 128), (4, 4 * tokens // 128 // 4 * 4)):
        (tmp_path / "text").write_text(SENTENCES * 2 * times)
        args = calibration_arguments(calibration=[str(tmp_path / "text")], sequences=64)
        assert inputs.calibration(loaded, args).shape == (expected, 128)
    assert 0 < tokens // 128 < 4


@given(
    st.integers(1, 5),
    st.integers(2, 60),
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(0, 9)),
    st.booleans(),
    st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_a_model_writes_rows_that_begin_with_the_text(rows, length, count, seed, own, start):
    """`generate` goes on from each prompt; the rows are as long as those of the text.

    Every second row begins with an opening, unless the text is the user's own. A token of this
    tokenizer is a letter, so that all openings are long enough.
    """
    text = np.arange(rows * length, dtype=np.int32).reshape(rows, length) + 10_000_000

    def write(prompts, max_new_tokens, **options):
        return [SimpleNamespace(tokens=[7] * max_new_tokens) for _ in prompts]

    fake = SimpleNamespace(
        model=SimpleNamespace(outputs=None, generate=write, config=MANY_TOKENS),
        start=[1] * start,
        tokenizer="letters",
        encode=lambda opening: list(map(ord, opening)),
    )
    written = inputs.written(fake, text, count, seed, own)
    begun = min(8 + start, length // 2)
    assert written.shape == (count, length) and (written[:, begun:] == 7).all()
    pieces = {tuple(row) for row in text[:, :begun]}
    openings = {tuple(([1] * start + list(map(ord, o)))[:begun]) for o in texts.openings()}
    for i, row in enumerate(written[:, :begun]):
        assert tuple(row) in (pieces if own or i % 2 else openings)
    np.testing.assert_array_equal(inputs.written(fake, text, count, seed, own), written)


def test_openings_that_are_too_short_are_left_out():
    """A tokenizer that makes one token of each opening: rows begin with the text alone."""
    text = np.arange(40, dtype=np.int32).reshape(2, 20)
    fake = SimpleNamespace(
        model=SimpleNamespace(
            outputs=None,
            generate=lambda p, **options: [SimpleNamespace(tokens=[7] * 12)] * len(p),
            config=MANY_TOKENS,
        ),
        start=[],
        tokenizer="one for all",
        encode=lambda opening: [5],
    )
    for tokenizer in ("one for all", None):
        fake.tokenizer = tokenizer
        written = inputs.written(fake, text, 4, 0, own=False)
        assert {tuple(row) for row in written[:, :8]} <= {tuple(row) for row in text[:, :8]}


def test_what_served_while_text_was_written_is_not_kept():
    decoder = tiny(dtype="bfloat16")
    loaded = SimpleNamespace(model=decoder, start=[], tokenizer=None)
    written = inputs.written(loaded, np.ones((2, 12), np.int32), 2, 0, own=True)
    assert written.shape == (2, 12) and decoder._extra.served == ([], None)
    decoder.generate([[1]], max_new_tokens=1)
    assert decoder._extra.served != ([], None)  # so this is where it would be


@pytest.mark.parametrize(
    ("backend", "heads", "length", "dtype", "expected"),
    [
        ("cpu", 3, 512, "bfloat16", 64),
        ("gpu", 3, 512, "bfloat16", 512),
        ("gpu", 32, 512, "bfloat16", 68),
        ("gpu", 32, 512, "float32", 34),
        ("gpu", 32, 8192, "bfloat16", 16),
    ],
)
def test_as_many_rows_are_written_at_a_time_as_the_cache_allows(
    monkeypatch, backend, heads, length, dtype, expected
):
    """32 heads of 64 in 30 layers take 126 MB in bfloat16 for a row of 512 tokens."""
    config = SimpleNamespace(num_layers=30, num_kv_heads=heads, head_dim=64)
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    model = SimpleNamespace(config=config, dtype=jnp.dtype(dtype))
    assert inputs._at_a_time(model, length) == expected

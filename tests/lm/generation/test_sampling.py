"""Sampling against NumPy: which tokens can be drawn, how often each is, and clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from slidejax.lm.generation.sampling import Sampling, choose, keep

choose = jax.jit(choose, static_argnames="kind")


def allowed(logits, top_k, top_p):
    """The ids that can be drawn, by the definition."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[:top_k] if top_k else order
    chance = np.exp(np.float64(logits[order]) - logits[order[0]])
    chance /= chance.sum()
    kept, total = [], 0.0
    for i, p in zip(order, chance, strict=True):
        if kept and total >= top_p and top_p < 1:
            break
        kept.append(i)
        total += p
    return set(kept)


@examples(6)
@given(
    st.lists(st.integers(-20, 20), min_size=2, max_size=12),
    st.integers(0, 14),
    st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.9, 1.0]),
)
def test_the_kept_tokens_are_those_of_the_definition(values, top_k, top_p):
    logits = np.array(values, np.float32) / 4
    falling = np.sort(logits)[::-1]
    got = np.asarray(keep(jnp.asarray(falling), top_k, np.float32(top_p)))
    want = allowed(falling, top_k, top_p)
    # A sum that is within rounding of top_p may fall on either side.
    sums = np.cumsum(np.exp(np.float64(falling)) / np.exp(np.float64(falling)).sum())
    if top_k == 0 and np.abs(sums - top_p).min() < 1e-6:
        return
    if top_k:
        part = np.exp(np.float64(falling[:top_k]))
        if np.abs(np.cumsum(part / part.sum()) - top_p).min() < 1e-6 and top_p < 1:
            return
    assert set(np.flatnonzero(got)) == want


def draws(logits, sampling, count=4000):
    """Draws at many positions of one row each."""
    rows = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (count, 1))
    return np.asarray(choose(rows, jnp.arange(count), sampling.draw(), kind=sampling.kind))


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.6}, {"temperature": 0.5}],
)
def test_draws_have_the_right_frequencies(options):
    logits = np.array([0.3, 1.5, -1.0, 0.9, 1.1, -3.0], np.float32)
    sampling = Sampling(**{"temperature": 1.3, "seed": 5, **options})
    scaled = logits / np.float32(sampling.temperature)
    kept = sorted(allowed(scaled, sampling.top_k, sampling.top_p))
    chance = np.zeros(6)
    chance[kept] = np.exp(scaled[kept]) / np.exp(scaled[kept]).sum()
    found = np.bincount(draws(logits, sampling), minlength=6) / 4000
    assert set(np.flatnonzero(found)) <= set(kept)
    np.testing.assert_allclose(found, chance, atol=0.04)


def test_greedy_takes_the_first_of_the_likeliest():
    logits = jnp.array([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, 0.0]])
    sampling = Sampling()
    got = choose(logits, jnp.zeros(2, int), sampling.draw(), kind=sampling.kind)
    assert got.tolist() == [1, 2]


def test_top_k_of_one_and_a_tiny_temperature_are_greedy():
    logits = [0.1, 0.2, 5.0, 5.0]
    for options in ({"top_k": 1, "temperature": 9.0}, {"top_p": 1e-9, "temperature": 9.0}):
        assert set(draws(logits, Sampling(**options), 50)) == {2}
    for cold in (1e-30, 1e-40, 1e-50):  # float32 holds the last two as denormals, and not at all
        assert set(draws([0.1, 5.0, 0.2], Sampling(temperature=cold), 50)) == {1}
        assert set(draws(logits, Sampling(temperature=cold), 50)) == {2, 3}


def test_draws_differ_by_seed_row_and_position():
    logits = jnp.zeros((8, 1000))
    one = Sampling(temperature=1.0, seed=1)
    same = jnp.full(8, 7)
    first = choose(logits, same, one.draw(), kind="all")
    assert len(set(first.tolist())) > 1  # rows
    assert (choose(logits, same, one.draw(), kind="all") == first).all()
    assert (choose(logits, same + 1, one.draw(), kind="all") != first).any()
    other = Sampling(temperature=1.0, seed=2**32 - 1)
    assert (choose(logits, same, other.draw(), kind="all") != first).any()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": True},
        {"seed": 1.0},
        {"temperature": "warm"},
        {"temperature": True},
        {"temperature": np.True_},
        {"temperature": None},
        {"temperature": 1e39},
        {"temperature": 10**400},
        {"top_p": None},
        {"top_p": "0.5"},
        {"top_p": float("nan")},
    ],
)
def test_bad_numbers_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)

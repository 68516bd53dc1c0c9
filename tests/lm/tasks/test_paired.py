"""Intervals of shares and of differences."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from slidejax.lm.tasks.paired import difference, share

scores = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=30)


@given(scores)
def test_a_share_lies_in_its_interval(values):
    found = share(values)
    assert found.value == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9 or len(set(values)) > 1


@given(scores, st.randoms())
def test_a_model_against_itself_differs_by_nothing(values, random):
    found = difference(values, values)
    assert found.difference.low == found.difference.high == 0 and found.better == found.worse == 0
    if any(values):
        assert found.kept.low == found.kept.high == found.kept.value == 1
    else:
        assert np.isnan(found.kept.value)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_the_other_way_round_is_the_negative(pairs):
    ours, theirs = np.array(pairs, float).T
    one, other = difference(ours, theirs), difference(theirs, ours)
    assert one.difference.value == pytest.approx(-other.difference.value)
    assert one.difference.low == pytest.approx(-other.difference.high)
    assert (one.better, one.worse) == (other.worse, other.better)


def test_intervals_have_the_width_that_they_should():
    """Of many problems, 1.96 standard errors; and a pair of like models is known more exactly."""
    random = np.random.default_rng(0)
    ours = (random.random(400) < 0.6).astype(float)
    theirs = np.where(random.random(400) < 0.1, 1 - ours, ours)
    found, apart = share(ours), difference(ours, theirs).difference
    error = 1.96 * ours.std() / np.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(error, rel=0.05)
    error = 1.96 * (ours - theirs).std() / np.sqrt(400)
    assert (apart.high - apart.low) / 2 == pytest.approx(error, rel=0.05)
    assert apart.high - apart.low < found.high - found.low


@pytest.mark.parametrize("bad", [[], [1.5], [[0, 1]], [float("nan")]])
def test_scores_are_checked(bad):
    with pytest.raises(ValueError, match="scores must be one number from 0 to 1"):
        share(bad)


def test_models_must_have_the_same_problems():
    with pytest.raises(ValueError, match="one length, got 2, 3"):
        difference([0, 1], [0, 1, 1])

"""The batch that is not trained on: what is kept, when a training goes back, and when it checks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidejax.train.held_out import Guard, Kept, interval, steps_beside_checks
from slidejax.train.loop import Shuffled, fit
from tests.train.test_loop import ROWS, loss, params, run

HELD = np.random.default_rng(7).standard_normal((16, 32)).astype(np.float32)
LOSSES = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=12)


def held_loss(tree, rows=HELD):
    return float(jax.jit(loss)(tree, rows))


@pytest.mark.parametrize("rate", [1e-2, 3.0, 300.0])
def test_no_rate_makes_it_worse_than_its_start(rate):
    """At the two high rates the last step is far worse than the start."""
    fitted = fit(loss, params(), Shuffled(ROWS, 16), steps=60, learning_rate=rate, held_out=HELD)
    steps, losses = zip(*fitted.checked, strict=True)
    assert steps == tuple(range(0, 61, 5)) and fitted.kept == steps[int(np.argmin(losses))]
    assert losses[0] == pytest.approx(held_loss(params()), rel=1e-5)
    assert held_loss(fitted.params) == pytest.approx(min(losses), rel=1e-5)
    assert held_loss(fitted.params) <= losses[0] * (1 + 1e-5)


def test_it_goes_back_with_half_the_rate_until_it_learns():
    rate = {"steps": 100, "learning_rate": 3.0, "warmup": 0}
    alone = fit(loss, params(), Shuffled(ROWS, 16), **rate)
    guarded = fit(loss, params(), Shuffled(ROWS, 16), held_out=HELD, **rate)
    assert held_loss(guarded.params) < held_loss(alone.params)
    assert guarded.kept > 0 and held_loss(guarded.params) < 0.9 * held_loss(params())


def test_a_training_that_learns_is_not_changed():
    """Checks only look: with a good rate the steps are those of a training without them."""
    alone, guarded = run(40), run(40, held_out=HELD)
    np.testing.assert_array_equal(alone.losses, guarded.losses)
    assert alone.checked == () and alone.kept == 40
    assert guarded.kept == guarded.checked[-1][0] == 40
    jax.tree.map(np.testing.assert_array_equal, alone.params, guarded.params)


def test_parts_are_averaged():
    whole, parts = run(5, held_out=HELD), run(5, held_out=HELD, accumulate=4)
    np.testing.assert_allclose(
        [x for _, x in whole.checked], [x for _, x in parts.checked], rtol=1e-3
    )
    with pytest.raises(ValueError, match="accumulate=4 does not divide a batch of 6"):
        run(5, held_out=HELD[:6], accumulate=4)


def test_an_optimizer_of_ones_own_keeps_its_steps():
    """Its rate is not ours to halve; the best parameters are kept all the same."""
    own = {"optimizer": optax.sgd(10.0), "steps": 10}
    alone = fit(loss, params("float32"), Shuffled(ROWS, 16), **own)
    guarded = fit(loss, params("float32"), Shuffled(ROWS, 16), held_out=HELD, **own)
    np.testing.assert_array_equal(alone.losses, guarded.losses)
    assert guarded.kept == 0
    jax.tree.map(np.testing.assert_array_equal, guarded.params, params("float32"))


def test_minutes_leave_time_for_checks():
    fitted = fit(loss, params(), Shuffled(ROWS, 16), minutes=0.01, held_out=HELD)
    assert fitted.checked[0][0] == 0 and fitted.checked[-1][0] == fitted.steps
    assert fitted.seconds < 30


@given(LOSSES, st.booleans())
def test_the_lowest_is_kept(losses, back):
    """The guard by itself: any losses, each of parameters of their own."""
    guard, kept = Guard(lambda tree: tree["loss"], back), Kept()
    lowest = np.inf
    for i, value in enumerate(losses):
        after = guard.check(kept, i, {"loss": jnp.float32(value), "name": jnp.int32(i)})
        lowest = min(lowest, value)
        assert float(kept.best["loss"]) == lowest == kept.lowest()[1]
        assert int(kept.best["name"]) == kept.lowest()[0] == int(np.argmin(losses[: i + 1]))
        went_back = int(after["name"]) != i
        lost = value > lowest + (losses[0] - lowest) / 2
        assert went_back == (back and lost)
    assert kept.checked == list(enumerate(losses))


def test_a_loss_that_is_no_number_is_worse_than_any():
    guard, kept = Guard(lambda x: x, back=True), Kept()
    assert guard.check(kept, 0, jnp.float32(2)) == 2
    assert guard.check(kept, 5, jnp.float32(np.nan)) == 2
    assert kept.scale == 0.5 and kept.lowest() == (0, 2.0)


@given(st.integers(1, 3000))
def test_checks_are_few_and_the_last_step_has_one(total):
    guard, kept = Guard(lambda x: x, back=True), Kept()
    due = [step for step in range(total + 1) if guard.due(kept, step, total)]
    assert due[0] == 0 and due[-1] == total and len(due) <= 22
    assert all(b - a >= 5 for a, b in itertools.pairwise(due[:-1]))
    assert not any(guard.due(kept, step, None) for step in range(1, total + 1))


@given(st.integers(0, 3000))
def test_steps_and_checks_fit_into_the_time(steps):
    made = steps_beside_checks(steps)
    checks = made // interval(made) + 1 if made else 0
    assert 0 <= made <= steps and made + 0.5 * checks <= 1.02 * steps + 1

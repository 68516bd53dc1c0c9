"""The training loop on one layer: masks, rounding, resuming, accumulation, schedule, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import slidejax as sj
import slidejax.checkpoint
from slidejax.train.loop import Shuffled, fit

ROWS = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
TARGET = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)


def loss(params, x):
    y = sj.linear(x.astype(params["bias"].dtype), params["kernel"], params["bias"])
    return jnp.mean((y - x @ TARGET) ** 2)


def params(dtype="int8", bias="float32"):
    return {
        "kernel": sj.pack(jnp.asarray(TARGET + 0.5), "6:8", dtype=dtype),
        "bias": jnp.zeros(8, bias),
    }


def run(steps=30, tree=None, **options):
    return fit(
        loss,
        params() if tree is None else tree,
        Shuffled(ROWS, 16),
        steps=steps,
        learning_rate=2e-2,
        warmup=3,
        **options,
    )


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("dtype", "qdtype"),
    [("int8", None), ("float8_e4m3fn", None), ("float32", "int8"), ("float32", None)],
)
def test_it_learns_on_the_mask(dtype, qdtype):
    fitted = run(60, params(dtype), qdtype=qdtype)
    assert (
        fitted.losses.shape == (60,) and fitted.losses[-5:].mean() < 0.5 * fitted.losses[:5].mean()
    )
    assert fitted.params["kernel"].dtype == (qdtype or dtype)
    np.testing.assert_array_equal(fitted.params["kernel"].zeros, params()["kernel"].zeros)
    assert (np.asarray(fitted.params["bias"]) != 0).any()


def test_what_is_returned_is_what_the_training_saw():
    """One more step would start from the loss that the returned 8-bit weight has."""
    whole, part = run(9, every=100), run(9, trained="kernel/values")
    batch = Shuffled(ROWS, 16)
    seen = fit(
        loss, whole.params, batch, steps=1, learning_rate=1e-9, optimizer=optax.sgd(0.0)
    ).losses[0]
    assert seen == np.float32(jax.jit(loss)(whole.params, batch(0)))
    np.testing.assert_array_equal(part.params["bias"], 0)


def test_floating_leaves_keep_their_dtype():
    fitted = run(5, params(bias="bfloat16"))
    assert fitted.params["bias"].dtype == jnp.bfloat16


def test_the_same_run_twice_is_the_same():
    a, b = run(12), run(12)
    same(a.params, b.params)
    np.testing.assert_array_equal(a.losses, b.losses)


@pytest.mark.parametrize(("stop", "guard"), [(4, {}), (7, {}), (5, {"held_out": ROWS[:16]})])
def test_resumed_equals_uninterrupted(tmp_path, stop, guard):
    class Interrupted(Exception):
        pass

    def interrupt(step, total, value):
        assert total == 12
        if step == stop + 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(12, checkpoint=tmp_path / "state", every=stop, progress=interrupt, **guard)
    seen = []
    resumed = run(
        12,
        checkpoint=tmp_path / "state",
        every=stop,
        progress=lambda step, total, value: seen.append(step),
        **guard,
    )
    assert seen == list(range(stop + 1, 13))
    whole = run(12, **guard)
    same(resumed.params, whole.params)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    assert resumed.checked == whole.checked and resumed.kept == whole.kept
    again = run(12, checkpoint=tmp_path / "state", every=stop, **guard)  # it is done: it stays
    same(again.params, whole.params)
    with pytest.raises(ValueError, match="other parameters or settings"):
        run(13, checkpoint=tmp_path / "state", **guard)
    with pytest.raises(ValueError, match="other parameters or settings"):
        run(12, checkpoint=tmp_path / "state", typical=1.0, **guard)
    other = {} if guard else {"held_out": ROWS[:16]}
    with pytest.raises(ValueError, match="other parameters or settings"):
        run(12, checkpoint=tmp_path / "state", **other)


def test_accumulation_averages():
    parts, whole = run(6, accumulate=4), run(6)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-3)
    with pytest.raises(ValueError, match="accumulate=3 does not divide a batch of 16"):
        run(2, accumulate=3)


def test_an_optimizer_of_ones_own():
    fitted = run(3, optimizer=optax.sgd(0.0))
    same(fitted.params, run(1, optimizer=optax.sgd(0.0)).params)


@pytest.mark.parametrize(("size", "share"), [(0.0, 0.01), (0.1, 0.05), (2.0, 1.0), (50.0, 1.0)])
def test_small_leaves_take_small_steps(size, share):
    """The first step of Adam changes each value by the learning rate, times the leaf's share."""
    tree = {"a": jnp.full((4, 4), size), "b": jnp.full(3, -2.0)}

    def gap(p, x):
        return sum(jnp.sum((leaf - 100) ** 2) for leaf in jax.tree.leaves(p))

    options = {"steps": 1, "learning_rate": 0.5, "warmup": 0}
    made = fit(gap, tree, Shuffled(ROWS, 16), typical=2.0, **options).params
    np.testing.assert_allclose(made["a"] - tree["a"], 0.5 * share, rtol=1e-4)
    np.testing.assert_allclose(made["b"] - tree["b"], 0.5, rtol=1e-4)
    equal = fit(gap, tree, Shuffled(ROWS, 16), **options).params
    np.testing.assert_allclose(equal["a"] - tree["a"], 0.5, rtol=1e-4)


def test_minutes_become_steps():
    totals = []
    fitted = fit(
        loss,
        params(),
        Shuffled(ROWS, 16),
        minutes=0.01,
        progress=lambda step, total, value: totals.append(total),
    )
    assert totals[0] is None and totals[-1] == fitted.steps == len(fitted.losses)
    assert fitted.seconds < 30


def test_every_row_is_seen_once_an_epoch():
    batches = Shuffled(np.arange(10), 3, seed=5)
    epochs = [np.concatenate([batches(e * 3 + i) for i in range(3)]) for e in range(3)]
    assert all(len(set(e.tolist())) == 9 for e in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None}, "either steps or minutes"),
        ({"minutes": 1}, "either steps or minutes"),
        ({"steps": 0}, "steps must be from 1"),
        ({"accumulate": 0}, "accumulate must be from 1"),
        ({"trained": "nothing"}, "selects none"),
        ({"typical": 0.0}, "typical must be above 0"),
        ({"typical": 1.0, "optimizer": optax.sgd(0.1)}, "with an optimizer of your own"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
    with pytest.raises(ValueError, match="size must be in"):
        Shuffled(ROWS, 65)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(ValueError, match="the loss is nan at step"):
        fit(lambda p, x: loss(p, x) * jnp.nan, params(), Shuffled(ROWS, 16), steps=3)


def poisoned(at):
    """Batches of which one holds nan."""
    good = Shuffled(ROWS, 16)
    return lambda step: good(step) * np.float32(np.nan if step == at else 1)


@pytest.mark.parametrize("at", [0, 3])
def test_nan_in_the_last_step_is_seen(at):
    with pytest.raises(ValueError, match=f"the loss is nan at step {at + 1}:"):
        fit(loss, params(), poisoned(at), steps=at + 1)


def test_parameters_that_are_not_finite_are_no_result():
    """The loss is finite, its gradient is not."""

    @jax.custom_vjp
    def broken(x):
        return x

    broken.defvjp(lambda x: (x, None), lambda _, dy: (dy * jnp.nan,))
    with pytest.raises(ValueError, match="parameters are not finite after step 1"):
        fit(lambda p, x: broken(loss(p, x)), params(), Shuffled(ROWS, 16), steps=1)


@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_good_state_is_not_replaced_by_a_bad_one(tmp_path, at):
    """With states after steps 2, 4 and 6; the bad batch makes the state after it bad."""
    options = {"steps": 8, "checkpoint": tmp_path / "state", "every": 2}
    with pytest.raises(ValueError, match=r"not finite|the loss is nan"):
        fit(loss, params(), poisoned(at), **options)
    resumed = fit(loss, params(), Shuffled(ROWS, 16), **options)
    whole = fit(loss, params(), Shuffled(ROWS, 16), steps=8)
    same(resumed.params, whole.params)


def test_a_damaged_state_is_one_error(tmp_path):
    run(4, checkpoint=tmp_path / "state")
    good = sj.checkpoint.load(tmp_path / "state")
    for key, value in [
        ("step", -1),
        ("step", None),
        ("seconds", float("nan")),
        ("total", 4.5),
        ("losses", np.zeros(3, np.float32)),
        ("train", good["train"][1:]),
        ("train", [leaf[..., :1] for leaf in good["train"]]),
        ("train", [leaf * jnp.nan for leaf in good["train"]]),
        ("memory", None),
    ]:
        sj.checkpoint.save(tmp_path / "state", {**good, key: value})
        with pytest.raises(ValueError, match=r"state'.*('?" + key + "'?|not finite)"):
            run(4, checkpoint=tmp_path / "state")

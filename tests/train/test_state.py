"""A training goes on from its own state, and from that of no other."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
import slidejax.checkpoint
from slidejax.train.loop import Shuffled, fit

pytest.importorskip("optax")

ROWS = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
KERNEL = np.random.default_rng(1).standard_normal((16, 4)).astype(np.float32)
ASIDE = ROWS[:4] + 1


def loss(params, x, scale):
    return jnp.mean((sj.linear(x, params["kernel"]) - scale * x[:, :4]) ** 2)


def params(kernel=KERNEL, **options):
    return {"kernel": sj.pack(kernel, "6:8", **options), "free": jnp.ones(3)}


def run(folder, steps=2, tree=None, batches=None, scale=1.0, **options):
    options = {"qdtype": "int8", "held_out": ASIDE, **options}
    batches = Shuffled(ROWS, 4) if batches is None else batches
    return fit(
        loss,
        params() if tree is None else tree,
        batches,
        jnp.float32(scale),
        steps=steps,
        checkpoint=folder,
        **options,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The state of a training that is done, and its result."""
    folder = tmp_path_factory.mktemp("done") / "state"
    return folder, run(folder)


CHANGED = ROWS.copy()
CHANGED[7, 3] += 1e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batches": Shuffled(CHANGED, 4)}, "its batches"),
        ({"batches": Shuffled(ROWS, 4, seed=1)}, "its batches and batch 0 and last batch differ"),
        ({"batches": lambda step: ROWS[4 : 8]}, "its batch 0 and last batch differ"),
        ({"batches": lambda step: Shuffled(ROWS, 4)(step) + (step == 1)}, "its last batch differ"),
        ({"tree": params(KERNEL + 1e-3)}, "its params differ"),
        ({"tree": params(-KERNEL)}, "its params differ"),
        ({"scale": 2.0}, "its args differ"),
        ({"held_out": ASIDE + 1e-3}, "its held_out differ"),
        ({"qdtype": "float8_e4m3fn"}, "its qdtype differ"),
        ({"steps": 3}, r"\(steps 2 and not 3\)"),
        ({"learning_rate": 1e-3, "warmup": 5}, r"\(learning_rate 0.0003 and not 0.001, warmup 20"),
        ({"held_out": None}, r"\(held_out True and not False\)"),
        ({"tree": {**params(), "free": jnp.ones(4)}}, "leaves of other shapes"),
        ({"tree": {"kernel": params()["kernel"], "fee": jnp.ones(3)}}, "its params and trained"),
    ],
)  # fmt: skip
def test_a_state_of_another_training_is_refused_with_what_differs(done, change, said):
    with pytest.raises(ValueError, match=f"state' is of a training with other .*{said}"):
        run(done[0], **change)


def test_the_same_training_is_continued(done):
    folder, first = done
    seen = []
    same = Shuffled(ROWS.copy(), 4)
    for batches in (same, lambda step: jnp.asarray(same(step))):
        again = run(folder, batches=batches, progress=lambda *step: seen.append(step), every=1)
        jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    assert not seen


def test_a_state_of_an_earlier_version_is_read_with_a_warning(done, tmp_path):
    folder, first = done
    saved = sj.checkpoint.load(folder)
    del saved["data"]
    sj.checkpoint.save(tmp_path / "old", saved)
    with pytest.warns(UserWarning, match="old' is of an earlier version, .* not checked"):
        again = run(tmp_path / "old")
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(folder)


def test_keys_of_random_numbers_may_be_arguments(tmp_path):
    def noisy(params, x, key):
        return loss(params, x, 1.0) + 0 * jax.random.normal(key)

    for key, good in ((0, True), (0, True), (1, False)):

        def train(key=key):
            fit(noisy, params(), Shuffled(ROWS, 4), jax.random.key(key), steps=1, checkpoint=tmp_path / "state")  # fmt: skip

        if good:
            train()
        else:
            with pytest.raises(ValueError, match="its args differ"):
                train()


def test_numbers_of_numpy_are_those_of_python(done, tmp_path):
    folder, first = done
    same = {"learning_rate": np.array(3e-4), "warmup": np.int64(20), "every": np.int32(1)}
    again = run(folder, steps=np.int64(2), **same)
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    run(tmp_path / "state", steps=np.int16(1), learning_rate=np.float32(3e-4))


def test_prepared_forms_of_arguments_are_no_other_data(tmp_path):
    teacher = sj.pack(KERNEL, "6:8", dtype="int8")
    for form in (teacher, sj.prepare(teacher, "dense")):
        fit(
            lambda params, x, w: loss(params, x, sj.linear(x, w)),
            *(params(), Shuffled(ROWS, 4), form),
            steps=1,
            checkpoint=tmp_path / "state",
        )

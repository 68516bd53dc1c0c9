import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from slidejax.prune import magnitude, wanda


def test_wanda_is_magnitude_where_inputs_are_alike():
    kernel = jnp.asarray(np.random.default_rng(5).standard_normal((24, 12)), jnp.float32)
    np.testing.assert_array_equal(wanda(kernel, "6:8", jnp.ones(24)), magnitude(kernel, "6:8"))
    np.testing.assert_array_equal(wanda(kernel, "6:8", jnp.eye(24)), magnitude(kernel, "6:8"))


@examples(6)
@given(st.sampled_from(["2:4", "6:8", "14:16"]), st.integers(1, 40), st.integers(0, 99))
def test_each_group_loses_its_two_lowest_scores(pattern, columns, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((columns, 3)).astype(np.float32)
    energy = np.exp(rng.standard_normal(columns)).astype(np.float32)
    mask = np.asarray(wanda(jnp.asarray(kernel), pattern, jnp.asarray(energy)))
    score, size = np.abs(kernel) * np.sqrt(energy)[:, None], int(pattern.split(":")[1])
    for begin in range(0, columns, size):
        group, kept = score[begin : begin + size], mask[begin : begin + size]
        # The missing columns of a last partial group are pruned first.
        pruned = max(0, 2 - (size - len(group)))
        assert ((~kept).sum(0) == pruned).all()
        if pruned:
            assert (
                np.where(kept, -np.inf, group).max(0) <= np.where(kept, group, np.inf).min(0)
            ).all()


def test_only_the_diagonal_is_read():
    rng = np.random.default_rng(0)
    kernel, x = jnp.asarray(rng.standard_normal((16, 4))), rng.standard_normal((32, 16))
    gram = jnp.asarray(x.T @ x)
    np.testing.assert_array_equal(
        wanda(kernel, "6:8", gram), wanda(kernel, "6:8", jnp.diagonal(gram))
    )
    assert np.asarray(wanda(kernel, "dense", gram)).all()


@pytest.mark.parametrize(
    ("kernel", "gram"), [((16, 4), (8, 8)), ((16, 4), (8,)), ((2, 8, 4), (8,))]
)
def test_shapes_that_do_not_fit(kernel, gram):
    with pytest.raises(ValueError, match=r"gram must be|kernel must be \[in, out\]"):
        wanda(jnp.ones(kernel), "6:8", jnp.ones(gram))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_an_error(bad):
    with pytest.raises(ValueError, match="gram holds inf or nan"):
        wanda(jnp.ones((8, 2)), "6:8", jnp.ones(8).at[3].set(bad))

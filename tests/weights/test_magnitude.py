import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patterns import PATTERNS

import slidejax as sj


@given(st.sampled_from(PATTERNS), st.sampled_from([1, 3, 10, 64, 70]), st.integers(0, 2**32 - 1))
def test_keeps_the_largest(pattern, rows, seed):
    p = sj.Pattern.parse(pattern)
    kernel = np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32)
    mask = np.asarray(sj.prune.magnitude(kernel, pattern))
    for start in range(0, rows, p.group):
        group, kept = np.abs(kernel[start : start + p.group]), mask[start : start + p.group]
        # The missing columns are pruned first.
        dropped = max(0, p.group - p.kept - (p.group - len(group)))
        assert ((~kept).sum(0) == min(dropped, len(group))).all()
        for column in range(4):
            if dropped and (~kept[:, column]).any() and kept[:, column].any():
                assert group[~kept[:, column], column].max() <= group[kept[:, column], column].min()


def test_ties_and_special_values():
    assert (
        sj.prune.magnitude(jnp.ones((8, 1)), "6:8").ravel().tolist() == [False, False] + [True] * 6
    )
    kernel = jnp.array([[1.0], [jnp.nan], [jnp.inf], [2.0]])
    assert sj.prune.magnitude(kernel, "2:4").ravel().tolist() == [False, True, True, False]
    everything_infinite = sj.prune.magnitude(jnp.full((8, 1), jnp.inf), "6:8")
    assert int(everything_infinite.sum()) == 6, "two must go even where nothing is smaller"


def test_under_jit_and_batched():
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((2, 30, 5)), jnp.float32)
    mask = jax.jit(lambda k: sj.prune.magnitude(k, "6:8"))(kernel)
    np.testing.assert_array_equal(mask[1], sj.prune.magnitude(kernel[1], "6:8"))


def test_bad_kernel():
    with pytest.raises(ValueError, match="kernel"):
        sj.prune.magnitude(jnp.ones(8), "6:8")

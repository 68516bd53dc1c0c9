import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from patterns import PATTERNS

import slidejax as sj
from slidejax.weights import layout

patterns = st.sampled_from(PATTERNS)
seeds = st.integers(0, 2**32 - 1)


def random_kernel(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@examples(6)
@given(patterns, st.sampled_from([1, 3, 64, 70]), seeds)
def test_groups_are_padded_with_the_fill_and_cut_off_again(pattern, rows, seed):
    p, kernel = sj.Pattern.parse(pattern), random_kernel(seed, (rows, 3))
    groups = layout.to_groups(kernel, p, fill=7)
    assert groups.shape == (3, p.groups(rows), p.group)
    assert (groups.reshape(3, -1)[:, rows:] == 7).all()
    np.testing.assert_array_equal(layout.from_groups(groups, rows), kernel)


@examples(6)
@given(patterns, seeds)
def test_scatter_is_the_inverse_of_keeping(pattern, seed):
    w = sj.pack(random_kernel(seed, (64, 3)), pattern)
    again = sj.pack(
        jnp.swapaxes(layout.scatter_values(w.values, w.zeros).reshape(3, -1), 0, 1), pattern
    )
    np.testing.assert_array_equal(again.values, w.values)


def test_what_is_no_kernel():
    for kernel in (jnp.ones(8), 3.0):
        with pytest.raises(ValueError, match=r"k must be \[\.\.\., in, out\]"):
            layout.check_kernel(kernel, "k")
    w = sj.pack(jnp.ones((8, 2)), "6:8")
    for packed in (w, sj.trainable.masters(w, "int8")):
        with pytest.raises(TypeError, match="k is packed already"):
            layout.check_kernel(packed, "k")

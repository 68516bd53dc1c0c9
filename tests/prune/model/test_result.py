"""The results of pruning kernels, as conversions take them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.prune.model.result import Pruned, lookup

PATTERN = sj.Pattern.parse("6:8")


def pruned(scale=None):
    kernel = jax.random.normal(jax.random.key(0), (16, 4))
    mask = sj.prune.magnitude(kernel, PATTERN)
    return Pruned(mask, jnp.where(mask, kernel, 0), scale)


@pytest.mark.parametrize("scale", [None, jnp.full(4, 0.5)])
def test_only_a_kernel_that_is_not_rounded_gets_the_models_dtype(scale):
    result = pruned(scale)
    mask, kernel, given = result.to_pack(jnp.bfloat16)
    assert kernel.dtype == (jnp.bfloat16 if scale is None else jnp.float32)
    assert given is scale
    np.testing.assert_array_equal(mask, result.mask)


def test_kernels_are_found_by_their_paths():
    result = pruned()
    prune = lookup({"up/kernel": result})
    original = jnp.ones((16, 4), jnp.float16)
    mask, kernel, scale = prune(original, PATTERN, "up/kernel")
    assert kernel.dtype == jnp.float16 and scale is None
    np.testing.assert_array_equal(mask, result.mask)
    with pytest.raises(ValueError, match="no calibration inputs reached this layer"):
        prune(original, PATTERN, "down/kernel")


def test_it_is_a_pytree():
    double = jax.tree.map(lambda leaf: leaf * 2, pruned(jnp.ones(4)))
    assert isinstance(double, Pruned) and (double.scale == 2).all()
    assert len(jax.tree.leaves(pruned())) == 2

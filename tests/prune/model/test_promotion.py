"""Calibration where users ask JAX for strict promotion of dtypes: the same models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.lm.decoder.examples import tiny

IDS = np.random.default_rng(0).integers(0, 64, (2, 32)).astype(np.int32)


def model(dtype):
    made = tiny(num_layers=1)
    params = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, made.params)
    return made.with_params(params)


@pytest.mark.parametrize(
    ("dtype", "pattern", "method"),
    [("float32", "6:8", "sparsegpt"), ("bfloat16", "6:8", "wanda"), ("float32", "dense", "wanda")],
)
def test_calibration_needs_no_promotion(dtype, pattern, method):
    original = model(dtype)
    want = sj.lm.convert(original, pattern, method, IDS)
    with jax.numpy_dtype_promotion("strict"):
        got = sj.lm.convert(original, pattern, method, IDS)
    for one, other in zip(jax.tree.leaves(want.params), jax.tree.leaves(got.params), strict=True):
        np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


def test_mixed_patterns_need_no_promotion():
    def mixed():
        return sj.prune.mixed(model("bfloat16"), "6:8", IDS, patterns=("6:8", "4:6"))

    with jax.numpy_dtype_promotion("strict"):
        rules = mixed()
    assert rules == mixed()

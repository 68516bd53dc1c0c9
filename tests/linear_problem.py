"""A random `linear`, and a comparison of results, for the tests of the products."""

import jax.numpy as jnp
import numpy as np

import slidejax as sj


def problem(seed, rows, columns, features, pattern, dtype, x_dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, columns)), x_dtype)
    kernel = jnp.asarray(rng.standard_normal((columns, features)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(features), jnp.float32)
    return x, sj.pack(kernel, pattern, dtype=dtype), bias


def close(actual, desired, tolerance):
    actual, desired = np.asarray(actual, np.float32), np.asarray(desired, np.float32)
    assert actual.shape == desired.shape
    assert np.abs(actual - desired).max(initial=0) <= tolerance * np.abs(desired).max(initial=1e-6)

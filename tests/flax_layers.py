"""The parts that the tests of our layers against Flax's own share."""

import jax.numpy as jnp
import numpy as np


def data(*shape, dtype=jnp.float32):
    values = np.random.default_rng(0).normal(size=shape) * 3
    return jnp.asarray(values).astype(dtype)


def agree(got, want, rounded_to=None):
    """Equal but for the order of sums; Flax may have rounded its product to a narrower dtype."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    step = 2 * float(jnp.finfo(rounded_to or want.dtype).eps)
    wide = [np.asarray(y, np.float32) for y in (got, want)]
    scale = np.abs(wide[1]).max(initial=1.0)
    np.testing.assert_allclose(*wide, rtol=8 * step, atol=8 * step * scale)

import jax.numpy as jnp
import numpy as np

from slidejax.prune import magnitude, wanda


def test_wanda_is_magnitude_where_inputs_are_alike():
    kernel = jnp.asarray(np.random.default_rng(5).standard_normal((24, 12)), jnp.float32)
    np.testing.assert_array_equal(wanda(kernel, "6:8", jnp.ones(24)), magnitude(kernel, "6:8"))
    np.testing.assert_array_equal(wanda(kernel, "6:8", jnp.eye(24)), magnitude(kernel, "6:8"))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slidejax.bench import timing


@pytest.mark.parametrize("inputs", [1, 4])
@pytest.mark.parametrize("loops", [1, pytest.param(3, marks=pytest.mark.gpu)])
def test_every_application_that_is_counted_runs(inputs, loops):
    """XLA drops results that nobody reads, and computes equal products only once."""
    ran = []

    def apply(x, weights):
        def count(product):
            ran.append(1)
            return product

        product = x @ weights
        return jax.pure_callback(count, product, product)

    xs = [jnp.full((2, 3), float(i)) for i in range(inputs)]
    program = timing._program(timing.Contender("counted", apply, jnp.ones((3, 5))), xs, loops)
    copies = 16 if jax.default_backend() == "gpu" else 1  # copies of small weights
    results = program.room()
    for _ in range(2):  # the second call writes into the results of the first
        ran.clear()
        results = jax.block_until_ready(program(results))
        assert len(ran) == program.applications == loops * max(2, inputs, copies)
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result, xs[i % inputs] @ jnp.ones((3, 5)))

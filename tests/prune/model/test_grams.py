"""The inputs of layers, summed up."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.prune.model.grams import collect


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(24, name="shared")
        return nn.Dense(8, name="last")(jnp.tanh(layer(jnp.tanh(layer(x)))))


def test_grams_add_up_over_calls_and_batches():
    model, x = Twice(), jax.random.normal(jax.random.key(0), (4, 5, 24))
    variables = model.init(jax.random.key(1), x)
    done = []
    grams = collect(sj.linen.functional(model, variables).run, variables, list(x), done.append)
    assert set(grams) == {"shared/kernel", "last/kernel"} and done == [1, 2, 3, 4]
    _, state = model.apply(variables, x.reshape(20, 24), capture_intermediates=True)
    first, second = state["intermediates"]["shared"]["__call__"]
    both = np.concatenate([x.reshape(20, 24), np.tanh(first)])
    np.testing.assert_allclose(grams["shared/kernel"], both.T @ both, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        grams["last/kernel"], np.tanh(second).T @ np.tanh(second), rtol=1e-4, atol=1e-3
    )
    diagonals = collect(
        sj.linen.functional(model, variables).run, variables, list(x), diagonal=True
    )
    assert set(diagonals) == set(grams)
    for path, diagonal in diagonals.items():
        np.testing.assert_allclose(diagonal, np.diagonal(grams[path]), rtol=1e-5)


def test_there_must_be_a_batch():
    with pytest.raises(ValueError, match="no batches"):
        collect(lambda p, b: None, {}, [])


def test_batches_of_very_different_sizes_add_up():
    model, x = nn.Dense(8), jax.random.normal(jax.random.key(0), (24, 16))
    params = model.init(jax.random.key(1), x)
    run = sj.linen.functional(model, params).run
    want = collect(run, params, [x])["kernel"]
    for small, order in ((1e-25, 1), (1e-25, -1)):
        got = collect(run, params, [x, x * small][::order])["kernel"]
        np.testing.assert_allclose(got, want, rtol=1e-6)

"""The decoder of `slidejax bench --model` computes what a decoder computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slidejax.bench import decoder
from slidejax.bench.shapes import Sizes

SIZES = {
    "grouped queries": Sizes(32, 48, 4, 2, 8, layers=2, vocabulary=64),
    "one key head": Sizes(24, 40, 3, 1, 8, layers=1, theta=1e5, vocabulary=64),
    "every query has its own": Sizes(16, 24, 2, 2, 8, layers=3, vocabulary=64),
}
BATCH, LENGTH = 2, 5


def multiply(x, w):
    return (x.astype(jnp.float32) @ w.T.astype(jnp.float32)).astype(x.dtype)


@pytest.fixture(params=SIZES)
def case(request):
    """Sizes, weights and inputs `[batch, length, hidden]`."""
    sizes = SIZES[request.param]
    keys = iter(jax.random.split(jax.random.key(0), 64))
    weights = [
        {
            name: jax.random.normal(next(keys), shape, jnp.bfloat16) * shape[1] ** -0.5
            for name, shape in sizes.linears.items()
        }
        for _ in range(sizes.layers)
    ]
    return sizes, weights, jax.random.normal(next(keys), (BATCH, LENGTH, sizes.hidden), "bfloat16")


def one_position(sizes, weights, x, caches, position):
    """x `[batch, 1, hidden]` after all blocks at a position, and the caches."""
    new = []
    for w, cache in zip(weights, caches, strict=True):
        attend = functools.partial(decoder._attend_cached, cache, jnp.asarray(position))
        x, cache = decoder.block(sizes, multiply, x, w, attend, jnp.asarray([position]))
        new.append(cache)
    return x, new


def test_positions_one_by_one_are_a_prefill(case):
    sizes, weights, x = case
    attention = decoder.attention_here(pytest.fail)
    together = decoder.prefill(sizes, multiply, attention, weights, x)
    caches = decoder.caches(sizes, len(weights), BATCH, LENGTH)
    for position in range(LENGTH):
        y, caches = one_position(sizes, weights, x[:, position : position + 1], caches, position)
        np.testing.assert_allclose(
            np.asarray(y[:, 0], np.float32),
            np.asarray(together[:, position], np.float32),
            atol=0.1,
        )
    assert float(jnp.abs(together - x).max()) > 1  # the blocks did something


def test_later_positions_are_not_seen(case):
    sizes, weights, x = case
    attention = decoder.attention_here(pytest.fail)
    run = functools.partial(decoder.prefill, sizes, multiply, attention, weights)
    changed = x.at[:, -1].set(1)
    np.testing.assert_array_equal(run(x)[:, :-1], run(changed)[:, :-1])
    assert (run(x)[:, -1] != run(changed)[:, -1]).any()


def test_the_loop_decodes_as_a_plain_loop_does(case):
    sizes, weights, _ = case
    steps = 3
    embedding, head = (
        jax.random.normal(jax.random.key(i), (sizes.vocabulary, sizes.hidden), jnp.bfloat16)
        for i in (1, 2)
    )
    caches = decoder.caches(sizes, len(weights), BATCH, LENGTH)
    filled = [
        tuple(jax.random.normal(jax.random.key(i), a.shape, a.dtype) for i, a in enumerate(pair))
        for pair in caches
    ]
    got, got_caches = decoder.decode(sizes, multiply, steps, weights, (embedding, head), filled)
    tokens, expected = jnp.zeros(BATCH, jnp.int32), []
    for position in range(LENGTH - steps, LENGTH):
        x, filled = one_position(sizes, weights, embedding[tokens][:, None], filled, position)
        v = x[:, 0].astype(jnp.float32)
        v = v / jnp.sqrt((v * v).mean(-1, keepdims=True) + sizes.eps)
        tokens = jnp.argmax(
            v.astype(jnp.bfloat16).astype(jnp.float32) @ head.T.astype("float32"), -1
        )
        expected.append(tokens)
    np.testing.assert_array_equal(got, jnp.stack(expected))
    for pair, wanted in zip(got_caches, filled, strict=True):
        for a, b in zip(pair, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(a, "float32"), np.asarray(b, "float32"), atol=0.1)


def test_without_cudnn_a_gpu_takes_xlas_attention_and_says_so(monkeypatch):
    """A CPU has no cuDNN either, so its error is the real one."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    said = []
    attention = decoder.attention_here(said.append)
    assert len(said) == 1 and "cuDNN's does not run here" in said[0]
    x = jnp.ones((1, 3, 2, 8), jnp.bfloat16)
    np.testing.assert_array_equal(attention(x, x, x), x)

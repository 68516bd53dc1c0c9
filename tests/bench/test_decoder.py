"""The decoder of `slidejax bench --model` is that of `slidejax.lm`, whoever multiplies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slidejax.bench import decoder
from slidejax.bench.shapes import Sizes
from slidejax.lm.decoder.apply import apply
from slidejax.ops.linear import linear

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
    """Configuration, weights `[out, in]` of the blocks, and parameters."""
    sizes = SIZES[request.param]
    keys = iter(jax.random.split(jax.random.key(0), 64))
    normal = lambda *shape: jax.random.normal(next(keys), shape, jnp.bfloat16)  # noqa: E731
    weights = [
        {name: normal(*shape) * shape[1] ** -0.5 for name, shape in sizes.linears.items()}
        for _ in range(sizes.layers)
    ]
    ends = normal(sizes.vocabulary, sizes.hidden), normal(sizes.hidden, sizes.vocabulary)
    config = decoder.config_of(sizes, sizes.layers)
    return config, weights, decoder.parameters(sizes, multiply, weights, ends)


def prompt(config):
    return jax.random.randint(jax.random.key(3), (BATCH, LENGTH), 0, config.vocab_size)


def test_a_rivals_layer_takes_the_place_of_a_kernel(case):
    config, weights, params = case
    sizes = next(s for s in SIZES.values() if s.hidden == config.hidden_size)
    ends = params["model"]["embed_tokens"]["embedding"], params["lm_head"]["kernel"]
    kernels = [{name: w.T for name, w in block.items()} for block in weights]
    plain = decoder.parameters(sizes, None, kernels, ends)
    prefill = jax.jit(functools.partial(decoder.prefill, config))
    got, want = (prefill(p, prompt(config)) for p in (params, plain))
    np.testing.assert_allclose(got, want, atol=0.1)
    assert float(jnp.abs(want).max()) > 1


def test_tokens_one_by_one_are_a_prefill(case):
    config, _, params = case
    ids, cache = prompt(config), decoder.caches(config, BATCH, LENGTH)
    step = jax.jit(functools.partial(apply, config, last=True))
    for i in range(LENGTH):
        logits, cache = step(params, ids[:, i : i + 1], jnp.full((BATCH, 1), i), cache)
    whole = jax.jit(functools.partial(decoder.prefill, config))(params, ids)
    np.testing.assert_allclose(logits, whole, atol=0.2)


def test_the_loop_decodes_as_a_plain_loop_does(case):
    config, _, params = case
    steps = 3
    empty = decoder.caches(config, BATCH, LENGTH)
    filled = jax.tree.map(lambda a: jax.random.normal(jax.random.key(1), a.shape, a.dtype), empty)
    run = jax.jit(functools.partial(decoder.decode, config, steps))
    got, got_cache = run(params, filled)
    step = jax.jit(functools.partial(apply, config, last=True))
    tokens, expected = jnp.zeros(BATCH, jnp.int32), []
    for position in range(LENGTH - steps, LENGTH):
        at = jnp.full((BATCH, 1), position)
        logits, filled = step(params, tokens[:, None], at, filled)
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)
        expected.append(tokens)
    np.testing.assert_array_equal(got, jnp.stack(expected))
    for a, b in zip(jax.tree.leaves(got_cache), jax.tree.leaves(filled), strict=True):
        np.testing.assert_allclose(np.asarray(a, "float32"), np.asarray(b, "float32"), atol=0.1)


def test_a_rivals_layer_does_what_linear_asks_of_a_weight():
    w = jnp.arange(6.0).reshape(2, 3)
    layer = decoder.Exchanged(w, multiply, (3, 2))
    x, bias, residual = jnp.ones((4, 3)), jnp.array([1.0, 2.0]), jnp.full((4, 2), 10.0)
    y = linear(x, layer, bias, residual=residual, out_dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16 and y[0].tolist() == [14.0, 24.0]
    assert layer.shape == (3, 2) and layer.packed is None
    assert jax.tree.leaves(layer.trained()) == [False]

"""Attention by blocks against attention at once, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from slidejax.lm.decoder import attention
from slidejax.lm.decoder.apply import apply
from slidejax.lm.decoder.attention import attend, attend_whole
from slidejax.lm.decoder.cache import LayerCache, init_cache
from slidejax.lm.decoder.examples import tiny


def plain(q, k, v, query_positions, key_positions, scale, window):
    """Attention in float64 NumPy, with loops."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, tokens, heads, _ = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        keys = np.broadcast_to(key_positions, (batch, k.shape[2]))[b]
        for t in range(tokens):
            p = query_positions[b, t]
            seen = (keys >= 0) & (keys <= p) & (keys > p - (window or 10**9))
            for h in range(heads):
                g = h // (heads // k.shape[1])
                scores = k[b, g][seen] @ q[b, t, h] * scale
                if seen.any():
                    e = np.exp(scores - scores.max())
                    out[b, t, h] = e / e.sum() @ v[b, g][seen]
    return out


def problem(batch, tokens, length, heads, kv_heads, seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    q = draw(batch, tokens, heads, 4)
    held = LayerCache(
        jnp.asarray(draw(batch, kv_heads, length, 4)), jnp.asarray(draw(batch, kv_heads, length, 4))
    )
    return q, held


@examples(5)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 9),
    length=st.integers(1, 11),
    group=st.integers(1, 2),
    window=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 99),
)
def test_blocks_and_at_once_are_the_formula(batch, tokens, length, group, window, seed):
    q, held = problem(batch, tokens, length, 2 * group, 2, seed)
    rng = np.random.default_rng(seed)
    positions = rng.integers(-1, length, (batch, tokens)).astype(np.int32)
    slots = np.arange(length, dtype=np.int32)[None]
    expected = plain(q, held.keys, held.values, positions, slots, 0.5, window)
    real = positions >= 0
    with pytest.MonkeyPatch.context() as patch:
        for at_once in (1 << 26, 0):
            patch.setattr(attention, "_AT_ONCE", at_once)
            patch.setattr(attention, "_QUERIES", 4)
            patch.setattr(attention, "_KEYS", 4)
            got = attend(q, held, positions, slots, scale=0.5, window=window)
            np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=1e-5)


def test_gradients_of_blocks_are_those_of_at_once(monkeypatch):
    q, held = problem(1, 10, 10, 4, 2, 0)
    positions = np.arange(10, dtype=np.int32)[None]

    def loss(q, held):
        return (attend(q, held, positions, positions, scale=0.5, window=4) ** 2).sum()

    at_once = jax.grad(loss, (0, 1))(q, held)
    monkeypatch.setattr(attention, "_AT_ONCE", 0)
    monkeypatch.setattr(attention, "_QUERIES", 4)
    monkeypatch.setattr(attention, "_KEYS", 4)
    blocks = jax.grad(loss, (0, 1))(q, held)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), at_once, blocks)


@pytest.mark.parametrize("tokens", [32768, 512])
def test_a_long_context_needs_no_square_array(tokens):
    """A square array of float32 scores of 32,768 tokens would take 4 GiB for each head."""
    length, shape = 32768, jax.ShapeDtypeStruct

    def attention_of(q, keys, values, positions):
        slots = jnp.arange(length, dtype=jnp.int32)[None]
        return attend(q, LayerCache(keys, values), positions, slots, scale=0.1, window=None)

    compiled = (
        jax.jit(attention_of)
        .lower(
            shape((1, tokens, 8, 64), jnp.bfloat16),
            shape((1, 2, length, 64), jnp.bfloat16),
            shape((1, 2, length, 64), jnp.bfloat16),
            shape((1, tokens), jnp.int32),
        )
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 2**20


# --- whole rows by cuDNN --------------------------------------------------------------------------


@pytest.fixture
def as_if_cudnn_ran(monkeypatch):
    """XLA's attention in the place of cuDNN's, with the same arguments. Counts the calls."""
    calls = []
    real = jax.nn.dot_product_attention

    def attention_of_xla(*operands, implementation, **options):
        assert implementation == "cudnn"
        calls.append(operands[0].shape)
        return real(*operands, implementation="xla", **options)

    monkeypatch.setattr(attention, "_cudnn_attends", lambda dtype, head_dim: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention_of_xla)
    return calls


def test_padded_prompts_of_any_length_attend_as_whole_rows(as_if_cudnn_ran):
    """Logits and cache are those of the attention by positions."""
    model = tiny(dtype="bfloat16")
    ids = jax.random.randint(jax.random.key(0), (3, 64), 0, model.config.vocab_size)
    lengths = jnp.array([64, 17, 1])
    at = jnp.arange(64)[None]
    positions = jnp.where(at < lengths[:, None], at, -1)

    def run(cache, **options):
        call = functools.partial(apply, model.config, last=True, **options)
        return jax.jit(call)(model.params, ids, positions, cache)

    whole, cache = run(init_cache(model.config, 3, 80), whole=True)
    assert len(as_if_cudnn_ran) == model.config.num_layers
    plain, plain_cache = run(init_cache(model.config, 3, 80))
    assert len(as_if_cudnn_ran) == model.config.num_layers
    np.testing.assert_allclose(whole, plain, atol=0.1)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(plain_cache), strict=True):
        np.testing.assert_allclose(np.asarray(a, "float32"), np.asarray(b, "float32"), atol=0.1)


@pytest.mark.parametrize(
    ("tokens", "dtype", "window"),
    [(63, "bfloat16", None), (64, "float32", None), (80, "bfloat16", 70)],
)
def test_what_cudnn_does_not_take_attends_by_positions(as_if_cudnn_ran, tokens, dtype, window):
    x = jnp.ones((1, tokens, 2, 8), dtype)
    assert attend_whole(x, x, x, scale=1.0, window=window) is None
    assert as_if_cudnn_ran == []


def test_a_cpu_has_no_cudnn():
    x = jnp.ones((1, 64, 2, 8), "bfloat16")
    assert attend_whole(x, x, x, scale=1.0, window=None) is None


@pytest.mark.gpu
def test_cudnn_attends_as_the_positions_say():
    q = jax.random.normal(jax.random.key(0), (2, 256, 8, 64), jnp.bfloat16)
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 256, 2, 64), jnp.bfloat16)
    whole = attend_whole(q, k, v, scale=0.2, window=300)
    assert whole is not None
    at = jnp.broadcast_to(jnp.arange(256), (2, 256))
    held = LayerCache(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    want = attend(q, held, at, at, scale=0.2, window=300)
    np.testing.assert_allclose(np.asarray(whole, "float32"), np.asarray(want, "float32"), atol=0.03)

"""A cache of 8 bits: how far its results may be, with windows, grouped heads and many rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from slidejax.lm.decoder import Decoder, apply, init_cache
from slidejax.lm.decoder.attention import attend
from slidejax.lm.decoder.cache import LayerCache
from slidejax.lm.decoder.examples import tiny, tiny_config
from slidejax.lm.text.examples import byte_tokenizer

run = jax.jit(apply, static_argnums=0)
SHAPES = {
    "plain": {},
    "window": {"windows": (5, None)},
    "one kv head": {"num_heads": 8, "num_kv_heads": 1},
    "windows and norms": {"windows": (8, 3), "qk_norm": True, "sandwich_norm": True},
}


@examples(10)
@given(
    tokens=st.sampled_from([1, 6]),
    group=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 4]),
    spread=st.sampled_from([0.01, 1.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_attention_to_codes_is_within_the_bound_of_their_rounding(
    tokens, group, window, spread, seed
):
    """A code is off by half a step, a row's largest magnitude over 127.

    So a score is off by at most d = scale * |q|_1 * step_k / 2, a weight by a factor of exp(2 d),
    and the result by (exp(2 d) - 1) * 2 * max|v| + step_v / 2.
    """
    rng = np.random.default_rng(seed)
    kv_heads, head_dim, length, scale = 2, 8, 12, 0.3
    draw = lambda *shape: rng.normal(size=(2, *shape)).astype(np.float32)  # noqa: E731
    q = draw(tokens, kv_heads * group, head_dim)
    keys, values = draw(length, kv_heads, head_dim), spread * draw(length, kv_heads, head_dim)
    at = np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))
    config = tiny_config(head_dim=head_dim, num_kv_heads=kv_heads)
    cache = init_cache(config, 2, length, "int8")[0]
    held, slots, _ = cache.add(jnp.asarray(keys), jnp.asarray(values), jnp.asarray(at), window)
    exact = LayerCache(*(jnp.asarray(x.transpose(0, 2, 1, 3)) for x in (keys, values)))
    of = at[:, -tokens:]
    got, want = (
        np.asarray(attend(jnp.asarray(q), c, of, slots, scale=scale, window=window), np.float64)
        for c in (held, exact)
    )
    step_k, step_v = (np.abs(x).max() / 127 for x in (keys, values))
    d = scale * np.abs(q).sum(-1, keepdims=True) * step_k / 2
    bound = np.expm1(2 * d) * 2 * np.abs(values).max() + step_v / 2
    assert (np.abs(got - want) <= bound * (1 + 1e-4)).all()
    assert (got != want).any()


def parts_of(length):
    """A long prompt in chunks, then tokens one by one."""
    chunks = [(begin, min(begin + 256, length - 12)) for begin in range(0, length - 12, 256)]
    return chunks + [(at, at + 1) for at in range(length - 12, length)]


def through_a_cache(model, ids, dtype):
    cache = init_cache(model.config, len(ids), ids.shape[1] + 4, dtype, windows=True)
    got = []
    for begin, end in parts_of(ids.shape[1]):
        at = np.broadcast_to(np.arange(begin, end, dtype=np.int32), (len(ids), end - begin))
        logits, cache = run(model.config, model.params, ids[:, begin:end], at, cache)
        got.append(np.asarray(logits))
    return np.concatenate(got, axis=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_8_bits_cost_a_few_times_what_bfloat16_costs_however_long_the_prompt_is(shape):
    model = tiny(max_positions=2048, head_dim=32, **SHAPES[shape])
    ids = np.random.default_rng(0).integers(0, 64, (2, 780)).astype(np.int32)  # whole chunks and 12
    want = np.asarray(model(ids))
    error = {
        dtype: np.sqrt(np.square(through_a_cache(model, ids, dtype) - want).mean()) / want.std()
        for dtype in ("bfloat16", "int8")
    }
    # A step of int8 is the largest of 32 channels over 127; bfloat16 keeps 8 bits of each.
    assert 0 < error["bfloat16"] < error["int8"] < 5 * error["bfloat16"] < 0.04


@pytest.mark.parametrize(
    "shape",
    [
        "one kv head",
        "windows and norms",
        *(pytest.param(name, marks=pytest.mark.every_case) for name in ("plain", "window")),
    ],
)
def test_rows_with_8_bits_are_what_they_are_alone(shape):
    """A last bit of float32 may turn a code by one, which is less than all codes cost together."""
    model = tiny(**SHAPES[shape])
    ids = np.random.default_rng(1).integers(0, 64, (4, 60)).astype(np.int32)
    together = through_a_cache(model, ids, "int8")
    span = np.abs(together).max()
    for row in range(4):
        alone = through_a_cache(model, ids[row : row + 1], "int8")[0]
        assert np.abs(together[row] - alone).max() < 5e-3 * span


@functools.cache
def text_model():
    model = tiny(vocab_size=260, max_positions=100, windows=(6, None))
    return Decoder(model.config, model.params, files=byte_tokenizer().files())


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_stream_with_a_small_cache_gives_what_generate_gives(dtype):
    model = text_model()
    prompts = ["a", "a prompt of some length, longer than a window", "äöü" * 11]
    together = model.generate(prompts, max_new_tokens=30, cache_dtype=dtype)
    for text, completion in zip(prompts, together, strict=True):
        alone = model.generate(text, max_new_tokens=30, cache_dtype=dtype)
        assert "".join(model.stream(text, max_new_tokens=30, cache_dtype=dtype)) == alone.text
        assert alone.prompt_tokens == completion.prompt_tokens


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("left", [0, 1, 36, 37])
def test_a_prompt_may_fill_the_cache_to_the_last_slot(dtype, left):
    """The context is no power of two, and prompts are padded beyond it."""
    model = text_model()
    ids = np.random.default_rng(left).integers(0, 250, 100 - left).tolist()
    made = model.generate([ids, ids[:5]], max_new_tokens=None, cache_dtype=dtype, ends=())
    assert [len(c.tokens) for c in made] == [left, 95]
    # Each token is the likeliest after those before it, within what a cache of 8 bits costs.
    for prompt, completion in zip((ids, ids[:5]), made, strict=True):
        text = np.array([*prompt, *completion.tokens], np.int32)
        logits = np.asarray(model(text[None]))[0, len(prompt) - 1 : -1]
        chosen = np.take_along_axis(logits, text[len(prompt) :, None], axis=1)[:, 0]
        slack = 1e-4 if dtype is None else 0.1
        assert (chosen >= logits.max(-1) - slack * np.abs(logits).max(initial=0)).all()

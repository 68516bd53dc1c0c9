"""The pure function: rows, padding, caches and fused layers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples, some
from hypothesis import given
from hypothesis import strategies as st

import slidejax as sj
from slidejax.lm.decoder import Decoder, Rope, apply, fuse, init_cache, serving
from slidejax.lm.decoder.examples import tiny

run = jax.jit(apply, static_argnums=0, static_argnames=("last",))


@functools.cache
def model(**changes):
    return tiny(**changes)


def windowed():
    """Windows in one of two layers, sandwich norms, qk-norm, biases and two rotary bases."""
    return model(
        windows=(5, None),
        ropes=(Rope(100.0), Rope(10000.0, (4.0,))),
        sandwich_norm=True,
        qk_norm=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        embedding_scale=32**0.5,
        activation="gelu_tanh",
        tied=True,
    )


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 64, shape).astype(np.int32)


def close(a, b, tolerance=2e-6):
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


@examples(6)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    left=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_are_what_they_are_alone_whatever_the_padding(lengths, left, seed):
    decoder, width = windowed(), 12
    ids, positions = tokens(4, width, seed=seed), np.full((4, width), -1, np.int32)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        positions[row, place] = np.arange(length)
    # On the host: a row with another number of tokens is another program on a device.
    together = np.asarray(run(decoder.config, decoder.params, ids, positions)[0])
    last = np.asarray(run(decoder.config, decoder.params, ids, positions, last=True)[0])
    for row in range(len(lengths)):
        real = positions[row] >= 0
        # The row alone, padded on the right to the same width, so that one program serves all.
        alone = np.zeros((1, width), np.int32)
        alone[0, : real.sum()] = ids[row, real]
        where = np.where(np.arange(width) < real.sum(), np.arange(width), -1)[None]
        expected = run(decoder.config, decoder.params, alone, where.astype(np.int32))[0]
        expected = np.asarray(expected)
        close(together[row, real], expected[0, : real.sum()])
        close(last[row], expected[0, real.sum() - 1])


def test_a_batch_gives_the_tokens_that_its_rows_give_alone():
    decoder, ids = windowed(), tokens(3, 10)
    together = decoder(ids)
    for row in range(3):
        alone = decoder(ids[row : row + 1])
        close(together[row], alone[0])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 0.05), ("int8", 0.08)]
)
def test_decoding_through_a_cache_is_the_whole_forward_pass(dtype, tolerance):
    decoder, ids = windowed(), tokens(2, 14)
    whole, _ = run(decoder.config, decoder.params, ids)
    cache = init_cache(decoder.config, 2, 16, dtype, windows=True)
    got = []
    for begin, end in [(0, 6), (6, 12), (12, 13), (13, 14)]:
        positions = np.broadcast_to(np.arange(begin, end, dtype=np.int32), (2, end - begin))
        logits, cache = run(decoder.config, decoder.params, ids[:, begin:end], positions, cache)
        got.append(logits)
    close(np.concatenate(got, axis=1), whole, tolerance)
    assert [layer.keys.shape[2] for layer in cache] == [5, 16]  # the first layer's window
    if dtype == "int8":
        assert cache[1].keys.dtype == np.int8 and cache[1].key_scales.shape == (2, 2, 16)


@pytest.mark.parametrize("windows", [(5, None), (1, 4), (8, 3)])
@pytest.mark.parametrize("parts", [(8, 4, 1, 1, 1, 4), (1, 4, 8, 1, 1, 4), (4, 1, 8, 4, 1, 1)])
def test_a_window_of_slots_is_the_whole_context(windows, parts):
    """Parts longer and shorter than a window, and rows that end, begin and pause on the way."""
    decoder, ids = model(windows=windows), tokens(4, sum(parts))
    at = np.broadcast_to(np.arange(sum(parts), dtype=np.int32), ids.shape).copy()
    at[1, 7:] = -1
    at[2] -= 6  # negative at first
    at[3, 9:14], at[3, 14:] = -1, at[3, 9 : 9 + sum(parts) - 14]
    at = np.maximum(at, -1)
    cache = init_cache(decoder.config, 4, sum(parts), "float32", windows=True)
    assert [layer.keys.shape[2] for layer in cache] == [w or sum(parts) for w in windows]
    got, begin = [], 0
    for size in parts:
        part = slice(begin, begin + size)
        logits, cache = run(decoder.config, decoder.params, ids[:, part], at[:, part], cache)
        got.append(logits)
        begin += size
    whole, _ = run(decoder.config, decoder.params, ids, at)
    close(np.concatenate(got, axis=1)[at >= 0], np.asarray(whole)[at >= 0])


def test_a_cache_shorter_than_a_window_drops_what_is_beyond():
    decoder, ids = model(windows=(8, 8)), tokens(1, 4)
    cache = init_cache(decoder.config, 1, 4, "float32", windows=True)
    at = np.array([[0, 1, 4, 5]], np.int32)
    _, cache = run(decoder.config, decoder.params, ids, at, cache)
    written = np.abs(np.asarray(cache[0].keys[0, 0])).sum(-1) > 0
    assert written.tolist() == [True, True, False, False]


@pytest.mark.parametrize("windows", [(4, None), (4, 6)])
def test_texts_longer_than_a_window_are_written_right(windows):
    decoder, ids = model(windows=windows), tokens(20)
    made = decoder.generate(ids.tolist(), max_new_tokens=12, ends=())
    text = np.concatenate([ids, np.array(made.tokens, np.int32)])
    want = np.asarray(decoder(text[None, :-1]))[0, len(ids) - 1 :]
    best = want.max(-1)
    chosen = np.take_along_axis(want, np.array(made.tokens)[:, None], axis=1)[:, 0]
    assert (chosen >= best - 1e-5).all()


def test_padding_and_what_is_beyond_the_cache_are_not_written():
    decoder = model()
    cache = init_cache(decoder.config, 1, 4, "float32")
    positions = np.array([[0, -1, 2, 4]], np.int32)
    _, cache = run(decoder.config, decoder.params, tokens(1, 4), positions, cache)
    written = np.abs(np.asarray(cache[0].keys[0, 0])).sum(-1) > 0
    assert written.tolist() == [True, False, True, False]


def test_stale_slots_of_a_cache_are_not_seen():
    decoder, ids = model(), tokens(1, 6)
    cache = init_cache(decoder.config, 1, 8, "float32")
    dirty = jax.tree.map(lambda x: x + 7, cache)
    positions = np.arange(6, dtype=np.int32)[None]
    clean, _ = run(decoder.config, decoder.params, ids, positions, cache)
    close(run(decoder.config, decoder.params, ids, positions, dirty)[0], clean)


def test_a_cache_can_be_donated():
    decoder = model()
    step = jax.jit(lambda p, i, q, c: apply(decoder.config, p, i, q, c), donate_argnums=3)
    cache = init_cache(decoder.config, 1, 8)
    _, again = step(decoder.params, tokens(1, 1), np.zeros((1, 1), np.int32), cache)
    assert cache[0].keys.is_deleted() and not again[0].keys.is_deleted()


@pytest.mark.parametrize("rule", [None, "6:8", sj.Rule("dense"), sj.Rule("6:8", qdtype=None)])
def test_fused_and_serving_layouts_compute_the_same(rule):
    decoder, ids = windowed(), tokens(2, 9)
    if rule is not None:
        decoder = sj.lm.convert(decoder, rule)
    expected = decoder(ids)
    for params in (fuse(decoder.params), serving(decoder.params)):
        layer = params["model"]["layers"]["1"]
        assert "qkv_proj" in layer["self_attn"] and "up_proj" not in layer["mlp"]
        close(run(decoder.config, params, ids)[0], expected, 1e-5)


def test_layers_of_different_patterns_are_not_fused():
    decoder = sj.lm.convert(model(), [(".*/q_proj", "2:4"), (".*layers.*", "6:8")])
    layer = fuse(decoder.params)["model"]["layers"]["0"]
    assert "q_proj" in layer["self_attn"] and "gate_up_proj" in layer["mlp"]


def test_float32_products_are_asked_for_in_float32():
    """A GPU multiplies float32 in fewer bits unless it is told otherwise."""
    decoder = model()
    text = str(
        jax.make_jaxpr(functools.partial(apply, decoder.config))(decoder.params, tokens(1, 3))
    )
    products = text.count("dot_general[")
    assert products > 10 and text.count("Precision.HIGHEST") >= products


@pytest.mark.parametrize(
    ("ids", "positions", "match"),
    [
        (np.zeros(3, np.int32), None, r"ids must be integers \[batch, tokens\]"),
        (np.zeros((1, 0), np.int32), None, "at least one"),
        (np.zeros((1, 2), np.float32), None, "got float32"),
        (np.zeros((1, 2), np.int32), np.zeros((1, 3), np.int32), "positions must be integers"),
    ],
)
def test_bad_arguments_are_named(ids, positions, match):
    with pytest.raises(ValueError, match=match):
        apply(model().config, model().params, ids, positions)


def test_a_cache_of_another_batch_is_refused():
    cache = init_cache(model().config, 2, 4)
    with pytest.raises(ValueError, match="cache has 2 layers with keys"):
        apply(model().config, model().params, tokens(1, 2), None, cache)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 4), "batch must be a positive integer, got 0"),
        ((1, 0), "length must be a positive integer, got 0"),
        ((1, 4, "int4x"), "dtype of a cache"),
        ((1, 4, "int32"), "dtype of a cache"),
    ],
)
def test_bad_caches_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        init_cache(model().config, *arguments)


def test_gradients_reach_every_parameter():
    decoder, ids = windowed(), tokens(1, 6)
    params = jax.tree.map(jnp.asarray, decoder.params)
    grads = jax.jit(jax.grad(lambda p: apply(decoder.config, p, ids)[0].var()))(params)
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_flatten_with_path(grads)[0]
        if not np.abs(np.asarray(g)).max() > 0
    ]
    assert dead == []


# --- what is no array, no cache, no decoder -------------------------------------------------------


@pytest.mark.parametrize("bad", ["x", {}, [[1], [1, 2]], None, [["a"]], object()])
def test_ids_and_positions_that_are_no_arrays_are_named(bad):
    with pytest.raises(TypeError, match="ids must be an array of numbers"):
        model()(bad)
    if bad is not None:
        with pytest.raises(TypeError, match="positions must be an array of numbers"):
            model()(tokens(1, 3), bad)


@pytest.mark.parametrize("value", [0, -1, "2", 2.0, None, True])
@pytest.mark.parametrize("name", ["batch", "length"])
def test_sizes_of_a_cache_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {value!r}"):
        init_cache(model().config, **{"batch": 2, "length": 4, name: value})


@pytest.mark.parametrize("cache", ["xx", {0: 1, 1: 2}, 5, (1, 2)])
def test_what_is_no_cache_is_refused(cache):
    with pytest.raises(TypeError, match="cache must be what init_cache made"):
        apply(model().config, model().params, tokens(2, 3), None, cache)


def test_a_cache_of_another_model_or_too_short_a_one_is_refused():
    config, params = model().config, model().params
    other = init_cache(tiny(num_kv_heads=4).config, 2, 8)
    with pytest.raises(ValueError, match="cache has 2 layers with keys"):
        apply(config, params, tokens(2, 3), None, other)
    with pytest.raises(ValueError, match="as long as the cache, 8 positions, got 9"):
        apply(config, params, tokens(2, 9), None, init_cache(config, 2, 8))


@pytest.mark.parametrize("rule", [None, "int8", "bfloat16"])
def test_without_jit_the_results_are_the_same(rule):
    decoder = model() if rule is None else sj.lm.convert(model(), sj.Rule("6:8", dtype=rule))
    ids = tokens(1, 5)
    want = decoder(ids)
    with jax.disable_jit():
        np.testing.assert_allclose(decoder(ids), want, rtol=0, atol=1e-5)


def test_what_a_decoder_is_made_of_is_checked():
    config, params = model().config, model().params
    with pytest.raises(TypeError, match="config must be a DecoderConfig, got dict"):
        Decoder({}, params)
    for bad in (None, [], 5):
        with pytest.raises(TypeError, match="params must be nested dicts"):
            Decoder(config, bad)
    for kernel, said in ((5, "int"), (np.zeros((32, 64), np.int8), "int8"), ("x", "str")):
        with pytest.raises(ValueError, match=f"lm_head/kernel is {said} instead of floating"):
            Decoder(config, {**params, "lm_head": {"kernel": kernel}})
    with pytest.raises(TypeError, match=r"files\['config.json'\] must be bytes, got str"):
        Decoder(config, params, files={"config.json": "text"})
    with pytest.raises(TypeError, match="files must be a dict of bytes by name, got list"):
        Decoder(config, params, files=["config.json"])


@pytest.mark.parametrize(
    "name",
    ["a", "tokeniser.json", "modeling.py", "../config.json", "additional_chat_templates/a.txt", 5],
)
def test_a_file_of_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(f"files has {name!r}, which is no file of a")):
        Decoder(model().config, model().params, files={name: b""})


@pytest.mark.parametrize(
    ("cache_dtype", "packed"),
    some([("float32", True), ("int8", False)], ["float32", "int8"], [False, True]),
)
def test_a_step_is_exported_with_any_number_of_rows(packed, cache_dtype):
    decoder = sj.lm.convert(model(), "6:8") if packed else model()
    rows, _ = jax.export.symbolic_shape("rows, rest")

    @jax.jit
    def step(ids, positions, cache):
        return apply(decoder.config, decoder.params, ids, positions, cache, last=True)

    def open_rows(array):
        return jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype)

    given = tokens(3, 1), np.zeros((3, 1), np.int32), init_cache(decoder.config, 3, 8, cache_dtype)
    exported = jax.export.export(step)(*jax.tree.map(open_rows, given))
    again = jax.export.deserialize(exported.serialize())
    for want, got in zip(*map(jax.tree.leaves, (step(*given), again.call(*given))), strict=True):
        close(got, want)


@pytest.mark.parametrize("fused", [False, True])
def test_whole_rows_are_exported_with_any_number_of_tokens(fused):
    decoder = sj.lm.convert(model(), "6:8")
    params = fuse(decoder.params) if fused else decoder.params
    rows, length = jax.export.symbolic_shape("rows, length")

    @jax.jit
    def run(ids):
        return apply(decoder.config, params, ids)[0]

    exported = jax.export.export(run)(jax.ShapeDtypeStruct((rows, length), jnp.int32))
    given = tokens(3, 5)
    close(exported.call(given), run(given))
    beyond = np.zeros((1, decoder.config.max_positions + 1), np.int32)
    assert np.isnan(exported.call(beyond)).any()


def test_a_cache_of_any_length_is_not_exported():
    decoder = model()
    cache = init_cache(decoder.config, 1, 8)
    (length,) = jax.export.symbolic_shape("length")
    opened = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((*a.shape[:2], length, *a.shape[3:]), a.dtype), cache
    )
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    run = jax.jit(lambda ids, at, cache: apply(decoder.config, decoder.params, ids, at, cache))
    with pytest.raises(ValueError, match=r"cache\[0\]\.keys has the shape .*length.*its rows open"):
        jax.export.export(run)(ids, ids, opened)

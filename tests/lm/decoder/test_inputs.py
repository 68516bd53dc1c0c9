"""Inputs that do not fit a decoder give an error or nan, and never other logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.lm.decoder import Decoder, apply, fuse, init_cache, serving
from slidejax.lm.decoder.apply import outputs
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.text.examples import byte_tokenizer

IDS = np.array([[1, 2, 3]], np.int32)
LAYER = "model/layers/0/"


@functools.cache
def model():
    made = tiny(vocab_size=260)
    return Decoder(made.config, made.params, files=byte_tokenizer().files())


def changed(params, path, value):
    """The parameters with another value at a path; None takes it away."""
    name, _, rest = path.partition("/")
    inner = changed(params.get(name, {}), rest, value) if rest else value
    return {key: part for key, part in {**params, name: inner}.items() if part is not None}


def ones(*shape):
    return jnp.ones(shape, jnp.float32)


PACKED = sj.pack(ones(64, 32), "6:8", dtype="int8")


@pytest.mark.parametrize(
    "layout", [lambda params: params, fuse, serving], ids=["", "fused", "serving"]
)
@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("model/norm/weight", ones(1), r"is \(1,\) instead of \(32,\)"),
        (f"{LAYER}input_layernorm/weight", ones(), r"is \(\) instead of \(32,\)"),
        (f"{LAYER}input_layernorm/weight", None, "is missing"),
        (f"{LAYER}self_attn/q_norm/weight", ones(8), "is unknown"),
        (f"{LAYER}self_attn/o_proj/bias", ones(1), "is unknown"),
        (f"{LAYER}mlp/down_proj/kernel", PACKED, r"is \(64, 32\) instead of \(48, 32\)"),
        (f"{LAYER}mlp/down_proj/kernel", ones(48, 32).astype(int), "is int32 instead of floating"),
        ("model/embed_tokens/embedding", PACKED, "is SlideWeight instead of floating"),
        ("model/embed_tokens/embedding", ones(100, 32), r"is \(100, 32\) instead of \(260, 32\)"),
        ("lm_head/kernel", ones(32, 1), r"is \(32, 1\) instead of \(32, 260\)"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_fit_the_configuration_are_named(path, value, found, layout):
    decoder = model()
    params = changed(layout(decoder.params), path, value)
    with pytest.raises(ValueError, match=f"do not fit the configuration: {path} {found}"):
        apply(decoder.config, params, IDS)


def test_all_that_takes_parameters_checks_them():
    decoder = model()
    params = changed(decoder.params, "model/norm/weight", ones(1))
    both = f"{LAYER}self_attn/qkv_proj/kernel"
    fused = changed(fuse(decoder.params), both, ones(32, 63))
    for bad, said in ((params, r"norm/weight is \(1,\)"), (fused, rf"{both} is \(32, 63\)")):
        for call in (
            lambda bad: jax.jit(lambda p: apply(decoder.config, p, IDS))(bad),
            lambda bad: outputs(decoder.config, bad, IDS),
            lambda bad: decoder.generate([1, 2], max_new_tokens=2, params=bad),
            lambda bad: list(decoder.stream([1, 2], max_new_tokens=2, params=bad)),
        ):
            with pytest.raises(ValueError, match=f"do not fit the configuration: .*{said}"):
                call(bad)
    wide = changed(decoder.params, f"{LAYER}mlp/down_proj/kernel", PACKED.replace(zeros=PACKED.zeros.astype(int)))  # fmt: skip
    with pytest.raises(ValueError, match=f"{LAYER}mlp/down_proj/kernel has leaves"):
        apply(decoder.config, wide, IDS)


@pytest.mark.parametrize(
    ("ids", "positions", "cached", "match"),
    [
        (IDS, [[6, 7, 8]], True, "from 0 to 7, the length of the cache, got 8"),
        (IDS, [[126, 127, 128]], False, "from 0 to 127, the length of the model's context, got"),
        (IDS, [[-2, 0, 1]], True, "positions must be -1 for padding or from 0 to 7, .* got -2"),
        (IDS, np.array([[0, 1, 2**32 + 2]]), True, "got 4294967298"),
        (IDS, [[0, 1, 3]], True, "follow each other, got 3 behind 1 in row 0"),
        (IDS, [[1, 0, 2]], False, "follow each other, got 0 behind 1"),
        (np.ones((1, 9), np.int32), None, True, "as long as the cache, 8 positions, got 9"),
        (np.ones((1, 129), int), None, False, "as the model's context, 128 positions, got 129"),
    ],
)
def test_numbers_that_are_out_of_range_are_refused_where_they_are_known(
    ids, positions, cached, match
):
    decoder = model()
    cache = init_cache(decoder.config, 1, 8) if cached else None
    with pytest.raises(ValueError, match=match):
        apply(decoder.config, decoder.params, np.asarray(ids), positions, cache)
    if not cached:
        with pytest.raises(ValueError, match=match):
            decoder(np.asarray(ids), positions)


@pytest.mark.parametrize(
    ("ids", "positions", "found"),
    [
        ([[1, 2, 260]], None, "260"),
        ([[1, 2, -1]], None, "-1"),
        ([[1, 2, 2**32]], None, "4294967296"),
        ([[1, 2, 300]], [[-1, 0, 1]], "300"),
    ],
)
def test_ids_that_the_model_has_not_are_an_error_of_the_model_and_nan_of_the_function(
    ids, positions, found
):
    decoder = model()
    with pytest.raises(ValueError, match=f"ids must be tokens of the model, 0 to 259, got {found}"):
        decoder(np.asarray(ids), positions)
    logits, _ = apply(decoder.config, decoder.params, np.asarray(ids), positions)
    assert np.isnan(np.asarray(logits)[0, 2]).all()


def test_rows_that_are_not_whole_are_refused_where_they_are_known():
    decoder = model()
    for positions in ([[1, 2, 3]], [[-1, 0, 1]]):
        with pytest.raises(ValueError, match="whole=True says that token i of each row is at pos"):
            apply(decoder.config, decoder.params, IDS, positions, whole=True)


@pytest.mark.parametrize("windows", [None, (4, None)])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_positions_beyond_the_cache_or_the_context_give_nan_under_jit(dtype, windows):
    decoder = tiny(max_positions=16, **({} if windows is None else {"windows": windows}))
    run = jax.jit(lambda *row: apply(decoder.config, decoder.params, *row)[0])

    def logits(ids, begin, cache):
        at = jnp.arange(begin, begin + len(ids))[None]
        return np.asarray(run(jnp.array([ids]), at, cache))[0]

    cache = init_cache(decoder.config, 1, 8, dtype, windows=True)
    assert np.isnan(logits([3], 8, cache)).all() and np.isfinite(logits([3], 7, cache)).all()
    assert np.isnan(logits([3, 4], 7, cache)[1]).all()
    assert np.isnan(logits([3, 4], 15, None)[1]).all()
    longer = init_cache(decoder.config, 1, 32, dtype, windows=True)
    assert np.isnan(logits([3], 16, longer)).all() and np.isfinite(logits([3], 15, longer)).all()
    beyond = run(jnp.array([[3, 4]]), jnp.array([[0, 2**31 - 1]]), None)
    assert np.isnan(np.asarray(beyond)[0, 1]).all()


def test_rows_of_a_batch_end_where_they_are_full():
    """A row that has its tokens does not go on beyond the cache while others do."""
    decoder = tiny(max_positions=16)
    made = decoder.generate([[1] * 14, [2]], max_new_tokens=None, ends=())
    assert [len(completion.tokens) for completion in made] == [2, 15]


@pytest.mark.parametrize(
    ("dtype", "changes", "match"),
    [
        ("float32", {"values": ones(1, 2, 1, 8)}, r"\[0\].values must be as its keys, float32 \(1, 2, 8"),
        ("float32", {"values": ones(1, 2, 8, 8).astype("bfloat16")}, r"as its keys, .* got bfloat16"),
        ("float32", {"key_scales": ones(1, 2, 8)}, "key_scales must be None beside keys of float32"),
        ("int8", {"key_scales": ones(1, 2, 1)}, r"key_scales must be float32 \(1, 2, 8\) .* got"),
        ("int8", {"value_scales": None}, r"value_scales must be float32 \(1, 2, 8\) .* got None"),
        ("int8", {"key_scales": None, "value_scales": None}, "key_scales must be float32"),
        ("int8", {n: ones(1, 2, 8, 8).astype("int32") for n in ("keys", "values")}, "dtype of a cache"),
    ],
)  # fmt: skip
def test_a_cache_whose_arrays_do_not_fit_each_other_is_refused(dtype, changes, match):
    decoder = model()
    first, *rest = init_cache(decoder.config, 1, 8, dtype)
    with pytest.raises(ValueError, match=match):
        apply(decoder.config, decoder.params, IDS, None, (first._replace(**changes), *rest))


def test_what_is_of_another_kind_is_named():
    decoder = model()
    config, params, cache = decoder.config, decoder.params, init_cache(decoder.config, 1, 8)
    for name, options in (
        ("last", {"last": "no"}),
        ("whole", {"whole": 1}),
        (r"cache\[0\].keys", {"cache": (cache[0]._replace(keys=None), cache[1])}),
        ("config", {"config": {}}),
    ):
        with pytest.raises(TypeError, match=f"{name} must be"):
            apply(**{"config": config, "params": params, "ids": IDS, **options})
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        apply(config, params, IDS, implementation="magic")
    for call in (fuse, serving, lambda bad: outputs(config, bad, IDS)):
        for bad in ([1], {}, {"model": 1}):
            with pytest.raises(TypeError, match="params must be a decoder's nested dicts"):
                call(bad)
    got, written = apply(config, params, IDS, None, jax.tree.map(np.asarray, cache))
    np.testing.assert_array_equal(got, apply(config, params, IDS, None, cache)[0])
    assert isinstance(written[0].keys, jax.Array)

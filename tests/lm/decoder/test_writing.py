"""A decoder writes text: with its own programs and cache, as its logits say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some

from slidejax.lm import convert, load, save
from slidejax.lm.decoder import apply, init_cache, writing
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.decoder.family import eight_bit
from slidejax.lm.decoder.fuse import fuse, serving
from slidejax.lm.decoder.model import Decoder
from slidejax.lm.decoder.writing import _Writer, programs
from slidejax.lm.generation import Sampling
from slidejax.lm.text.examples import byte_tokenizer
from slidejax.rules import Rule
from slidejax.variants.serving import ServingWeight

# Where sizes do not matter, one layer is as good as two and takes half as long to compile.
FLOATS = Rule("6:8", qdtype=None)
PROMPTS = [[3, 4, 5], [6], list(range(1, 41)), [9, 8, 7, 6, 5, 4, 3, 2]]


def text_model(**changes):
    """A tiny decoder with a tokenizer of bytes."""
    model = tiny(vocab_size=260, max_positions=256, **changes)
    return Decoder(model.config, model.params, files=byte_tokenizer("<a>", "<b>").files())


def by_logits(model, ids, count):
    """The likeliest tokens by the logits of the whole text, without a cache."""
    ids = list(ids)
    whole = np.zeros((1, 128), np.int32)  # one length, one program; nobody sees what follows
    for at in range(len(ids), len(ids) + count):
        whole[0, : len(ids)] = ids
        ids.append(int(np.asarray(model(jnp.asarray(whole)))[0, at - 1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("changes", [{}, {"windows": (4, None)}, {"tied": True, "qk_norm": True}])
def test_the_tokens_are_those_of_the_logits_alone_and_together(changes):
    model = tiny(**changes)
    together = model.generate(PROMPTS, max_new_tokens=20)
    assert [c.tokens for c in together] == [by_logits(model, p, 20) for p in PROMPTS]
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert model.generate(prompt, max_new_tokens=20) == completion


def test_long_prompts_go_through_in_chunks():
    model = tiny(num_layers=1, max_positions=2048)
    ids = np.random.default_rng(0).integers(0, 64, 700).tolist()
    (first,) = model.generate([ids], max_new_tokens=1)
    logits = np.asarray(model(jnp.asarray([ids])))[0, -1]
    assert first.tokens == [int(logits.argmax())]
    assert model.generate([[5, 6], ids], max_new_tokens=1)[1] == first


def test_decoders_of_one_configuration_share_programs():
    one, other = (tiny(seed, num_layers=1, norm_eps=3e-5) for seed in (0, 1))
    shared = programs(one.config, "float32")
    one.generate(PROMPTS[0], max_new_tokens=4)
    before = list(shared.traced)
    other.generate([7, 7], max_new_tokens=9)
    assert shared.traced == before and len(before) == 2


def test_packed_weights_are_unpacked_once_for_all_calls():
    sparse = convert(tiny(num_layers=1), "6:8")
    writer = _Writer(sparse, None)
    served = writer.params
    kernel = served["model"]["layers"]["0"]["self_attn"]["qkv_proj"]["kernel"]
    assert isinstance(kernel, ServingWeight)
    assert writer.params is served and _Writer(sparse, None).params is served
    packed = sparse.generate(PROMPTS, max_new_tokens=6, params=sparse.params)
    assert sparse.generate(PROMPTS, max_new_tokens=6) == packed
    norm = sparse.model["norm"]["weight"]
    norm.set_value(2 * norm.get_value())
    assert (writer.params["model"]["norm"]["weight"] == norm.get_value()).all()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """`on_a_gpu(free)`: a CPU that says it is a GPU with as many free bytes."""

    def present(free):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(writing, "available", lambda device: free)
        monkeypatch.setattr(writing, "serving", fuse)

    return present


def test_a_gpu_with_room_serves_fused_layers(on_a_gpu):
    model = convert(tiny(num_layers=1), "6:8")
    on_a_gpu(None)
    served = _Writer(model, None).params
    assert "qkv_proj" in served["model"]["layers"]["0"]["self_attn"]
    on_a_gpu(0)  # they are there already
    assert _Writer(model, None).params is served


def test_a_gpu_without_room_serves_the_model_as_it_is_and_says_so(on_a_gpu):
    model = convert(tiny(num_layers=1), "6:8")
    on_a_gpu(1000)
    with pytest.warns(UserWarning, match=r"slower.* and 0\.0 MiB are free"):
        served = _Writer(model, None).params
    assert "q_proj" in served["model"]["layers"]["0"]["self_attn"]


def test_served_parameters_give_the_same_text():
    model = tiny(num_layers=1)
    assert model.generate(PROMPTS, max_new_tokens=8) == model.generate(
        PROMPTS, max_new_tokens=8, params=serving(model.params)
    )


def lowered(model, rows, length=64):
    """Both programs of a decoder for prompts of up to 16 tokens, before they are compiled."""
    served, made = _Writer(model, None).params, programs(model.config, model.dtype.name)
    live, ends, draw = np.ones(rows, bool), np.full(8, -1, np.int32), Sampling().draw()
    arguments = (np.zeros((rows, 16), np.int32), np.ones(rows, np.int32), live, ends, draw)
    prefill = made.prefill.lower(served, *arguments, length=length, kind="greedy")
    step = (served, prefill.out_info[0], live, ends, draw, np.int32(4))
    return prefill, made.decode.lower(*step, kind="greedy")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU multiplies 16 bits as they are")
@pytest.mark.parametrize(
    ("dtype", "rule", "tied"),
    some(
        [
            ("bfloat16", None, False),
            ("bfloat16", "6:8", True),
            ("float16", None, True),
            ("float16", FLOATS, False),
        ],
        ["bfloat16", "float16"],
        [None, "6:8", FLOATS],
        [False, True],
    ),
)
def test_no_call_converts_the_weights(dtype, rule, tied):
    """A stream may make a call for each token, so a call must not touch all of a matrix for itself.

    XLA's CPU converts what is of 16 bits to float32, and puts that before the loop.
    """
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768}
    model = tiny(dtype=dtype, tied=tied, **sizes, num_layers=1)
    model = model if rule is None else convert(model, rule)
    _, step = lowered(model, 1)
    one_kernel = 4 * 256 * 768  # up or down in float32
    assert step.compile().memory_analysis().temp_size_in_bytes < one_kernel / 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU multiplies 8 bits as they are")
@pytest.mark.parametrize(
    ("rule", "rows"),
    some(
        [("6:8", 1), ("6:8", 8), ("dense", 1), ("e4m3 and int8", 8)],
        ["6:8", "dense", "e4m3 and int8"],
        [1, 8],
    ),
)
def test_codes_of_one_kernel_at_a_time_are_converted(rule, rows):
    """XLA's CPU would convert those of all layers first, and put that before the loop."""
    changes = {"num_layers": 3}
    rule = {"dense": Rule("dense"), "e4m3 and int8": eight_bit("6:8")}.get(rule, rule)
    model = convert(tiny(hidden_size=256, intermediate_size=768, **changes), rule)
    for program in lowered(model, rows):
        one_kernel = 4 * 256 * 2 * 768  # gate and up in float32
        assert program.compile().memory_analysis().temp_size_in_bytes < 2 * one_kernel


@pytest.mark.parametrize(
    ("dtype", "rule"),
    some(
        [("bfloat16", "6:8"), ("bfloat16", FLOATS), ("float16", None)],
        ["bfloat16", "float16"],
        [None, "6:8", FLOATS],
    ),
)
def test_served_parameters_of_16_bits_give_the_same_logits(dtype, rule):
    model = tiny(dtype=dtype, tied=rule is None, qkv_bias=True, num_layers=1)
    model = model if rule is None else convert(model, rule)
    ids = jnp.asarray([[3, 4, 5, 6]])
    cache = init_cache(model.config, 1, 8, dtype)
    wanted = np.asarray(model(ids))
    run = jax.jit(lambda params, ids: apply(model.config, params, ids, None, cache)[0])
    got = run(serving(model.params), ids)
    assert got.dtype == jnp.float32 and np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()
    assert np.isnan(run(model.params, jnp.array([[3, 64]]))).all()  # there is no token 64


def test_converted_decoders_write():
    sparse = convert(tiny(num_layers=1), "6:8")
    got = sparse.generate(PROMPTS, max_new_tokens=6)
    assert [c.tokens for c in got] == [by_logits(sparse, p, 6) for p in PROMPTS]
    assert got == sparse.generate(PROMPTS, max_new_tokens=6, params=serving(sparse.params))


def test_a_cache_of_8_bits_is_an_option():
    model = tiny(num_layers=1)
    exact = model.generate(PROMPTS, max_new_tokens=4)
    near = model.generate(PROMPTS, max_new_tokens=4, cache_dtype="int8")
    assert [c.tokens[0] for c in near] == [c.tokens[0] for c in exact]
    state, *_ = programs(model.config, "int8").prefill(
        model.params,
        np.zeros((1, 16), np.int32),
        np.ones(1, np.int32),
        np.ones(1, bool),
        np.full(8, -1, np.int32),
        Sampling().draw(),
        length=64,
        kind="greedy",
    )
    assert {x.dtype.name for x in jax.tree.leaves(state.cache)} == {"int8", "float32"}
    with pytest.raises(ValueError, match="dtype of a cache"):
        model.generate([1], max_new_tokens=2, cache_dtype="int4")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's libraries want workspace")
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_copies_no_cache(cache_dtype, rows):
    """On a CPU the caches of 16 bits are still copied, layer by layer."""
    model = tiny(num_layers=1, max_positions=8192, head_dim=64)
    ends, live = np.full(8, -1, np.int32), np.ones(rows, bool)
    made = programs(model.config, cache_dtype)
    arguments = (np.zeros((rows, 16), np.int32), np.ones(rows, np.int32), live, ends)
    state, *_ = made.prefill(
        model.params, *arguments, Sampling().draw(), length=8192, kind="greedy"
    )
    step = (live, ends, Sampling().draw(), np.int32(4))
    used = made.decode.lower(model.params, state, *step, kind="greedy").compile().memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    assert used.alias_size_in_bytes >= held and used.temp_size_in_bytes < held / 2


def test_text_goes_in_and_out():
    model = text_model()
    completion = model.generate("hé", max_new_tokens=12)
    tokens = completion.tokens
    assert tokens == by_logits(model, [256, *"hé".encode()], 12)[: len(tokens)]
    assert completion.text == model.tokenizer.decode(tokens, continues=True)
    assert "".join(model.stream("hé", max_new_tokens=12)) == completion.text
    assert model.tokenizer is model.tokenizer


def test_what_is_saved_still_speaks(tmp_path):
    model = convert(text_model(), "6:8")
    save(model, tmp_path / "out")
    back = load(tmp_path / "out")
    assert back.generate("abc", max_new_tokens=9) == model.generate("abc", max_new_tokens=9)
    assert back.tokenizer.ends == model.tokenizer.ends


def test_without_a_tokenizer_the_configuration_knows_the_ends():
    free = tiny().generate([3, 4, 5], max_new_tokens=8).tokens
    got = tiny(eos_token_ids=(63, free[3])).generate([3, 4, 5], max_new_tokens=8)
    assert got.tokens == free[: free.index(free[3])] and got.finish == "end"
    with pytest.raises(ValueError, match="without a tokenizer"):
        tiny().generate("abc")


def test_a_tokenizer_that_cannot_be_read_hinders_nobody_who_needs_none():
    model = tiny(num_layers=1)
    model = Decoder(model.config, model.params, files={"tokenizer.model": b""})
    assert model(jnp.array([[1, 2]])).shape == (1, 2, 64)
    with pytest.raises(NotImplementedError, match=r"tokenizer\.model"):
        model.generate("abc")


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_prompts_of_very_different_lengths_share_a_batch(cache_dtype):
    """Rows end at the edges of the chunks in which prompts are read; windows are rings of slots."""
    model = tiny(windows=(300, None), max_positions=2048)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, n).tolist() for n in (1100, 1, 511, 512, 513)]
    made = model.generate(prompts, max_new_tokens=10, cache_dtype=cache_dtype)
    for prompt, completion in zip(prompts, made, strict=True):
        text = np.zeros((1, 1120), np.int32)  # one length, one program; nobody sees what follows
        end = len(prompt) + 10
        text[0, :end] = [*prompt, *completion.tokens]
        logits = np.asarray(model(text))[0, len(prompt) - 1 : end - 1]
        chosen = np.take_along_axis(logits, text[0, len(prompt) : end, None], axis=1)[:, 0]
        slack = {"float32": 1e-5, "int8": 0.05}[cache_dtype] * np.abs(logits).max()
        assert (chosen >= logits.max(-1) - slack).all()

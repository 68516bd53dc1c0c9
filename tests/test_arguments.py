"""Every argument of every function says what is wrong with it, before anything is computed.

An error names the argument. It comes from slidejax, and not out of JAX or NumPy, whose words are
about other things.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from argument_sweep import (
    ARRAYS,
    AXES,
    CODES,
    COMPLEX,
    DTYPES,
    EMPTY,
    FLOAT,
    GIVEN_WHOLE,
    GRAM,
    IDS,
    KERNEL,
    LAYER,
    MODEL,
    NAMES,
    NUMBERS,
    REAL,
    SCALE,
    WHOLE,
    W,
    X,
    check_named,
    flat,
)
from flax import nnx

import slidejax as sj
import slidejax.adapters
import slidejax.checkpoint
import slidejax.linen
import slidejax.lm
import slidejax.nnx
import slidejax.prune
import slidejax.train
import slidejax.trainable
from slidejax.bounds import Bound
from slidejax.lm import Decoder
from slidejax.lm.decoder import apply, init_cache
from slidejax.lm.generation import Sampling
from slidejax.lm.text.examples import byte_tokenizer

TOKENIZER = byte_tokenizer()


def general(**options):
    return sj.nnx.SlideLinear(rngs=nnx.Rngs(0), **options)


def dense(**options):
    return sj.linen.SlideDense(**options).init(jax.random.key(0), jnp.ones((1, 16)))


def normed(**options):
    return sj.linear(X, W, prologue=sj.LayerNorm(**options))


def chained(**options):
    return sj.linear_chain(X, [sj.Stage(**options)])


def gated(**options):
    return sj.linear(X, W, prologue=sj.GLU(**options))


def trained(**options):
    def loss(w, x):
        return (sj.linear(x, w) ** 2).mean()

    usual = {"steps": 1, "batches": sj.train.Shuffled(X, 2), "loss_fn": loss, "params": W}
    return sj.train.fit(**{**usual, **options})


# function, its arguments, and bad values of each
CASES = [
    (sj.pack, {"kernel": KERNEL, "pattern": "6:8"}, {
        "kernel": [*ARRAYS[:12], COMPLEX, *EMPTY], "pattern": ["6:9", "", 0, [], object(), KERNEL, len],
        "dtype": DTYPES, "mask": [*ARRAYS[1:], COMPLEX, KERNEL],
    }),
    (sj.pack, {"kernel": KERNEL, "pattern": "6:8", "dtype": "int8"}, {
        "scale": [*ARRAYS[1:], np.zeros(16), np.full(16, np.inf)],
    }),
    (sj.linear, {"x": X, "w": W}, {
        "x": [*ARRAYS[:-2], COMPLEX], "w": ARRAYS[:9], "bias": [*ARRAYS[1:], COMPLEX],
        "implementation": NAMES, "out_dtype": [*DTYPES, "int8"], "reduce_axis": AXES,
        "prologue": [*NAMES, KERNEL], "residual": [*ARRAYS[1:], COMPLEX],
    }),
    (sj.lift_quantize, {"x": X, "pattern": "6:8"}, {
        "x": [*ARRAYS[:13], COMPLEX], "pattern": ["6:9", 0, []], "dtype": DTYPES,
        "reduce_axis": AXES,
    }),
    (sj.sparse_matmul, {"lifted": CODES, "scale": SCALE, "w": W}, {
        "lifted": [*ARRAYS, COMPLEX], "scale": ARRAYS, "w": ARRAYS[:9], "bias": ARRAYS[1:],
        "implementation": NAMES, "out_dtype": DTYPES, "reduce_axis": AXES, "residual": ARRAYS[1:],
    }),
    (sj.linear_chain, {"x": X, "stages": [sj.Stage(W)]}, {
        "stages": [None, "", 0, [], [1], W], "implementation": NAMES,
        "outputs": ["0", [], 0, [1], [0, 0], [0.5], ["a"], np.zeros((2, 2)), W, len, object()],
    }),
    (chained, {"weight": W}, {
        "weight": ARRAYS[:9], "bias": ARRAYS[1:], "prologue": NAMES, "residual": ARRAYS[1:],
    }),
    (normed, {"weight": np.ones(64, np.float32)}, {
        "weight": ARRAYS, "bias": ARRAYS[1:], "eps": REAL,
    }),
    (gated, {"up": X}, {"up": ARRAYS[1:], "activation": [*NAMES, None]}),
    (sj.prepare, {"tree": {"a": W}}, {"implementation": NAMES}),
    (sj.partition, {"tree": {"a": FLOAT}}, {"trained": [0, 1.5, "(", [], np.float64, object()]}),
    (sj.prune.magnitude, {"kernel": KERNEL, "pattern": "6:8"}, {
        "kernel": ARRAYS[:13], "pattern": ["6:9", 0, []],
    }),
    (sj.prune.wanda, {"kernel": KERNEL, "pattern": "6:8", "gram": GRAM}, {
        "kernel": ARRAYS, "pattern": ["6:9", 0, []], "gram": [*ARRAYS, COMPLEX, GRAM * np.nan, -GRAM],
    }),
    (sj.prune.sparsegpt, {"kernel": KERNEL, "pattern": "6:8", "gram": GRAM}, {
        "kernel": [*ARRAYS, COMPLEX], "gram": [*ARRAYS, COMPLEX, GRAM * np.nan, -GRAM],
        "damping": REAL, "rounds": WHOLE, "refit_steps": WHOLE,
    }),
    (sj.prune.exchange, {**LAYER, "pattern": "6:8"}, {
        "kernel": [*ARRAYS, COMPLEX, KERNEL * np.nan], "mask": [*ARRAYS, KERNEL], "gram": [*ARRAYS, GRAM * np.nan, -GRAM],
        "start": [*ARRAYS, COMPLEX], "pattern": ["6:9", "dense", 0], "damping": REAL,
        "sweeps": WHOLE,
    }),
    (sj.prune.refit, LAYER, {
        "kernel": [*ARRAYS, COMPLEX, KERNEL * np.nan], "mask": [*ARRAYS, KERNEL], "gram": [*ARRAYS, GRAM * np.nan, -GRAM],
        "start": [*ARRAYS[1:], COMPLEX], "damping": REAL, "steps": WHOLE,
    }),
    (sj.prune.round_kernel, {**LAYER, "dtype": "int8"}, {
        "kernel": [*ARRAYS, COMPLEX, KERNEL * np.nan], "mask": [*ARRAYS, KERNEL], "gram": [*ARRAYS, GRAM * np.nan, -GRAM],
        "start": [*ARRAYS, COMPLEX], "dtype": [*DTYPES, "float32", None], "damping": REAL,
        "sweeps": WHOLE,
    }),
    (sj.prune.clip_search, {"kernel": KERNEL, "energy": np.ones(64), "dtype": "int8"}, {
        "kernel": [*ARRAYS, COMPLEX, KERNEL * np.nan], "energy": [*ARRAYS, COMPLEX],
        "dtype": [*DTYPES, "float32", None],
    }),
    (sj.prune.layer_error, {"kernel": KERNEL, "other": KERNEL, "gram": GRAM}, {
        "kernel": ARRAYS, "other": ARRAYS, "gram": [*ARRAYS, GRAM * np.nan, -GRAM],
    }),
    (sj.prune.cut, {"ids": np.arange(99), "sequences": 3, "length": 8}, {
        "ids": [None, "a", 0, [1.5], np.zeros((9, 9), int), object()], "sequences": [*WHOLE, 0],
        "length": [*WHOLE, 0], "seed": GIVEN_WHOLE,
    }),
    (sj.prune.Calibration, {"batches": np.ones((2, 8), int)}, {
        "smooth": [*REAL, 1.5], "correct": [*REAL, 1.5], "damping": REAL, "work": [0, 1.5, [], len],
        "progress": [0, "a", [], X],
    }),
    (sj.adapters.add, {"tree": {"a": W}}, {
        "rank": [*WHOLE, 0], "alpha": ["3", "", {}, [], object(), np.zeros(3), W, float("nan"), float("inf"), len],
        "adapted": [0, 1.5, "(", []], "dtype": [*DTYPES, "int8"],
        "seed": ["3", "", {}, [], np.zeros(3), None, 1.5, 10**30],
    }),
    (sj.trainable.masters, {"tree": {"a": FLOAT}}, {"qdtype": [*DTYPES, "float32"]}),
    (sj.train.Shuffled, {"rows": X, "size": 2}, {
        "rows": [None, "a", 0, {}, object()], "size": [*WHOLE, 0, 4], "seed": WHOLE,
    }),
    (trained, {}, {
        "batches": [None, "a", 0, X], "steps": [*GIVEN_WHOLE, 0],
        "learning_rate": [*REAL, 0], "warmup": WHOLE, "accumulate": [*WHOLE, 0],
        "every": [*WHOLE, 0], "typical": [*NUMBERS, float("inf"), 0],
        "qdtype": DTYPES, "progress": [0, "a", []], "optimizer": [0, "a", []],
        "trained": [0, 1.5, "("], "loss_fn": [None, 0, "a", lambda w, x: None, lambda w, x: 1,
                    lambda w, x: x, lambda w, x: (x.sum(), 1)],
        "params": [{}, {"a": np.arange(3)}, "a", None], "held_out": ["a", object(), b"x"],
        "checkpoint": [0, 1.5, "", [], object()],
    }),
    (sj.train.kl_divergence, {"student": X, "teacher": X}, {
        "student": ARRAYS[:9], "teacher": [*ARRAYS[:9], X[:2]], "temperature": [*REAL, 0],
    }),
    (sj.train.distillation_loss, {"model": MODEL, "teacher": MODEL}, {
        "temperature": [*REAL, 0], "hidden": REAL, "model": [None, "a", 0, W],
        "teacher": [None, "a", 0, W],
    }),
    (TOKENIZER.encode, {"text": "a"}, {"text": [None, 0, b"x", ["a"], object(), "\ud800"]}),
    (TOKENIZER.decode, {"ids": [1]}, {"ids": [None, "a", 0, [-1], [1.5], [2**40], [[1]], ["a"]]}),
    (sj.lm.load, {"path": "none"}, {
        "path": [None, "", 0, 1.5, [], object(), "none", "a\0b"],
    }),
    (sj.checkpoint.save, {"path": "none", "params": {}}, {
        "path": [None, "", 0, 1.5, [], object(), "a\0b"],
    }),
    (sj.checkpoint.load, {"path": "none"}, {"path": [None, "", 0, [], object(), "a\0b"]}),
    (sj.lm.save, {"model": MODEL, "path": "none"}, {
        "model": [None, "a", W], "path": [None, "", 0, 1.5, [], object(), "a\0b"],
        "floats": [*DTYPES, "int8"],
    }),
    (sj.lm.convert, {"model": MODEL, "rules": "6:8"}, {"method": [*NAMES[:-1], "gptq"]}),
    (sj.lm.convert, {"model": MODEL, "rules": "6:8", "method": "wanda"}, {
        "calibration": [*ARRAYS[:5], *ARRAYS[7:], [1], [IDS * 99], sj.prune.Calibration(IDS * 99),
                        sj.prune.Calibration([IDS, -IDS]), np.full((4, 8), np.nan), IDS[0]],
    }),
    (sj.lm.convert_files, {"path": "none", "out": "out", "rules": "6:8"}, {
        "path": [None, "", 0, [], "none"], "out": [None, "", 0, [], object(), "a\0b"],
        "replace": [None, 1, "no", []], "floats": [*DTYPES, "int8"], "method": [*NAMES[:-1]],
    }),
    (MODEL.generate, {"prompts": [[1, 2]], "max_new_tokens": 1}, {
        "prompts": [None, 0, 1.5, {}, object(), np.zeros((2, 2, 2)), [[]], [[99]], [[-1]], W],
        "max_new_tokens": [v for v in WHOLE if v is not None], "temperature": REAL,
        "top_k": WHOLE, "top_p": [*REAL, 1.5], "stop": [0, 1.5, [1], object()], "seed": WHOLE,
        "ends": [0, 1.5, "a", [99], [0.5], object()], "cache_dtype": DTYPES,
        "progress": [0, "a", []],
    }),
    (Decoder, {"config": MODEL.config, "params": MODEL.params}, {
        "config": [None, "a", 0], "params": [None, "a", {}, W], "files": [0, "a", {"a": 0}, []],
        "about": [0, "a", [], 1.5],
    }),
    (sj.lm.eight_bit, {"pattern": "6:8"}, {"pattern": ["6:9", "", 0, [], None]}),
    (Sampling, {}, {
        "temperature": REAL, "top_k": WHOLE, "top_p": [*REAL, 1.5], "seed": WHOLE,
    }),
    (init_cache, {"config": MODEL.config, "batch": 1, "length": 8}, {
        "batch": [*WHOLE, 0], "length": [*WHOLE, 0], "dtype": [*DTYPES, None],
        "config": [None, "a", 0],
    }),
    (apply, {"config": MODEL.config, "params": MODEL.params, "ids": np.ones((1, 2), int)}, {
        "ids": [*ARRAYS, COMPLEX], "positions": [*ARRAYS[1:], COMPLEX], "config": [None, "a", 0],
        "params": [None, "a", 0, {}, W],
    }),
    (general, {"in_features": 16, "out_features": 8}, {
        "in_features": [*WHOLE, 0], "out_features": [*WHOLE, 0],
        "pattern": ["6:9", "", 0, [], None], "qdtype": DTYPES,
    }),
    (dense, {"features": 8}, {
        "features": [*WHOLE, 0], "pattern": ["6:9", "", 0, [], None], "qdtype": DTYPES,
    }),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "name", "values"), flat(CASES))
def test_a_bad_argument_is_named(function, arguments, name, values):
    check_named(function, arguments, name, values)


def test_numbers_of_numpy_and_jax_are_numbers():
    for value in (np.float32(0.5), np.float64(0.5), jnp.float32(0.5), np.array(0.5), 1, np.int8(1)):
        assert Bound(0, 1).check(value, "share") in (0.5, 1)
    for value in (1, np.int64(1), np.array(1), jnp.int32(1)):
        assert Bound(0, 1, whole=True).check(value, "count") == 1
    assert sj.RMSNorm(np.ones(8), eps=np.float32(1e-6)).eps == np.float32(1e-6)


def test_a_whole_number_that_int32_does_not_hold_is_a_number():
    kernel, gram = jnp.asarray(np.eye(16)[:, :4] + 1, jnp.float32), jnp.eye(16)
    np.testing.assert_array_equal(
        *(
            sj.prune.sparsegpt(kernel, "6:8", gram, damping=damping)[1]
            for damping in (2**40, 2.0**40)
        )
    )


def test_arrays_of_another_byte_order_are_read():
    w = sj.pack(KERNEL.astype(">f4"), "6:8", dtype="int8")
    np.testing.assert_array_equal(w.values, sj.pack(KERNEL, "6:8", dtype="int8").values)
    np.testing.assert_array_equal(sj.linear(X.astype(">f4"), w), sj.linear(X, W))


def test_rules_that_can_be_read_once_only_are_refused():
    """A calibrated conversion reads them twice, and would convert nothing the second time."""
    rules = ((path, "6:8") for path in [".*mlp.*"])
    with pytest.raises(ValueError, match="rules must be an ordered list"):
        sj.lm.convert(MODEL, rules, "wanda", IDS)


def test_the_mask_of_an_array_is_never_dropped():
    """Tokens that are masked, as padding may be, would be read as all others are."""
    rows = np.ma.masked_array(np.ones((4, 8), np.int32), np.arange(32).reshape(4, 8) % 2)
    for given in (rows, [rows], [(rows, rows)]):
        with pytest.raises(TypeError, match=r"calibration must be .* MaskedArray"):
            sj.prune.Calibration(given).as_batches()
    with pytest.raises(TypeError, match=r"rows must be .* MaskedArray"):
        sj.train.Shuffled(rows, 2)
    with pytest.raises(ValueError, match="ids must be token ids, got a MaskedArray"):
        sj.prune.cut(rows[0], 1, 4)

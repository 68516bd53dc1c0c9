"""The kinds of linear layers that race in whole models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slidejax.bench import contenders, model_layers
from slidejax.bench.shapes import MODELS
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import Pattern

TINY = MODELS["tiny"]
INT8, FP8 = (numerics.check_dtype(name) for name in ("int8", "float8_e4m3fn"))


def kinds(patterns=("6:8",), dtypes=(INT8,)):
    return model_layers.kinds([Pattern.parse(p) for p in patterns], dtypes)


def test_every_pattern_and_dtype_takes_part_once_and_dense_int8_always():
    names = [kind.name for kind in kinds(["6:8", "dense", "6:8", "2:4"], [INT8, FP8])]
    assert names == [
        *(layer.name for layer in contenders.JAX_LAYERS),
        *("6:8 int8 raw", "6:8 int8 prepared", "6:8 float8_e4m3fn raw"),
        *("6:8 float8_e4m3fn prepared", "dense int8", "dense float8_e4m3fn"),
        *("2:4 int8 raw", "2:4 int8 prepared", "2:4 float8_e4m3fn raw"),
        *("2:4 float8_e4m3fn prepared", "no linear layers"),
    ]
    assert "dense int8" in [kind.name for kind in kinds(["4:6"], [FP8])]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_every_kind_multiplies(kind):
    w = jax.random.normal(jax.random.key(0), (32, 64), jnp.bfloat16) / 8
    if "6:8" in kind.name:  # the first two of each group are zeros: nothing is lost by pruning
        w = w.reshape(32, 8, 8).at[:, :, :2].set(0).reshape(32, 64)
    x = jax.random.normal(jax.random.key(1), (2, 3, 64), jnp.bfloat16)
    weights = kind.make(w)
    y = kind.multiply(x, weights if kind.after is None else kind.after(weights))
    assert y.shape == (2, 3, 32) and y.dtype == jnp.bfloat16
    if kind.name == model_layers.NO_LINEARS:
        np.testing.assert_array_equal(y, x[..., :1] * w[:, 0])
        return
    exact = np.asarray(x, np.float32) @ np.asarray(w, np.float32).T
    error = np.linalg.norm(np.asarray(y, np.float32) - exact) / np.linalg.norm(exact)
    assert error < (0.05 if "fp8" in kind.name else 0.02)


def test_kinds_with_the_same_weights_share_them_and_layers_do_not():
    weights, reasons = model_layers.weights_of_kinds(kinds(), TINY, 2, lambda text: None)
    assert reasons == {} and {*weights} == {kind.name for kind in kinds()}
    assert weights["jax int8"] is weights["jax int8 weights"]
    raw, prepared = (weights[f"6:8 int8 {how}"][1]["down"] for how in ("raw", "prepared"))
    assert isinstance(raw, SlideWeight) and raw.values is prepared.values
    assert not raw.prepared and prepared.prepared
    first, second = (block["o"] for block in weights["jax bf16"])
    assert (first != second).any()
    for block in weights["jax bf16"]:
        assert {name: w.shape for name, w in block.items()} == TINY.linears


def test_a_kind_that_cannot_be_had_leaves_the_others_in_the_race():
    def too_large(w):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")

    bf16, *_, dense, _ = kinds()
    broken = dataclasses.replace(bf16, name="too large", make=too_large)
    useless = dataclasses.replace(dense, name="dense prepared", after=lambda weights: weights)
    weights, reasons = model_layers.weights_of_kinds(
        [broken, useless, dense], TINY, 1, lambda text: None
    )
    assert {*weights} == {"dense int8"}
    assert reasons == {
        "too large": "RESOURCE_EXHAUSTED: out of memory",
        "dense prepared": "sj.prepare adds nothing on this device",
    }

"""`linear(..., residual=)` with every kind of weight that takes the place of a packed one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_problem import close, problem, residual_of

import slidejax as sj
from slidejax.variants.serving import ServingWeight, serving
from slidejax.variants.trainable import masters


def adapted(w, masked=False):
    a = sj.adapters.add({"kernel": w}, rank=2, masked=masked)["kernel"]
    return dataclasses.replace(a, lora_b=jnp.full_like(a.lora_b, 0.3))


KINDS = {
    "packed": lambda w: w,
    "master": masters,
    "adapted": adapted,
    "masked": lambda w: adapted(w, masked=True),
    "serving": serving,
}


def skip_what_serves_on_a_gpu(w):
    if isinstance(w, sj.SlideWeight):
        pytest.skip("a GPU serves packed weights")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual_dtype", ["bfloat16", "float32"])
def test_the_residual_is_added_to_the_float32_result(kind, residual_dtype):
    x, w, bias = problem(0, 6, 40, 8, "6:8", "int8")
    w = KINDS[kind](w)
    if kind == "serving":
        skip_what_serves_on_a_gpu(w)
        assert isinstance(w, ServingWeight)
    x, residual = x.reshape(2, 3, 40), residual_of(0, (2, 3, 8), residual_dtype)
    run = jax.jit(sj.linear, static_argnames="out_dtype")
    want = run(x, w, bias) + residual.astype(jnp.float32)
    got = run(x, w, bias, residual=residual)
    assert got.shape == (2, 3, 8)
    close(got, want, 1e-6)
    narrow = run(x, w, bias, out_dtype="bfloat16", residual=residual)
    np.testing.assert_array_equal(narrow, got.astype(jnp.bfloat16))
    assert run(x[:, :0], w, bias, residual=residual[:, :0]).shape == (2, 0, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_passes_through(kind):
    x, w, bias = problem(0, 6, 40, 8, "6:8", "int8")
    w = KINDS[kind](w)
    residual = residual_of(0, (6, 8), "bfloat16")

    def loss(x, bias, residual, inside):
        if inside:
            y = sj.linear(x, w, bias, residual=residual)
        else:
            y = sj.linear(x, w, bias) + residual.astype(jnp.float32)
        return jnp.sin(y).sum()

    got = jax.grad(loss, (0, 1, 2))(x, bias, residual, True)
    want = jax.grad(loss, (0, 1, 2))(x, bias, residual, False)
    assert got[2].dtype == jnp.bfloat16
    for a, b in zip(got, want, strict=True):
        close(a, b, 0.01 if a.dtype == jnp.bfloat16 else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_one_clear_error_for_another_shape(kind):
    x, w, bias = problem(0, 6, 40, 8, "6:8", "int8")
    with pytest.raises(ValueError, match=r"residual must have the shape of the result, \(6, 8\)"):
        sj.linear(x, KINDS[kind](w), bias, residual=jnp.ones((6, 40)))

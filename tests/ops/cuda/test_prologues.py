"""How prologues are passed to the lift kernel, and when it computes them."""

import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.ops.cuda import prologues


@pytest.mark.parametrize(
    ("prologue", "kind", "activation", "eps"),
    [
        (None, "none", "silu", 0.0),
        (sj.RMSNorm(jnp.ones(4), 0.5), "rms_norm", "silu", 0.5),
        (sj.LayerNorm(jnp.ones(4), jnp.ones(4), 0.25), "layer_norm", "silu", 0.25),
        (sj.Activation("gelu_tanh"), "activation", "gelu_tanh", 0.0),
        (sj.GLU(jnp.ones((2, 4)), "relu"), "glu", "relu", 0.0),
    ],
    ids=["none", "rms", "layer", "activation", "glu"],
)
def test_attributes_and_operands(prologue, kind, activation, eps):
    (up, weight, bias), attributes = prologues.operands_of(jnp.ones((2, 4)), prologue)
    assert attributes == {"prologue": kind, "activation": activation, "eps": np.float32(eps)}
    assert up.shape == ((2, 4) if kind == "glu" else (0,))
    assert (
        weight.shape == ((4,) if kind in ("rms_norm", "layer_norm") else (0,))
        and weight.dtype == jnp.float32
    )
    assert bias.shape == ((4,) if kind == "layer_norm" else (0,))


def test_rows_that_fit_are_fused_for_8_bit_results():
    x = jnp.zeros((1, 64), jnp.bfloat16)
    assert prologues.fused(x, jnp.int8, sj.Activation("silu"))
    assert not prologues.fused(x, jnp.bfloat16, sj.Activation("silu"))
    assert not prologues.fused(x, jnp.int8, None)
    long = jnp.zeros((1, 100 << 10), jnp.bfloat16)
    assert not prologues.fused(long, jnp.int8, sj.Activation("silu"))

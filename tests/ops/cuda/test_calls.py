"""The programs to which the lift's calls are lowered."""

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops.cuda import calls


def cuda_text(fn, *args):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_accumulators():
    dtypes = {"int8": "int32", "float8_e4m3fn": "float32", "bfloat16": "bfloat16"}
    for dtype, expected in dtypes.items():
        assert calls.accumulator(jnp.dtype(dtype)) == np.dtype(jnp.dtype(expected))


def test_the_lift_is_one_call_with_its_group_and_its_columns():
    def lift(x, absmax):
        return calls.lift_quantize_call(x, absmax, group=8, lifted_columns=96, dtype=jnp.int8)

    x, absmax = jnp.ones((4, 64), jnp.bfloat16), jnp.zeros(0, jnp.float32)
    text = cuda_text(lift, x, absmax)
    [call] = [line for line in text.splitlines() if "@slidejax_lift_quantize(" in line]
    assert "group = 8 : i32" in call and "tensor<4x96xi8>, tensor<4xf32>" in call

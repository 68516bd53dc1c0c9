"""The attention kernel on a GPU: against the formulas, and in compiled programs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problem import Problem

from slidejax.ops.decode_attention import decode_attention

pytestmark = pytest.mark.gpu
FLOATS = [jnp.bfloat16, jnp.float16, jnp.float32]


@functools.partial(jax.jit, static_argnames=("scale", "window", "together"))
def attend(of, scale, window, together):
    q, k, v = of["q"], of["k"], of["v"]
    if together:
        q, k, v = jnp.concatenate([q, k, v], 1), None, None
    turns = of["cosines"], of["sines"]
    return decode_attention(
        *(q, k, v, of["keys"], of["values"], of["positions"], turns),
        scale=scale,
        window=window,
        implementation="attention",
    )


def run(problem, together):
    of = {name: jnp.asarray(x) for name, x in problem.arrays().items()}
    return attend(of, problem.scale, problem.window, together)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_every_type_and_size(dtype, cache_dtype, head_dim):
    of = {"dtype": dtype, "cache_dtype": cache_dtype, "head_dim": head_dim}
    for more in (
        {"rows": 1, "kv_heads": 2, "group": 7, "length": 300, "positions": (299,)},
        {"rows": 3, "kv_heads": 3, "group": 3, "length": 1000, "window": 100},
        {"rows": 3, "kv_heads": 2, "group": 4, "length": 100, "window": 100},  # a ring
    ):
        problem = Problem(**of, **more)
        problem.compare(*run(problem, together=head_dim == 64))


@pytest.mark.parametrize("rows", [1, 2, 16, 64])
@pytest.mark.parametrize("length", [1, 33, 2048])
def test_any_number_of_rows(rows, length):
    bf16 = {"dtype": jnp.bfloat16, "cache_dtype": jnp.bfloat16}
    problem = Problem(rows=rows, kv_heads=8, group=4, length=length, head_dim=128, **bf16)
    problem.compare(*run(problem, together=True))


def test_a_loop_writes_the_cache_in_place():
    """The cache is not copied, and the tokens of earlier steps are seen."""
    problem = Problem(rows=1, kv_heads=8, group=4, length=64, head_dim=128, positions=(0,))
    of = {name: jnp.asarray(x) for name, x in problem.arrays().items()}
    turns = of["cosines"], of["sines"]

    def steps(keys, values, implementation):
        def step(carry, position):
            y, keys, values = decode_attention(
                *(of["q"], of["k"], of["v"] * position, *carry, position[None], turns),
                implementation=implementation,
            )
            return (keys, values), y

        return jax.lax.scan(step, (keys, values), jnp.arange(20, dtype=jnp.int32))

    compiled = jax.jit(steps, static_argnums=2, donate_argnums=(0, 1))
    program = compiled.lower(of["keys"], of["values"], "attention").compile()
    copies = re.findall(r"f32\[1,8,64,128\]\S* copy\(", program.as_text())
    assert not copies
    want = jax.jit(steps, static_argnums=2)(of["keys"], of["values"], "reference")
    got = program(of["keys"] + 0, of["values"] + 0)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[0][1], want[0][1], rtol=1e-6)

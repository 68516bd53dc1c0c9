"""`decode_attention` in plain JAX: against its formulas, cut over a mesh, and as it is lowered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problem import Problem
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slidejax.ops.decode_attention import decode_attention, workspace_bytes

FLOATS = [jnp.bfloat16, jnp.float16, jnp.float32]


def run(problem, together=False, implementation=None):
    of = {name: jnp.asarray(x) for name, x in problem.arrays().items()}
    q, k, v = of["q"], of["k"], of["v"]
    if together:
        q, k, v = jnp.concatenate([q, k, v], 1), None, None
    return decode_attention(
        *(q, k, v, of["keys"], of["values"], of["positions"], (of["cosines"], of["sines"])),
        scale=problem.scale,
        window=problem.window,
        implementation=implementation,
    )


@st.composite
def problems(draw):
    return Problem(
        rows=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        length=draw(st.sampled_from([1, 2, 7, 24])),
        head_dim=draw(st.sampled_from([2, 6, 16])),
        dtype=draw(st.sampled_from(FLOATS)),
        cache_dtype=draw(st.sampled_from(FLOATS)),
        window=draw(st.sampled_from([None, 1, 3, 7, 24, 30])),
        seed=draw(st.integers(0, 99)),
    )


@examples(6)
@given(problems(), st.booleans())
def test_rows_attend_to_their_own_tokens(problem, together):
    problem.compare(*run(problem, together))


def test_a_row_without_a_token_writes_nothing_and_its_result_is_zero():
    problem = Problem(rows=2, positions=(-1, 3))
    attended = run(problem)
    assert (attended.y[0] == 0).all() and (attended.y[1] != 0).any()
    np.testing.assert_array_equal(attended.keys[0], problem.arrays()["keys"][0])
    assert (attended.keys[1] != problem.arrays()["keys"][1]).any()


def test_a_cache_as_long_as_the_window_is_a_ring():
    """The new token takes the slot of the one that it no longer sees."""
    problem = Problem(rows=3, length=8, window=8, positions=(8, 21, 7))
    attended = run(problem)
    problem.compare(*attended)
    for row, slot in enumerate((0, 5, 7)):
        changed = np.asarray(attended.keys[row] != problem.arrays()["keys"][row]).any((0, 2))
        assert changed.tolist() == [at == slot for at in range(8)]


def test_what_lies_behind_the_position_does_not_matter():
    """Slots of other texts, even nan, are not seen."""
    problem = Problem(rows=1, positions=(5,))
    of = {name: jnp.asarray(x) for name, x in problem.arrays().items()}
    turns = of["cosines"], of["sines"]
    run = jax.jit(functools.partial(decode_attention, scale=problem.scale))
    want = run(*(of[n] for n in ("q", "k", "v", "keys", "values", "positions")), turns).y
    behind = (a.at[:, :, 6:].set(1e9) for a in (of["keys"], of["values"]))
    got = run(of["q"], of["k"], of["v"], *behind, of["positions"], turns).y
    np.testing.assert_array_equal(got, want)


def test_a_batch_of_batches_is_more_rows():
    problem = Problem(rows=6)
    of = {name: jnp.asarray(x) for name, x in problem.arrays().items()}
    arguments = [of[name] for name in ("q", "k", "v", "keys", "values", "positions")]
    turns = (of["cosines"], of["sines"])
    attend = functools.partial(decode_attention, scale=problem.scale)
    batched = [x.reshape(2, 3, *x.shape[1:]) for x in arguments]
    found = jax.vmap(attend)(*batched, tuple(x.reshape(2, 3, -1) for x in turns))
    problem.compare(*(x.reshape(6, *x.shape[2:]) for x in found))
    # What is not mapped is the same for all: here the cache.
    one = [x[:1] for x in arguments]
    mapped = jax.vmap(lambda q: attend(q, *one[1:], tuple(x[:1] for x in turns)))
    np.testing.assert_allclose(
        mapped(jnp.stack([one[0], 2 * one[0]])).y[0],
        attend(*one, tuple(x[:1] for x in turns)).y,
        rtol=1e-6,
    )


def test_the_derivative_is_that_of_the_formulas():
    problem = Problem(rows=2, positions=(3, 9))
    of = {name: jnp.asarray(x) for name, x in problem.arrays().items()}
    turns = of["cosines"], of["sines"]

    @jax.jit
    def loss(q, v, values):
        attended = decode_attention(
            q, of["k"], v, of["keys"], values, of["positions"], turns, scale=problem.scale
        )
        return (attended.y**2).sum()

    names = "q", "v", "values"
    got = jax.jit(jax.grad(loss, range(3)))(*(of[name] for name in names))
    for i, name in enumerate(names):
        step = jnp.zeros_like(of[name]).reshape(-1).at[5].set(1e-2).reshape(of[name].shape)
        moved = [
            loss(*(of[n] + sign * step if n == name else of[n] for n in names)) for sign in (1, -1)
        ]
        np.testing.assert_allclose(
            got[i].reshape(-1)[5], (moved[0] - moved[1]) / 2e-2, rtol=0.02, atol=1e-3
        )
    assert (got[2][0, :, 3] == 0).all()  # the slot that is overwritten


@pytest.mark.parametrize("together", [False, True])
def test_rows_and_heads_are_cut_over_a_mesh_without_gathering_the_cache(together):
    if len(jax.devices("cpu")) < 8:
        pytest.skip("needs 8 CPU devices")
    mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("r", "h"))
    problem = Problem(rows=4, kv_heads=2, group=3)
    heads = None if together else "h"
    of = {name: jnp.asarray(x) for name, x in problem.arrays().items()}
    q, k, v = of["q"], of["k"], of["v"]
    cut = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    parts = [
        cut(x, "r", heads) for x in ((jnp.concatenate([q, k, v], 1),) if together else (q, k, v))
    ]
    cache = [cut(of[name], "r", heads) for name in ("keys", "values")]

    @jax.jit
    def attend(parts, cache):
        parts = [*parts, None, None][:3]
        turns = of["cosines"], of["sines"]
        return decode_attention(*parts, *cache, of["positions"], turns, scale=problem.scale)

    problem.compare(*attend(parts, cache))
    where = NamedSharding(mesh, P("r", heads))
    assert attend(parts, cache).keys.sharding.is_equivalent_to(where, 4)
    text = attend.lower(parts, cache).compile().as_text()
    assert not re.findall(r"\b(all-gather|all-to-all|collective-permute)(?:-start)?\(", text)


@pytest.mark.parametrize("together", [False, True])
def test_the_kernel_is_lowered_for_cuda_and_writes_in_place(together):
    problem = Problem(rows=1, dtype=jnp.bfloat16, cache_dtype=jnp.bfloat16)
    traced = jax.jit(lambda: run(problem, together)).trace()
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    [call] = [line for line in text.splitlines() if "@slidejax_decode_attention" in line]
    assert "operand_index = 3" in call and "operand_index = 4" in call
    assert "scatter" not in text and "cosine" not in text


def test_the_reference_is_lowered_for_cuda_where_the_kernel_cannot_run():
    problem = Problem(rows=1, head_dim=20)
    text = jax.jit(lambda: run(problem)).trace().lower(lowering_platforms=("cuda",)).as_text()
    assert "slidejax_decode_attention" not in text
    asked = jax.jit(lambda: run(problem, implementation="attention")).trace()
    with pytest.raises(NotImplementedError, match="multiple of 16 up to 256, not 20"):
        asked.lower(lowering_platforms=("cuda",))
    with pytest.raises(NotImplementedError, match="runs on CUDA only"):
        run(Problem(), implementation="attention")


def test_few_rows_have_a_workspace():
    assert workspace_bytes(1, 32, 8, 128) == 16 + 8 * 16 * 4 * 16 * 33
    assert workspace_bytes(16, 32, 8, 128) == 16  # enough thread blocks without splitting


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": jnp.zeros((2, 2, 24))}, "keys must be"),
        ({"values": jnp.zeros((2, 2, 23, 16))}, "values must be like keys"),
        ({"q": jnp.zeros((2, 3, 16))}, "multiple of 2 heads"),
        ({"q": jnp.zeros((2, 4, 16), jnp.int32)}, "q must be bfloat16"),
        ({"k": None}, "k and v must both"),
        ({"v": jnp.zeros((2, 2, 8))}, "v must be float32 of shape"),
        ({"positions": jnp.zeros(3, jnp.int32)}, "positions must be integers of shape"),
        ({"positions": jnp.zeros(2)}, "positions must be integers"),
        (
            {"positions": np.array([0, 2**32])},
            "integers that int32 cannot hold, such as 4294967296",
        ),
        ({"turns": jnp.zeros((2, 8))}, "turns must be"),
        ({"turns": (jnp.zeros((2, 8)), jnp.zeros((2, 7)))}, "turns must be two arrays"),
        ({"scale": float("nan")}, "scale must be"),
        ({"window": 0}, "window must be"),
        ({"implementation": "fast"}, "implementation must be one of"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    of = {name: jnp.asarray(x) for name, x in Problem().arrays().items()}
    turns = of.pop("cosines"), of.pop("sines")
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_attention(**{**of, "turns": turns, **change})

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import slidejax as sj


def params(dtype=None):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((40, 6)), jnp.float32)
    return {"a": {"kernel": sj.pack(kernel, "6:8", dtype=dtype), "bias": jnp.zeros(6)}, "step": jnp.int32(0), "name": None}


@pytest.mark.parametrize(("dtype", "trained"), [(None, 2), ("int8", 1), ("float8_e4m3fn", 1)])
def test_partition_round_trips(dtype, trained):
    tree = params(dtype)
    train, rest = sj.partition(tree)
    assert len(jax.tree.leaves(train)) == trained
    assert len(jax.tree.leaves(train)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(tree))
    again = sj.combine(train, rest)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_training_with_optax_keeps_the_mask():
    tree = params()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((64, 40)), jnp.float32)
    target = x @ jnp.asarray(np.random.default_rng(2).standard_normal((40, 6)), jnp.float32)
    train, rest = sj.partition(tree)
    optimiser = optax.adam(0.05)

    @jax.jit
    def step(train, state):
        def loss(train):
            p = sj.combine(train, rest)["a"]
            return ((sj.linear(x, p["kernel"], p["bias"]) - target) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(train)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(train, updates), state, value

    state, losses = optimiser.init(train), []
    for _ in range(60):
        train, state, value = step(train, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    before, after = sj.unpack(tree["a"]["kernel"]), sj.unpack(sj.combine(train, rest)["a"]["kernel"])
    assert not np.asarray(after)[np.asarray(before) == 0].any(), "what was pruned stays pruned"
    assert (np.asarray(after) != np.asarray(before)).any()


def test_combining_what_does_not_belong_together():
    train, rest = sj.partition(params())
    with pytest.raises(ValueError, match="both hold a leaf"):
        sj.combine(train, train)
    with pytest.raises(ValueError, match=r"structure|keys|Mismatch"):
        sj.combine(train, {"b": rest})

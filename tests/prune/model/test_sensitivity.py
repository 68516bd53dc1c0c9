import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import slidejax as sj
from slidejax.contraction import to_matrix
from slidejax.prune.model.program import named_leaves
from slidejax.prune.model.sensitivity import Estimate, drawn_loss, sensitivities, shrunk


def test_each_row_counts_with_its_own_gradient():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    made = sj.nnx.functional(model)
    run, params = made.run, made.params
    x, changes = (
        jax.random.normal(jax.random.key(0), (3, 16, 8)),
        list(jax.random.normal(jax.random.key(1), (2, 8, 4))),
    )
    found = sensitivities(
        lambda params, x: jnp.sum(run(params, x) ** 2) / 2, params, list(x), {"kernel": changes}
    )["kernel"]
    for change, estimate in zip(changes, found, strict=True):
        # The gradient is the output itself.
        rows = jnp.sum(model(x) * (x @ change), axis=-1) ** 2 / 2
        np.testing.assert_allclose(estimate.value, jnp.sum(rows), rtol=1e-5)
        np.testing.assert_allclose(estimate.noise, jnp.sum(rows**2) / jnp.sum(rows) ** 2, rtol=1e-4)


@pytest.mark.parametrize(
    "equation", ["bti,io->bto", "bti,oi->obt", "btnh,nhd->btd", "bti,inh->bnth"]
)
def test_rows_are_found_in_any_layout(equation):
    """The derivative along a change, row by row, whatever the order of the result's axes."""
    sizes = {"b": 2, "t": 3, "i": 8, "o": 4, "n": 2, "h": 4, "d": 5}
    operands, result = equation.split("->")
    model = nn.Einsum(tuple(sizes[c] for c in operands.split(",")[1]), equation, use_bias=False)
    x = jax.random.normal(jax.random.key(0), [sizes[c] for c in operands.split(",")[0]])
    params = model.init(jax.random.key(1), x)
    # The weight is the gradient of the output.
    weight = jax.random.normal(jax.random.key(2), [sizes[c] for c in result])

    made = sj.linen.functional(model, params)
    run, axes = made.run, made.layers(x)["kernel"]
    change = jax.random.normal(jax.random.key(3), named_leaves(params)["kernel"].shape)
    found = sensitivities(
        lambda params, x: jnp.sum(weight * run(params, x)),
        params,
        [x],
        {"kernel": [to_matrix(change, axes.kernel)]},
    )["kernel"][0]
    moved = jnp.einsum(equation, x, change) * weight
    rows = jnp.sum(moved, axis=[i for i, c in enumerate(result) if c not in "bt"])
    np.testing.assert_allclose(found.value, jnp.sum(rows**2) / 2, rtol=1e-4)


def test_the_estimate_is_the_divergence_of_a_small_change():
    """Over many tokens, for targets drawn from the predictions."""

    class Model(nnx.Module):
        def __init__(self):
            self.hidden, self.head = (
                nnx.Linear(8, 16, rngs=nnx.Rngs(0)),
                nnx.Linear(16, 7, rngs=nnx.Rngs(1)),
            )

        def __call__(self, x):
            return self.head(jnp.tanh(self.hidden(x)))

    made = sj.nnx.functional(Model())
    run, params = made.run, made.params
    x, change = (
        jax.random.normal(jax.random.key(0), (8192, 8)),
        0.03 * jax.random.normal(jax.random.key(1), (8, 16)),
    )

    class Output:
        def __init__(self, logits):
            self.logits = logits

    found = sensitivities(
        lambda params, x: drawn_loss(Output(run(params, x)), x),
        params,
        [x],
        {"hidden/kernel": [change]},
    )["hidden/kernel"][0]
    leaves = named_leaves(params)
    moved = jax.tree.unflatten(
        jax.tree.structure(params),
        [leaf + change if path == "hidden/kernel" else leaf for path, leaf in leaves.items()],
    )
    p, q = (jax.nn.log_softmax(run(tree, x)) for tree in (params, moved))
    np.testing.assert_allclose(found.value, jnp.sum(jnp.exp(p) * (p - q)), rtol=0.1)


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1e3), st.floats(0, 2), st.integers(1, 1000)),
        min_size=1,
        max_size=8,
    )
)
def test_shrinking_keeps_the_order_of_what_is_equally_noisy_and_stays_between(layers):
    noise = layers[0][1]
    found = {str(i): Estimate(value, noise) for i, (value, _, _) in enumerate(layers)}
    sizes = {str(i): size for i, (_, _, size) in enumerate(layers)}
    before = np.array([found[path].value / sizes[path] for path in found])
    after = np.array([value / sizes[path] for path, value in shrunk(found, sizes).items()])
    centre = np.exp(np.mean(np.log(before)))
    assert (np.diff(after[np.argsort(before)]) >= -1e-6 * after.max()).all()
    assert (np.minimum(before, centre) <= after * (1 + 1e-6)).all() and (
        after <= np.maximum(before, centre) * (1 + 1e-6)
    ).all()


def test_without_noise_nothing_is_shrunk():
    found = {"a": Estimate(2.0, 0.0), "b": Estimate(8.0, 0.0)}
    np.testing.assert_allclose(list(shrunk(found, {"a": 1, "b": 2}).values()), [2.0, 8.0])

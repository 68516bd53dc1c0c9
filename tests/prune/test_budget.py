import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import slidejax as sj
from slidejax.prune.budget import choose, gradient_energies, multiplications, packed_bytes

PATTERNS = [sj.Pattern.parse(p) for p in ("14:16", "6:8", "4:6", "2:4")]


@given(st.lists(st.tuples(st.floats(0, 10), st.sampled_from([32, 64, 200])), min_size=1, max_size=8), st.sampled_from([multiplications, packed_bytes]))
def test_the_budget_is_kept_and_uniform_is_never_better(layers, cost):
    shapes = {str(i): (width, 16) for i, (_, width) in enumerate(layers)}
    needs = {str(i): {p: weight * 2.0**-i for i, p in enumerate(reversed(PATTERNS))} for i, (weight, _) in enumerate(layers)}
    rules = dict(choose(needs, shapes, "6:8", cost=cost))
    uniform = sum(cost(shape, PATTERNS[1]) for shape in shapes.values())
    assert sum(cost(shapes[path], rule.pattern) for path, rule in rules.items()) <= uniform * (1 + 1e-6)
    assert sum(needs[path][rule.pattern] for path, rule in rules.items()) <= sum(of[PATTERNS[1]] for of in needs.values()) * (1 + 1e-9)


def test_a_budget_that_is_too_small():
    with pytest.raises(ValueError, match="less than what the cheapest patterns cost"):
        choose({"a": {PATTERNS[1]: 1.0}}, {"a": (8, 8)}, "2:4")


def test_gradient_energies_are_those_of_the_outputs():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    run, params, _ = sj.nnx.functional(model)
    x = jax.random.normal(jax.random.key(0), (16, 8))
    found = gradient_energies(lambda params, x: jnp.sum(run(params, x) ** 2) / 2, params, [x], ["kernel"])
    np.testing.assert_allclose(found["kernel"], jnp.sum(model(x) ** 2), rtol=1e-5)  # the gradient is the output itself


def test_a_layer_that_matters_more_keeps_more():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.loud, self.quiet = nnx.Linear(32, 16, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

        def __call__(self, x):
            return jnp.concatenate([self.loud(x), 0.01 * self.quiet(x)], axis=-1)

    model, x = Two(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (64, 32))
    rules = sj.prune.mixed(model, "6:8", [x], patterns=["14:16", "6:8", "2:4"], loss=lambda y, batch: jnp.sum(y**2) / 2)
    assert [(path, str(rule)) for path, rule in rules] == [("loud/kernel", "14:16 int8"), ("quiet/kernel", "2:4 int8")]
    assert len(sj.prune.convert(model, rules, [x]).loud.kernel.shape) == 2
    with pytest.raises(ValueError, match="loss= is needed"):
        sj.prune.mixed(model, "6:8", [x])

"""Linen modules as a model family."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slidejax as sj
from slidejax.functional import watching_inputs, watching_outputs
from slidejax.linen.family import FAMILY, functional


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x, scale=1.0):
        return nn.Dense(4, name="down")(nn.relu(nn.Dense(16, name="up")(x))) * scale


@pytest.fixture
def model():
    x = jax.random.normal(jax.random.key(1), (3, 8))
    return Mlp(), Mlp().init(jax.random.key(0), x), x


def test_it_runs_as_the_module_does(model):
    module, variables, x = model
    made = functional(module, variables, (x,))
    np.testing.assert_array_equal(made.run(made.params, x), module.apply(variables, x))
    np.testing.assert_array_equal(made.run(made.params, (x, 2.0)), module.apply(variables, x, 2.0))


def test_layers_show_their_inputs_and_outputs(model):
    module, variables, x = model
    made, inputs, outputs = functional(module, variables, (x,)), {}, {}

    def see_input(path, x, axes):
        inputs[path] = x
        return x

    def see_output(path, y):
        outputs[path] = y
        return y

    with watching_inputs(see_input), watching_outputs(see_output):
        y = made.run(made.params, x)
    assert list(inputs) == list(outputs) == ["up/kernel", "down/kernel"]
    np.testing.assert_array_equal(inputs["up/kernel"], x)
    np.testing.assert_array_equal(inputs["down/kernel"], nn.relu(outputs["up/kernel"]))
    np.testing.assert_array_equal(outputs["down/kernel"], y)


def test_a_watcher_can_change_an_input(model):
    module, variables, x = model
    made = functional(module, variables, (x,))
    with watching_inputs(lambda path, x, axes: 2 * x if path == "up/kernel" else x):
        changed = made.run(made.params, x)
    np.testing.assert_array_equal(changed, module.apply(variables, 2 * x))


def test_it_packs_as_convert_does(model):
    module, variables, x = model
    packed = functional(module, variables, (x,)).pack(variables, "6:8")
    jax.tree.map(
        np.testing.assert_array_equal, packed, sj.linen.convert(variables, "6:8", module, x)
    )


def test_which_models_are_its_own():
    assert FAMILY.owns(Mlp())
    assert not FAMILY.owns(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) and not FAMILY.owns(jnp.ones(2))
    with pytest.raises(ValueError, match="needs params="):
        functional(Mlp(), None)

"""The program of a model: its steps, and the taps at the inputs of layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import slidejax as sj
from slidejax.prune.model.program import Program, named_leaves


class Mlp(nn.Module):
    """Two layers that read the same input, inside a jitted call, and one after them."""

    @nn.compact
    def __call__(self, x):
        @nn.jit
        def halves(module, x):
            return nn.Dense(6, name="gate")(x) * nn.Dense(6, name="up")(x)

        return nn.Dense(3, name="down")(halves(self, x))


@pytest.fixture
def program():
    x = jnp.ones((2, 5))
    model = Mlp()
    variables = model.init(jax.random.key(0), x)
    functional = sj.linen.functional(model, variables, (x,))
    paths = ["gate/kernel", "up/kernel", "down/kernel"]
    return Program(functional.run, variables, x, paths), variables


def test_layers_with_the_same_input_share_its_number(program):
    program, _ = program
    taps = {step.tap.path: step.tap for step in program.steps if step.tap is not None}
    assert taps.keys() == {"gate/kernel", "up/kernel", "down/kernel"}
    assert taps["gate/kernel"].value == taps["up/kernel"].value == program.batch[0]
    assert taps["down/kernel"].value != program.batch[0]
    assert [program.width(taps[f"{name}/kernel"]) for name in ("gate", "down")] == [5, 6]


def test_parameters_are_known_by_their_paths(program):
    program, variables = program
    assert program.leaf.keys() == named_leaves(variables).keys()
    for path, leaf in named_leaves(variables).items():
        value = program.leaf[path]
        assert program.parameter(value) == path and program.of_parameters(value)
        assert program.shape(value).shape == leaf.shape
    [batch] = program.batch
    assert program.parameter(batch) is None and not program.of_parameters(batch)


def test_every_value_is_made_before_it_is_read(program):
    program, _ = program
    known = {*program.leaf.values(), *program.batch, *program.constants}
    for step in program.steps:
        numbers = {value for value in step.inputs if isinstance(value, int)}
        assert numbers <= known
        known |= set(step.outputs)

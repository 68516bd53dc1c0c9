"""NNX modules as a model family."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import slidejax as sj
from slidejax.functional import watching_inputs, watching_outputs
from slidejax.nnx.family import FAMILY, functional


class Model(nnx.Module):
    """A layer of each kind that converts, and one that is used twice."""

    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.heads = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
        self.mix = nnx.Einsum("bhd,hde->be", (2, 8, 8), rngs=rngs)

    def __call__(self, x):
        return self.up(self.mix(self.heads(nnx.relu(self.up(x)))))


@pytest.fixture
def model():
    return Model(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (3, 8))


def test_it_runs_as_the_module_does(model):
    module, x = model
    made = functional(module)
    np.testing.assert_array_equal(made.run(made.params, x), module(x))
    double = jax.tree.map(lambda leaf: 2 * leaf, made.params)
    assert not np.array_equal(made.run(double, x), module(x))
    np.testing.assert_array_equal(functional(module, double).run(double, x), made.run(double, x))


def test_layers_show_their_inputs_and_outputs(model):
    module, x = model
    made, inputs, outputs = functional(module), [], []

    def see_input(path, x, axes):
        inputs.append((path, x))
        return x

    def see_output(path, y):
        outputs.append((path, y))
        return y

    with watching_inputs(see_input), watching_outputs(see_output):
        y = made.run(made.params, x)
    order = ["up/kernel", "heads/kernel", "mix/kernel", "up/kernel"]
    assert [path for path, _ in inputs] == [path for path, _ in outputs] == order
    np.testing.assert_array_equal(inputs[0][1], x)
    np.testing.assert_array_equal(inputs[3][1], outputs[2][1])
    np.testing.assert_array_equal(outputs[3][1], y)
    assert made.layers(x).keys() == set(order)


def test_the_module_stays_as_it_is(model):
    module, _ = model
    made = functional(module)
    packed = made.pack(made.params, "6:8")
    assert type(module.up) is nnx.Linear and isinstance(module.up.kernel[...], jax.Array)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(packed),
        nnx.state(sj.nnx.convert(module, "6:8")),
    )


def test_which_models_are_its_own(model):
    assert FAMILY.owns(model[0]) and not FAMILY.owns(nn.Dense(2)) and not FAMILY.owns(None)


@pytest.mark.parametrize("odd", ["bi,ii->bi", "bi,io->b"])
def test_a_layer_that_is_no_product_does_not_stop_the_calibration_of_others(odd):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.odd = nnx.Einsum(odd, (64, 64), None, rngs=rngs)
            self.linear = nnx.Linear(64, 16, rngs=rngs)

        def __call__(self, x):
            y = self.odd(x)
            return self.linear(x * y.reshape(len(x), -1))

    model, report = Model(nnx.Rngs(0)), sj.Report()
    x = jax.random.normal(jax.random.key(0), (64, 64))
    converted = sj.prune.convert(model, "6:8", [x], report=report)
    assert [layer.path for layer in report.converted] == ["linear/kernel"]
    assert list(report.skipped) == ["odd/kernel"] and converted(x).shape == (64, 16)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("in_order", [True, False])
def test_a_parameter_that_layers_share_is_calibrated_on_the_inputs_of_both(method, in_order):
    """As a layer that is in two places is. The path is that of the first, which may run last."""

    class Model(nnx.Module):
        def __init__(self, one_layer):
            rngs = nnx.Rngs(0)
            self.z, self.b = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
            if one_layer:
                self.b = self.z
            else:
                self.b.kernel = self.z.kernel

        def __call__(self, x):
            return self.b(nnx.relu(self.z(x)))

    x = jax.random.normal(jax.random.key(1), (32, 16))
    made, report = [], sj.Report()
    for one_layer in (True, False):
        calibration = sj.prune.Calibration([x], in_order=in_order)
        report = sj.Report()
        made.append(sj.prune.convert(Model(one_layer), "6:8", calibration, method=method, report=report))  # fmt: skip
    assert [line.path for line in report.converted] == ["b/kernel", "z/kernel"]
    assert made[1].b.values is made[1].z.values
    jax.tree.map(np.testing.assert_array_equal, made[1].z.kernel, made[0].z.kernel)

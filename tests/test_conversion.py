"""One door for models of every family, also of families that are added."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slidejax as sj
from slidejax import conversion
from slidejax.contraction import Contraction
from slidejax.functional import Family, Functional, show_input, show_output
from slidejax.prune.model.methods import SPARSEGPT
from slidejax.prune.model.result import Pruned
from slidejax.rules import Converted, RuleSet, nbytes, pack_by_rule


def rows(seed=0):
    return jax.random.normal(jax.random.key(seed), (64, 16))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_door_does_what_the_families_do(tiny_llama):
    dense, x = nn.Dense(8), rows()
    variables = dense.init(jax.random.key(1), x)
    assert_same(
        conversion.convert(dense, "6:8", params=variables, example=(x,)),
        sj.linen.convert(variables, "6:8", dense, x),
    )
    layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    assert_same(
        nnx.state(conversion.convert(layer, "6:8")), nnx.state(sj.nnx.convert(layer, "6:8"))
    )
    assert_same(
        conversion.convert(tiny_llama, "6:8").params,
        sj.huggingface.convert(tiny_llama, "6:8").params,
    )
    assert sj.prune.convert is conversion.convert and sj.prune.mixed is conversion.mixed


def test_what_is_no_model():
    with pytest.raises(
        TypeError, match=r"flax\.linen.*flax\.nnx.*Flax model of transformers, got dict"
    ):
        conversion.convert({}, "6:8")
    layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    for arguments, message in (
        ({"method": "magic"}, "one of magnitude, wanda, sparsegpt"),
        ({"method": "wanda"}, "needs calibration"),
        ({"method": "magnitude", "calibration": [rows()]}, "uses no calibration"),
    ):
        with pytest.raises(ValueError, match=message):
            conversion.convert(layer, "6:8", **arguments)


@dataclasses.dataclass
class Chain:
    """A model of no framework: layers by name, one after the other."""

    layers: dict


def chain_of(model, params=None, example=()):
    def run(params, x):
        for name, layer in params.items():
            x = show_input(f"{name}/kernel", x, Contraction.dense(x.ndim))
            x = jnp.tanh(show_output(f"{name}/kernel", x @ layer["kernel"]))
        return x

    def pack(params, rules, *, prune=None, report=None):
        rules, report = RuleSet(rules), sj.Report() if report is None else report
        layers = {}
        for name, layer in params.items():
            path, kernel = f"{name}/kernel", layer["kernel"]
            rule = rules.match(path)
            w = pack_by_rule(kernel, rule, path, prune)
            layers[name] = {"kernel": w}
            report.converted.append(
                Converted(path, rule, w.dtype, kernel.shape, nbytes(kernel), nbytes(w))
            )
        rules.finish(report)
        return Chain(layers)

    return Functional(run, model.layers if params is None else params, pack)


@pytest.fixture
def chain(monkeypatch):
    monkeypatch.setattr(conversion, "_families", [*conversion._families])
    conversion.register(Family("a chain", lambda model: isinstance(model, Chain), chain_of))
    keys = jax.random.split(jax.random.key(2), 3)
    sizes = {"first": (16, 24), "second": (24, 24), "third": (24, 8)}
    kernels = {
        name: {"kernel": jax.random.normal(key, shape) / 4}
        for key, (name, shape) in zip(keys, sizes.items(), strict=True)
    }
    return Chain(kernels)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_family_that_was_registered_goes_through_the_door(chain, method):
    report = sj.Report()
    calibration = None if method == "magnitude" else [rows(1), rows(2)]
    packed = conversion.convert(chain, "4:6", calibration, method=method, report=report)
    assert [line.path for line in report.converted] == [f"{name}/kernel" for name in chain.layers]
    assert all(isinstance(layer["kernel"], sj.SlideWeight) for layer in packed.layers.values())
    assert report.notes == (
        [] if calibration is None else [f"{method}, layer by layer in 3 stages; the inputs of 0 layers smoothed"]
    )  # fmt: skip


def test_a_family_must_be_one():
    with pytest.raises(TypeError, match="must be a Family, got 'x'"):
        conversion.register("x")


def test_mixed_patterns_of_a_family_that_was_registered(chain):
    rules = conversion.mixed(
        chain, "6:8", [rows(1), rows(2)], loss=lambda y, batch: jnp.sum(y**2) / 2
    )
    assert [path for path, _ in rules] == [f"{name}/kernel" for name in chain.layers]


def test_a_method_of_ones_own(chain):
    """It sees each kernel with its rule, and what it makes of it is packed."""
    seen = []

    def keep_the_first(rule, kernel, target, gram, damping):
        seen.append((str(rule), kernel.shape, gram.shape))
        mask = jnp.arange(len(kernel))[:, None] % rule.pattern.group < rule.pattern.kept
        mask = jnp.broadcast_to(mask, kernel.shape)
        return Pruned(mask, jnp.where(mask, kernel, 0))

    method = dataclasses.replace(SPARSEGPT, name="first", solve=keep_the_first)
    packed = conversion.convert(chain, sj.Rule("4:6", None), [rows(1)], method=method)
    assert seen == [
        ("4:6 unquantised", layer["kernel"].shape, (layer["kernel"].shape[0],) * 2)
        for layer in chain.layers.values()
    ]
    for name, layer in packed.layers.items():
        kernel = np.array(chain.layers[name]["kernel"])
        kernel[np.arange(len(kernel)) % 6 >= 4] = 0
        np.testing.assert_array_equal(sj.unpack(layer["kernel"]), kernel)

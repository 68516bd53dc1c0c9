"""Pruning in the order of the program: what each layer is fitted to, against least squares."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.prune.model.ahead import CompileAhead
from slidejax.prune.model.result import Pruned
from slidejax.prune.model.sequential import InOrder
from slidejax.prune.model.stages import Stages

BATCHES = jax.random.normal(jax.random.key(0), (3, 40, 8))


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(8, use_bias=False, name="first")(x))
        return nn.Dense(6, use_bias=False, name="last")(x)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("first", "last"):
            x = x + nn.Dense(8, use_bias=False, name=name)(jnp.tanh(x))
        return x


class Sisters(nn.Module):
    @nn.compact
    def __call__(self, x):
        parts = [nn.Dense(n, use_bias=False, name=f"to{n}")(x) for n in (4, 6)]
        return nn.Dense(5, use_bias=False, name="last")(jnp.concatenate(parts, -1))


def keep_half(kernel, target, gram, damping):
    """Loses half of the inputs."""
    mask = jnp.broadcast_to(jnp.arange(len(kernel))[:, None] % 2 == 0, kernel.shape)
    return Pruned(mask, jnp.where(mask, target, 0))


def keep_all(kernel, target, gram, damping):
    """Keeps what the layer is asked to compute."""
    return Pruned(jnp.ones(kernel.shape, bool), target)


def pruned(model, solver, correct, progress=None):
    """The original kernels and the new ones by path."""
    params = model.init(jax.random.key(1), BATCHES[0])
    paths = [f"{name}/kernel" for name in params["params"]]
    run = sj.linen.functional(model, {}).run
    stages = Stages(run, params, BATCHES[0], dict.fromkeys(paths))
    with CompileAhead() as ahead:
        prune = InOrder(stages, solver, correct=correct, damping=0.0, ahead=ahead)
        prune.begin(params)
        found = prune(params, list(BATCHES), progress)
    old = {f"{name}/kernel": leaf["kernel"] for name, leaf in params["params"].items()}
    return old, {path: result.kernel for path, result in found.items()}


def solver(path):
    return keep_half if path.startswith("first") else keep_all


def fitted(z, wanted):
    return np.linalg.lstsq(np.asarray(z, np.float64), np.asarray(wanted, np.float64), rcond=None)[0]


@pytest.mark.parametrize("correct", [0.0, 0.5, 1.0])
def test_a_layer_makes_up_for_what_its_input_lost(correct):
    old, new = pruned(Chain(), solver, correct)
    rows = BATCHES.reshape(-1, 8)
    x, z = (jnp.tanh(rows @ kernels["first/kernel"]) for kernels in (old, new))
    full = fitted(z, x @ old["last/kernel"])
    want = old["last/kernel"] + correct * (full - old["last/kernel"])
    np.testing.assert_allclose(new["last/kernel"], want, rtol=1e-3, atol=1e-3)
    assert correct == 0 or np.abs(new["last/kernel"] - old["last/kernel"]).max() > 0.05


def test_a_layer_makes_up_for_what_its_stream_lost():
    old, new = pruned(Residual(), solver, 1.0)
    rows = BATCHES.reshape(-1, 8)
    r, s = (rows + jnp.tanh(rows) @ kernels["first/kernel"] for kernels in (old, new))
    x, z = jnp.tanh(r), jnp.tanh(s)
    want = fitted(z, r + x @ old["last/kernel"] - s)
    np.testing.assert_allclose(new["last/kernel"], want, rtol=1e-3, atol=1e-3)
    without = fitted(z, x @ old["last/kernel"])
    assert np.abs(without - want).max() > 0.05


def test_layers_with_one_input_and_one_method_are_one_kernel():
    shapes = []

    def note(kernel, target, gram, damping):
        shapes.append(kernel.shape)
        return keep_all(kernel, target, gram, damping)

    told = []
    old, new = pruned(Sisters(), lambda path: note, 0.0, lambda *counts: told.append(counts))
    assert set(shapes) == {(8, 10), (10, 5)} and told == [(1, 2), (2, 2)]
    jax.tree.map(np.testing.assert_array_equal, new, old)

"""Layers whose kernels are held together run as one product."""

import gc

import flax.linen as nn
import jax
import numpy as np
import pytest
from fused_models import Attention, Block, converted, products

import slidejax as sj
from slidejax.linen.fused import FusedProduct


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(7), (2, 3, 64))


@pytest.mark.parametrize(("bias", "jit"), [(False, True), (True, False)])
def test_the_results_are_those_of_the_layers(x, bias, jit):
    model = Block(bias)
    variables = converted(model, x)
    fused = sj.linen.fuse_projections(variables)
    run = lambda v, x: sj.linen.apply(model, v, x)  # noqa: E731
    assert products(run, variables, x) == [24, 48, 16, 40, 40, 64]
    assert products(run, fused, x) == [88, 80, 64]
    run = jax.jit(run) if jit else run
    np.testing.assert_array_equal(run(fused, x), run(variables, x))


def test_a_layer_with_another_input_computes_for_itself(x):
    model = Block(late=True)
    variables = converted(model, x)
    fused = sj.linen.fuse_projections(variables)
    np.testing.assert_array_equal(
        sj.linen.apply(model, fused, x), sj.linen.apply(model, variables, x)
    )
    # One for v, one for q, which reads x, and one for k.
    assert products(lambda v, x: sj.linen.apply(model, v, x), fused, x).count(88) == 3


def test_calls_do_not_see_each_others_products(x):
    model = Block()
    variables = converted(model, x)
    fused, other = (
        sj.linen.fuse_projections(variables),
        sj.linen.fuse_projections(converted(model, x, seed=5)),
    )
    for params in (fused, other, fused):
        np.testing.assert_array_equal(
            sj.linen.apply(model, params, x),
            sj.linen.apply(model, sj.linen.unfuse_projections(params), x),
        )
    gc.collect()
    kept = [held for held in gc.get_objects() if isinstance(held, FusedProduct)]
    assert not kept  # and nothing is kept alive


def test_under_vmap_grad_and_remat(x):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(Attention)(name="attention")(x)

    model = Step()
    variables = converted(model, x)
    fused = sj.linen.fuse_projections(variables)
    run = lambda v, x: sj.linen.apply(model, v, x)  # noqa: E731
    np.testing.assert_array_equal(
        jax.vmap(run, (None, 0))(fused, x), jax.vmap(run, (None, 0))(variables, x)
    )
    slope = lambda v: jax.grad(lambda x: run(v, x).sum())(x)  # noqa: E731
    np.testing.assert_allclose(slope(fused), slope(variables), rtol=1e-3, atol=1e-4)

"""The parts that implementations share: forms, the layer out of lift and product, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_problem import close

import slidejax as sj
from slidejax.bench.contenders import problem_of
from slidejax.ops.implementations.base import Form, Implementation, cuda_refusal, nothing_to_skip
from slidejax.ops.implementations.reference import REFERENCE


class Product(Implementation):
    """An implementation with nothing but a product."""

    name = "product"

    def refuses(self, problem):
        return None

    def matmul(self, lifted, scale_x, w, bias, out_dtype, platform="default"):
        return REFERENCE.matmul(lifted, scale_x, w, bias, out_dtype, platform)


class Layer(Implementation):
    """An implementation that computes whole layers alone."""

    name = "layer"

    def refuses(self, problem):
        return None


def weight(pattern="6:8", batch=()):
    kernel = jax.random.normal(jax.random.key(0), (*batch, 40, 6))
    return sj.pack(kernel, pattern, dtype="int8")


def test_a_form_of_a_batch_is_that_of_each_weight():
    form = Form("sums", lambda w: w.values.astype(jnp.int32).sum((1, 2)))
    w = weight(batch=(2, 3))
    got = form.of(w)
    assert got.shape == (2, 3, 6)
    for i in range(2):
        for j in range(3):
            one = jax.tree.map(lambda leaf, at=(i, j): leaf[at], w)
            np.testing.assert_array_equal(got[i, j], form.of(one))


@pytest.mark.parametrize("prologue", [None, sj.RMSNorm(jnp.linspace(0.5, 2, 40))])
@pytest.mark.parametrize("pattern", ["6:8", "dense"])
def test_a_layer_is_the_lift_and_the_product(pattern, prologue):
    w, x = weight(pattern), jax.random.normal(jax.random.key(1), (3, 40))
    bias = jnp.arange(6.0)
    got = Product().linear(x, prologue, w, bias, jnp.float32)
    want = sj.linear(x, w, bias, implementation="reference", prologue=prologue)
    close(got, want, 1e-6)  # a compiled program may contract a product and a sum


def test_a_product_may_be_left_out():
    w = weight()
    lifted, scale = sj.lift_quantize(jnp.ones((2, 40)), "6:8")
    with pytest.raises(NotImplementedError, match="'layer' has no sparse_matmul"):
        Layer().matmul(lifted, scale, w, None, jnp.float32)


def test_there_is_nothing_to_say_by_default():
    w, layer = weight(), Layer()
    assert layer.available() is None and layer.facts() == {} and layer.form is None
    assert layer.settings(w, 4) is None and layer.search(w, 4) is None


def test_reasons_to_refuse():
    assert nothing_to_skip(problem_of(weight(), 4)) is None
    assert "dense prunes nothing" in nothing_to_skip(problem_of(weight("dense"), 4))
    if jax.default_backend() == "cpu":
        assert cuda_refusal(problem_of(weight(), 4)) == "runs on CUDA only"

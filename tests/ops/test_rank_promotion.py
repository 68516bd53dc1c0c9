"""Everything works where users forbid JAX to add axes (`jax_numpy_rank_promotion="raise"`)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slidejax as sj
from slidejax.lm.decoder.examples import tiny

KERNEL = jax.random.normal(jax.random.key(0), (64, 24))
X = jax.random.normal(jax.random.key(1), (2, 4, 64))
BIAS, ONES = jnp.arange(24.0), jnp.ones(64)


@pytest.fixture(autouse=True)
def _forbidden():
    with jax.numpy_rank_promotion("raise"):
        with pytest.raises(ValueError, match="rank_promotion"):
            X + BIAS[:1]
        yield


@pytest.mark.parametrize("qdtype", ["int8", None])
@pytest.mark.parametrize("pattern", ["6:8", "dense"])
@pytest.mark.parametrize("implementation", ["reference", "dense"])
def test_layers(qdtype, pattern, implementation):
    w = sj.pack(KERNEL, pattern, dtype=qdtype)
    linear = functools.partial(sj.linear, implementation=implementation)
    want = X.reshape(8, 64) @ sj.unpack(w) + BIAS[None]
    y = linear(X, w, BIAS, residual=jnp.zeros((2, 4, 24)))
    np.testing.assert_allclose(y.reshape(8, 24), want, atol=0.1 * float(jnp.abs(want).max()))
    for prologue in (sj.RMSNorm(ONES), sj.LayerNorm(ONES, ONES), sj.GLU(X, "silu")):
        assert linear(X, w, BIAS, prologue=prologue).shape == (2, 4, 24)
    assert jax.vmap(lambda x: linear(x, w, BIAS))(X).shape == (2, 4, 24)
    assert jax.grad(lambda x: linear(x, w, BIAS).sum())(X).shape == X.shape


def test_masters_and_adapters():
    packed = {"kernel": sj.pack(KERNEL, "6:8")}
    masters = sj.trainable.masters({"kernel": sj.pack(KERNEL, "6:8", dtype=None)}, qdtype="int8")
    train, rest = sj.partition(masters)

    def loss(train):
        return sj.linear(X, sj.combine(train, rest)["kernel"], BIAS).sum()

    assert jnp.isfinite(jax.grad(loss)(train)["kernel"].values).all()
    sj.trainable.deploy(masters)
    adapted = sj.adapters.add(packed, rank=4)
    assert sj.linear(X, adapted["kernel"]).shape == (2, 4, 24)
    sj.adapters.merge(adapted)
    assert sj.linear(X, sj.prepare(packed["kernel"])).shape == (2, 4, 24)


@pytest.mark.parametrize("layer", ["linen", "nnx"])
def test_layers_of_flax(layer):
    if layer == "linen":
        y, _ = sj.linen.SlideDense(24).init_with_output(jax.random.key(0), X)
    else:
        y = sj.nnx.SlideLinear(64, 24, rngs=nnx.Rngs(0))(X)
    assert y.shape == (2, 4, 24)


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate, up = (nn.Dense(24, use_bias=False, name=name)(x) for name in ("gate", "up"))
        return nn.Dense(8, use_bias=False, name="down")(nn.silu(gate) * up)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_pruning(method):
    rows = X.reshape(8, 64)
    variables = Gated().init(jax.random.key(0), rows)
    sparse = sj.prune.convert(Gated(), "6:8", [rows], params=variables, method=method)
    assert sj.linen.apply(Gated(), sparse, rows).shape == (8, 8)


def test_a_decoder_generates():
    model = sj.lm.convert(tiny(), "6:8")
    ids = np.arange(10).reshape(2, 5)
    assert len(model.generate(ids, max_new_tokens=3)) == 2

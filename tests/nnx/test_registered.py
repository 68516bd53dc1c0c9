"""Linear layers that are not Flax's: registered ones convert, all others are named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slidejax as sj


class Projection(nnx.Module):
    """A layer of another library: its kernel is [heads, in, width]."""

    def __init__(self, heads, inputs, width, rngs):
        shape = (heads, inputs, width)
        self.weight = nnx.Param(jax.random.normal(rngs.params(), shape) / inputs**0.5)

    def __call__(self, x):
        return jnp.einsum("...d,hdk->...hk", x, self.weight.get_value())


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(32, 64, rngs=rngs)
        self.query = Projection(4, 64, 16, rngs)
        self.router = nnx.Linear(64, 4, rngs=rngs)
        self.experts = nnx.Param(jax.random.normal(rngs.params(), (4, 64, 8)))
        self.lm_head = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, ids):
        x = self.query(self.embedding(ids))
        x = x.reshape(*ids.shape, 64)
        weights = jax.nn.softmax(self.router(x))
        y = jnp.einsum("bse,bsd,edf->bsf", weights, x, self.experts.get_value())
        return self.lm_head(x) + y.sum(-1, keepdims=True)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    sj.nnx.register(Projection, "weight", "...d,hdk->...hk")


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


IDS = np.arange(64).reshape(4, 16) % 32


def test_a_registered_layer_computes_what_its_packed_kernel_says(model):
    report = sj.Report()
    rules = [("query", sj.Rule("6:8", None)), (".*", None)]
    sparse = sj.nnx.convert(model, rules, report=report)
    assert [layer.path for layer in report.converted] == ["query/weight"]
    assert report.converted[0].shape == (64, 64)
    layer = Projection(4, 64, 16, nnx.Rngs(1))
    kernel = sj.unpack(sparse.query.kernel).reshape(64, 4, 16).transpose(1, 0, 2)
    layer.weight.set_value(kernel)
    x = jax.random.normal(jax.random.key(0), (2, 3, 64))
    np.testing.assert_allclose(sparse.query(x), layer(x), rtol=1e-5, atol=1e-5)
    assert isinstance(sparse.query, Projection)
    trained = sj.nnx.map_weights(sparse, functools.partial(sj.trainable.masters, qdtype="int8"))
    assert trained(IDS).shape == (4, 16, 32)


def test_a_pattern_alone_leaves_heads_and_routers_and_names_the_rest(model):
    report = sj.Report()
    sj.nnx.convert(model, "6:8", report=report)
    assert [layer.path for layer in report.converted] == ["query/weight"]
    assert "router" in report.skipped["router/kernel"]
    assert "embedding" in report.skipped["lm_head/kernel"]
    assert set(report.unpacked) == {"embedding/embedding", "experts"}
    assert "4x64x8 of Model" in report.unpacked["experts"]
    assert "not packed: experts: 4x64x8" in str(report)
    report = sj.Report()
    sj.nnx.convert(model, [(".*", "6:8")], report=report)
    assert len(report.converted) == 3 and not report.skipped


def test_a_registered_layer_is_calibrated(model):
    report = sj.Report()
    sparse = sj.prune.convert(model, sj.Rule("6:8", None), [IDS], report=report)
    plain = sj.nnx.convert(model, sj.Rule("6:8", None))
    want = model(IDS)
    assert [layer.path for layer in report.converted] == ["query/weight"]
    assert jnp.abs(sparse(IDS) - want).mean() < jnp.abs(plain(IDS) - want).mean()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((int, "w", "bd,df->bf"), TypeError, "subclass of flax.nnx.Module"),
        ((Model, 3, "bd,df->bf"), TypeError, "name of an attribute"),
        ((Model, "w", "bd->b"), ValueError, "bd->b"),
        ((Model, "w", 3), TypeError, "einsum or a function"),
    ],
)
def test_what_cannot_be_registered(arguments, error, message):
    with pytest.raises(error, match=message):
        sj.nnx.register(*arguments)

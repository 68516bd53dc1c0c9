"""Weights whose leaves are boxed with axis names are refused by name, and work once unboxed.

So are NNX models, whose layers hold the leaves one by one.
"""

import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import slidejax as sj
from slidejax.variants import projections


class Gate(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        layers = (nn.Dense(32, kernel_init=init, name=name) for name in ("gate_proj", "up_proj"))
        return [layer(x) for layer in layers]


@pytest.fixture(scope="module")
def params():
    x = jnp.ones((2, 64))
    variables = Gate().init(jax.random.key(0), x)
    return sj.linen.convert(variables, "6:8", Gate(), x)["params"]


@pytest.mark.parametrize(
    "use",
    [
        sj.prepare,
        sj.trainable.masters,
        sj.adapters.add,
        projections.fuse,
        lambda tree: sj.checkpoint.save("never-written", tree),
        sj.partition,
    ],
    ids=["prepare", "masters", "adapters", "fuse", "save", "partition"],
)
def test_boxed_weights_are_refused_by_name(params, use):
    with pytest.raises(TypeError, match=r"gate_proj/kernel\.values .*flax\.linen\.meta\.unbox"):
        use(params)


def test_unboxed_weights_work(params, tmp_path):
    unboxed = nn.meta.unbox(params)
    fused = projections.fuse(sj.trainable.deploy(sj.trainable.masters(unboxed)))
    assert fused["gate_proj"]["kernel"].layers == ("gate_proj", "up_proj")
    sj.checkpoint.save(tmp_path / "model", unboxed)
    loaded = sj.checkpoint.load(tmp_path / "model")
    assert jax.tree.structure(loaded) == jax.tree.structure(unboxed)


def test_a_boxed_weight_has_specs(params):
    spec = params["gate_proj"]["kernel"].partition_spec(out="t")
    assert spec.values == P("t", None, None) and spec.prepared == {}


def test_calibrated_conversion_keeps_the_names():
    x = jax.random.normal(jax.random.key(1), (16, 64))
    variables = Gate().init(jax.random.key(0), x)
    packed = sj.prune.convert(Gate(), "6:8", [x], params=variables)
    boxed = packed["params"]["up_proj"]["kernel"].values
    assert boxed.names == ("mlp", "embed", None)
    plain = sj.prune.convert(Gate(), "6:8", [x], params=nn.meta.unbox(variables))
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(plain), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize(
    "name",
    [
        "prepare",
        "drop_prepared",
        "partition",
        "trainable.masters",
        "trainable.deploy",
        "adapters.add",
        "adapters.merge",
    ],
)
@pytest.mark.parametrize("tree_of", [lambda layer: layer, nnx.state], ids=["model", "state"])
def test_an_nnx_model_is_no_tree_of_weights(name, tree_of):
    layer = sj.nnx.SlideLinear(16, 8, pattern="6:8", qdtype="int8", rngs=nnx.Rngs(0))
    instead = (
        "wrt=nnx.Param" if name == "partition" else rf"nnx\.map_weights\(model, slidejax\.{name}"
    )
    with pytest.raises(TypeError, match=f"{name} finds no packed weights in an NNX .*{instead}"):
        operator.attrgetter(name)(sj)(tree_of(layer))


def test_a_dense_nnx_model_is_a_tree():
    state = nnx.state(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    train, rest = sj.partition(sj.prepare(state))
    assert (len(jax.tree.leaves(train)), len(jax.tree.leaves(rest))) == (2, 0)

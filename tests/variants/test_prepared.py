import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from toy_implementation import Toy

import slidejax as sj
from slidejax.ops import registry
from slidejax.ops.cuda import library

on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU serves")


def weight(dtype="int8", shape=(50, 6), pattern="6:8"):
    return sj.pack(
        jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32),
        pattern,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bfloat16", "float32"])
def test_dense_form_changes_nothing_but_time(dtype):
    w = weight(dtype)
    prepared = sj.prepare(w, "dense")
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 50)), jnp.float32)
    np.testing.assert_array_equal(
        sj.linear(x, prepared, implementation="dense"), sj.linear(x, w, implementation="dense")
    )
    lifted = sj.lift_quantize(x, "6:8", dtype)
    np.testing.assert_array_equal(
        sj.sparse_matmul(*lifted, prepared, implementation="dense"),
        sj.sparse_matmul(*lifted, w, implementation="dense"),
    )
    assert prepared.nbytes == w.nbytes + prepared.prepared["dense"].nbytes
    jax.tree.map(np.testing.assert_array_equal, sj.drop_prepared(prepared), w)


def test_trees_batches_and_other_leaves():
    tree = {"a": weight(), "b": jnp.ones(3), "c": [weight(shape=(2, 50, 6))]}
    prepared = sj.prepare(tree, "dense")
    assert prepared["b"] is tree["b"] and prepared["c"][0].prepared["dense"].shape == (2, 6, 50)
    x = jnp.ones((3, 50))
    y = jax.lax.scan(lambda c, w: (c, sj.linear(x, w)), 0, prepared["c"][0])[1]
    z = jax.lax.scan(lambda c, w: (c, sj.linear(x, w)), 0, tree["c"][0])[1]
    np.testing.assert_array_equal(y, z)
    again = sj.prepare(prepared, "dense")
    assert jax.tree.structure(again) == jax.tree.structure(prepared)


def test_bad_names():
    with pytest.raises(ValueError, match="implementation"):
        sj.prepare(weight(), "magic")
    with pytest.raises(ValueError, match="no prepared form"):
        sj.prepare(weight(), "reference")
    own = weight(shape=(128, 4)).replace(prepared={"hopper": jnp.zeros(8, jnp.uint8)})
    with pytest.raises(ValueError, match="axes of their own: drop them"):
        own.partition_spec(out="o")
    assert own.partition_spec().prepared == {"hopper": P()}


def test_the_pattern_dense_needs_no_prepared_form():
    tree = {"dense": weight(pattern="dense"), "sparse": weight()}
    for name in (None, "dense"):
        prepared = sj.prepare(tree, name)
        assert prepared["dense"] is tree["dense"] and prepared["sparse"].prepared


@on_a_cpu
def test_default_on_a_cpu_is_dense():
    assert set(sj.prepare(weight()).prepared) == {"dense"}


def test_prepare_searches_on_a_gpu_and_outside_a_trace(monkeypatch):
    searched = []

    class Searching(Toy):
        def search_missing(self, w):
            searched.append(w.shape)

    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", list(registry._IMPLEMENTATIONS))
    registry.register(Searching())
    tree = {"a": weight(), "b": weight(pattern="dense"), "c": weight(shape=(2, 50, 6))}
    sj.prepare(tree, "toy")
    assert searched == []  # there is no GPU
    monkeypatch.setattr(library, "on_gpu", lambda: True)
    jax.jit(lambda tree: sj.prepare(tree, "toy"))(tree)
    sj.prepare(tree, "toy", tune=False)
    assert searched == []
    prepared = sj.prepare(tree, "toy")
    assert searched == [(50, 6), (2, 50, 6)]
    # Whether all is known already is for the implementation to say.
    sj.prepare(prepared, "toy")
    assert len(searched) == 4


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_weights_of_numpy_arrays_are_weights(dtype):
    """As pickles and readers of users give them."""
    w = sj.pack(jax.random.normal(jax.random.key(0), (64, 16)), "6:8", dtype=dtype)
    x, host = jnp.ones((2, 64)), jax.tree.map(np.asarray, w)
    for fn in (sj.linear, jax.jit(sj.linear), lambda x, w: sj.linear(x, sj.prepare(w, "dense"))):
        np.testing.assert_array_equal(fn(x, host), fn(x, w))
    np.testing.assert_array_equal(sj.unpack(host), sj.unpack(w))
    np.testing.assert_array_equal(sj.linear_chain(x, [sj.Stage(host)])[0], sj.linear(x, w))
    assert sj.linear(x, sj.adapters.add({"a": host}, rank=2)["a"]).shape == (2, 16)
    assert sj.linear(x, sj.trainable.masters({"a": host}, "int8")["a"]).shape == (2, 16)

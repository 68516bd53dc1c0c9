import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
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


# --- forms of other values ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_replaced_values_do_not_keep_the_forms_of_the_old_ones(dtype):
    w, other = sj.prepare(weight(dtype), "dense"), weight(dtype, pattern="4:6")
    x = jnp.ones((2, 50))
    for changes in (
        {"values": -w.values},
        {"zeros": jnp.zeros_like(w.zeros) + 0x76},
        {"values": other.values, "zeros": other.zeros, "pattern": other.pattern},
    ):
        for changed in (dataclasses.replace(w, **changes), w.replace(**changes)):
            assert not changed.prepared
            np.testing.assert_array_equal(sj.linear(x, changed), sj.linear(x, changed.packed))
    for same in (
        dataclasses.replace(w, scale=2 * w.scale),
        dataclasses.replace(w),
        jax.tree.map(lambda leaf: leaf, w),
        copy.deepcopy(w),
        pickle.loads(pickle.dumps(w)),
    ):
        assert list(same.prepared) == ["dense"]
        assert not dataclasses.replace(same, values=-w.values).prepared
    # Forms that are given are taken: the weight may lie elsewhere now.
    forms = sj.prepare(w.replace(values=-w.values), "dense").prepared
    for changed in (
        w.replace(values=-w.values, prepared=forms),
        dataclasses.replace(w, values=-w.values, prepared=forms),
        w.replace(values=-w.values, prepared=w.prepared),
    ):
        assert list(changed.prepared) == ["dense"]


def test_a_weight_of_anything_is_a_weight():
    """JAX puts tracers, shapes and objects of its own in the place of leaves."""
    w = sj.prepare(weight("float32"), "dense")
    leaves, tree = jax.tree.flatten(w)
    for leaf in (None, object(), jax.ShapeDtypeStruct((), "int8"), 3, P("a")):
        placeholder = jax.tree.unflatten(tree, [leaf] * len(leaves))
        assert list(placeholder.prepared) == ["dense"]
    changed = jax.jit(lambda w: dataclasses.replace(w, values=2 * w.values))(w)
    assert not changed.prepared
    assert jax.jit(lambda w: w)(w).prepared and jax.eval_shape(lambda w: w, w).prepared


def products(w):
    x = jnp.ones((3, 50))
    yield lambda v: sj.linear(x, w.replace(values=v, prepared=w.prepared))
    yield lambda v: sj.sparse_matmul(
        *sj.lift_quantize(x, "6:8", "float32"), w.replace(values=v, prepared=w.prepared)
    )
    yield lambda v: sj.linear_chain(x, [sj.Stage(w.replace(values=v, prepared=w.prepared))])[0]


def test_values_beside_forms_refuse_to_be_trained():
    """A step would change the values, and products would go on reading the forms."""
    w = sj.prepare(weight("float32"), "dense")
    for product in products(w):
        for wrap in (lambda f: f, jax.jit, jax.checkpoint):
            loss = wrap(lambda v, product=product: (product(v) ** 2).sum())
            with pytest.raises(ValueError, match="drop_prepared"):
                jax.grad(loss)(w.values)
    # What is frozen has forms as it likes.
    x, bias = jnp.ones((3, 50)), jnp.ones(6)
    for run in (
        lambda x, bias, w: sj.linear(x, w, bias),
        lambda x, bias, w: sj.linear_chain(x, [sj.Stage(w, bias)])[0],
    ):
        loss = jax.jit(lambda x, bias, w, run=run: (run(x, bias, w) ** 2).sum())
        got = jax.grad(loss, (0, 1))(x, bias, w)
        want = jax.grad(loss, (0, 1))(x, bias, sj.drop_prepared(w))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_layers_of_nnx_refuse_it_too():
    layer = sj.nnx.SlideLinear(50, 6, pattern="6:8", qdtype=None, rngs=nnx.Rngs(0))
    prepared = sj.nnx.map_weights(layer, sj.prepare)
    assert prepared.kernel.prepared

    def loss(model):
        return (model(jnp.ones((3, 50))) ** 2).sum()

    with pytest.raises(ValueError, match=r"slidejax.nnx.map_weights\(model"):
        nnx.grad(loss)(prepared)
    trained = sj.nnx.map_weights(prepared, sj.drop_prepared)
    assert jnp.abs(nnx.grad(loss)(trained)["values"].get_value()).max() > 0


def test_partition_drops_the_forms_of_what_is_trained():
    params = {"float": weight("float32"), "int8": weight()}
    prepared = sj.prepare(params, "dense")
    x = jnp.ones((3, 50))
    train, rest = sj.partition(prepared, ".*values")
    assert len(jax.tree.leaves(train)) == 1
    together = sj.combine(train, rest)
    assert list(together["int8"].prepared) == ["dense"] and not together["float"].prepared

    def loss(train):
        w = sj.combine(train, rest)
        return (sj.linear(x, w["float"]) ** 2).sum() + sj.linear(x, w["int8"]).sum()

    before = sj.linear(x, together["float"])
    train = jax.tree.map(lambda value, step: value - 1e-3 * step, train, jax.grad(loss)(train))
    after = sj.linear(x, sj.combine(train, rest)["float"])
    assert (after**2).sum() < (before**2).sum()
    # Nothing of a prepared tree is lost where other leaves are trained.
    layer = {"kernel": prepared["float"], "bias": jnp.ones(6)}
    train, rest = sj.partition(layer, "bias")
    assert jax.tree.structure(sj.combine(train, rest)) == jax.tree.structure(layer)

"""Weights go through `flax.serialization` and `jax.export`."""

import functools
import importlib.util

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import slidejax as sj
from slidejax.variants import projections
from slidejax.variants.serving import serving

KERNEL = jax.random.normal(jax.random.key(0), (64, 16))
WEIGHTS = {
    "int8": sj.pack(KERNEL, "6:8", dtype="int8"),
    "float": sj.pack(KERNEL, "6:8"),
    "dense": sj.pack(KERNEL, "dense", dtype="int8"),
}
WEIGHTS |= {
    "master": sj.trainable.masters(WEIGHTS["int8"]),
    "adapted": sj.adapters.add(WEIGHTS["int8"], rank=2),
    "serving": serving(WEIGHTS["int8"]),
}
FUSED = projections.fuse({n: {"kernel": WEIGHTS["int8"]} for n in ("gate_proj", "up_proj")})


@pytest.mark.parametrize("tree", [*WEIGHTS.values(), FUSED], ids=[*WEIGHTS, "fused"])
def test_flax_serialization_gives_the_same_tree(tree):
    data = flax.serialization.to_bytes({"layer": tree})
    empty = jax.tree.map(jnp.zeros_like, {"layer": tree})
    again = flax.serialization.from_bytes(empty, data)
    assert jax.tree.structure(again) == jax.tree.structure({"layer": tree})
    jax.tree.map(np.testing.assert_array_equal, again, {"layer": tree})


def test_an_optimiser_state_too():
    optax = pytest.importorskip("optax")
    for w in (WEIGHTS["float"], WEIGHTS["int8"]):
        train, _ = sj.partition({"kernel": w, "bias": jnp.ones(16)})
        state = optax.adam(1e-3).init(train)
        again = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
        assert jax.tree.structure(again) == jax.tree.structure(state)


def test_a_state_of_another_weight_is_refused_and_forms_are_dropped():
    state = flax.serialization.to_state_dict(WEIGHTS["int8"])
    other = sj.pack(KERNEL, "2:4", dtype="int8")
    with pytest.raises(ValueError, match=r"6:8.*2:4"):
        flax.serialization.from_state_dict(other, state)
    with pytest.raises(ValueError, match=r"SlideWeight has .*values"):
        flax.serialization.from_state_dict(WEIGHTS["int8"], {"values": state["values"]})
    prepared = sj.prepare(WEIGHTS["int8"], "dense")
    assert flax.serialization.from_state_dict(prepared, state).prepared == {}


needs_flatbuffers = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None, reason="jax.export serialises with flatbuffers"
)


@needs_flatbuffers
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_an_exported_program_keeps_its_weight(name):
    w, x = WEIGHTS[name], jax.random.normal(jax.random.key(1), (4, 64))
    made = export.export(jax.jit(lambda x, w: sj.linear(x, w)))(x, w)
    again = export.deserialize(made.serialize())
    assert again.in_tree == made.in_tree
    np.testing.assert_array_equal(again.call(x, w), jax.jit(lambda x, w: sj.linear(x, w))(x, w))


@needs_flatbuffers
@pytest.mark.skipif(len(jax.devices("cpu")) < 4, reason="needs 4 CPU devices")
def test_a_program_over_several_devices_is_exported_from_shard_map():
    mesh = jax.make_mesh((2, 2), ("d", "t"), devices=jax.devices("cpu")[:4])
    x, w = (
        jax.random.normal(jax.random.key(0), (8, 256)),
        sj.pack(jnp.ones((256, 8)), "6:8", "int8"),
    )
    specs = P("d", "t"), w.partition_spec(k="t")
    body = jax.shard_map(
        lambda x, w: sj.linear(x, w, reduce_axis="t"), mesh=mesh, in_specs=specs, out_specs=P("d")
    )
    place = functools.partial(jax.tree.map, functools.partial(NamedSharding, mesh))
    args = jax.device_put((x, w), place(specs))
    data = export.export(jax.jit(body))(*args).serialize()
    y = jax.jit(export.deserialize(data).call)(*args)
    np.testing.assert_array_equal(y, sj.linear(x, w))


def test_a_prepared_weight_is_exported_too():
    w, x = sj.prepare(WEIGHTS["int8"], "dense"), jnp.ones((4, 64))
    made = export.export(jax.jit(lambda x, w: sj.linear(x, w)))(x, w)
    assert export.deserialize(made.serialize()).in_tree == made.in_tree


@needs_flatbuffers
@pytest.mark.parametrize("name", ["int8", "float"])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_any_batch_can_be_exported(name, platform):
    w = WEIGHTS[name]
    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 8, 64), jnp.float32)
    made = export.export(jax.jit(lambda x, w: sj.linear(x, w)), platforms=[platform])(x, w)
    again = export.deserialize(made.serialize())
    if platform == "cpu":
        for rows in (1, 5):
            here = jax.random.normal(jax.random.key(rows), (rows, 8, 64))
            np.testing.assert_allclose(again.call(here, w), sj.linear(here, w), rtol=1e-5)
    found = sj.explain(lambda x: sj.linear(x, w), jnp.ones((8, 64)), platform=platform)
    assert isinstance(found[0][0].rows, int)
    with pytest.raises(NotImplementedError, match="known number of rows"):
        export.export(
            jax.jit(lambda x, w: sj.linear(x, w, implementation="hopper")), platforms=["cuda"]
        )(x, w)


def test_settings_of_jax_that_change_dtypes():
    x = jax.random.normal(jax.random.key(1), (4, 64))
    want = sj.linear(x, WEIGHTS["int8"], implementation="reference")
    with jax.numpy_dtype_promotion("strict"):
        for implementation in ("reference", "dense"):
            w = sj.pack(KERNEL, "6:8", dtype="int8")
            y = jax.jit(lambda x, w, i=implementation: sj.linear(x, w, implementation=i))(x, w)
            np.testing.assert_allclose(y, want, rtol=1e-6)
    with jax.enable_x64(True):
        mask, new = sj.prune.sparsegpt(KERNEL, "6:8", x.T @ x)
        assert mask.dtype == bool and new.dtype == jnp.float32


@pytest.mark.parametrize(
    "prologue",
    [
        sj.RMSNorm(jnp.ones(64), np.float32(1e-6)),
        sj.LayerNorm(jnp.ones(64), jnp.zeros(64)),
        sj.LayerNorm(jnp.ones(64)),
        sj.Activation("relu"),
        sj.GLU(jnp.ones((3, 64)), "gelu"),
    ],
    ids=lambda prologue: type(prologue).__name__,
)
def test_a_prologue_may_be_an_argument_of_an_exported_program(prologue):
    def run(x, w, prologue):
        return sj.linear(x, w, prologue=prologue), prologue

    arguments = jnp.linspace(-1, 1, 192).reshape(3, 64), WEIGHTS["int8"], prologue
    read = export.deserialize(export.export(jax.jit(run))(*arguments).serialize())
    y, same = read.call(*arguments)
    np.testing.assert_array_equal(y, jax.jit(run)(*arguments)[0])
    assert jax.tree.structure(same) == jax.tree.structure(prologue)


def test_what_decode_attention_returns_is_exported():
    q, cache, turns = jnp.ones((1, 2, 8)), jnp.zeros((1, 2, 4, 8)), jnp.ones((1, 4))
    arguments = q, q, q, cache, cache, jnp.zeros(1, int), (turns, turns)
    exported = export.export(jax.jit(sj.decode_attention))(*arguments)
    again = export.deserialize(exported.serialize()).call(*arguments)
    assert isinstance(again, type(sj.decode_attention(*arguments)))


@needs_flatbuffers
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", ["a, 64", "a, b, 64", "a, 3, 64"])
def test_rows_may_be_left_open_everywhere(shape, platform):
    """Code that asks whether rows are few must not ask it of an unknown number."""
    float_weight, w, norm = WEIGHTS["float"], WEIGHTS["int8"], sj.RMSNorm(jnp.ones(64))
    x = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
    y = jax.ShapeDtypeStruct((*x.shape[:-1], 16), jnp.float32)
    here = jax.random.normal(jax.random.key(0), (2, 3, 64)[-len(x.shape) :])
    for fn, more in (
        (lambda x: sj.linear(x, w), ()),
        (lambda x: sj.linear(x, w, jnp.ones(16), prologue=norm), ()),
        (lambda x, y: sj.linear(x, w, residual=y), (y,)),
        (lambda x: sj.lift_quantize(x, "6:8"), ()),
        (lambda x: sj.linear(x, WEIGHTS["dense"]), ()),
        (jax.vmap(lambda x: sj.linear(x, w)), ()),
        (jax.grad(lambda x: sj.linear(x, float_weight).sum()), ()),
    ):
        made = export.export(jax.jit(fn), platforms=[platform])(x, *more)
        if platform == "cpu":
            given = (here, *(jnp.ones((*here.shape[:-1], 16)) for _ in more))
            again = export.deserialize(made.serialize()).call(*given)
            for ours, theirs in zip(
                jax.tree.leaves(again), jax.tree.leaves(fn(*given)), strict=True
            ):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_flatbuffers
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_decode_attention_may_leave_its_rows_open(platform):
    (rows,) = export.symbolic_shape("rows")

    def floats(*shape):
        return jax.ShapeDtypeStruct((rows, *shape), jnp.float32)

    cache, new = floats(1, 4, 16), floats(1, 16)
    positions = jax.ShapeDtypeStruct((rows,), jnp.int32)
    arguments = new, new, new, cache, cache, positions, (floats(8), floats(8))
    export.export(jax.jit(sj.decode_attention), platforms=[platform])(*arguments)

"""Prepared forms of weights that are split over a mesh: kept where they can be, never wrong."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import pairs
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import slidejax as sj
from slidejax.ops import registry
from slidejax.ops.implementations.base import Form, Implementation
from slidejax.ops.implementations.reference import REFERENCE

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 CPU devices")

CUTS = [{}, {"out": "d"}, {"k": "t"}, {"out": "d", "k": "t"}, {"out": ("d", "t")}]


class InTiles(Implementation):
    """Its form is a flat array of tiles of 4 outputs, as that of "hopper" is of tiles of 64."""

    name = "in_tiles"
    form = Form(
        "in_tiles",
        lambda w: w.values.astype(jnp.int32).sum(-1).ravel(),
        outputs=4,
        shape=lambda w: (w.out_features * w.groups,),
    )
    competes = False

    def refuses(self, problem):
        return None if "in_tiles" in problem.prepared else "it has no form"

    def matmul(self, lifted, scale_x, w, bias, out_dtype, platform="default"):
        sums = w.values.astype(jnp.int32).sum(-1)
        right = (w.prepared["in_tiles"].reshape(sums.shape) == sums).all()
        y = REFERENCE.matmul(lifted, scale_x, w, bias, out_dtype, platform)
        return jnp.where(right, y, jnp.nan if out_dtype is not None else -1)


@pytest.fixture
def in_tiles(monkeypatch):
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", list(registry._IMPLEMENTATIONS))
    registry.register(InTiles())


def mesh_of(kind=AxisType.Auto):
    devices = np.array(jax.devices("cpu")[:8]).reshape(2, 4)
    return Mesh(devices, ("d", "t"), axis_types=(kind, kind))


def place(mesh, tree, specs):
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def problem(dtype="int8", out=32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((16, 512)), jnp.float32)
    return x, sj.pack(jnp.asarray(rng.standard_normal((512, out)), jnp.float32), "6:8", dtype=dtype)


def prepared_there(mesh, w, axes):
    """The weight over a mesh, prepared where it lies."""
    return sj.prepare(place(mesh, w, w.partition_spec(**axes)), "dense")


def prepared_before(mesh, w, axes):
    before = sj.prepare(w, "dense")
    return place(mesh, before, before.partition_spec(**axes))


PREPARED = {"there": prepared_there, "before": prepared_before}


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("axes", "x_spec", "prepare"),
    pairs(CUTS, [P(), P("d"), P("d", "t"), P(None, "t")], ["there", "before"]),
    ids=str,
)
def test_dense_codes_are_read_on_shards_in_every_layout(axes, x_spec, prepare):
    mesh, (x, w) = mesh_of(), problem()
    want, x, prepared = sj.linear(x, w), place(mesh, x, x_spec), PREPARED[prepare](mesh, w, axes)
    form = prepared.prepared["dense"]
    assert form.sharding.is_equivalent_to(NamedSharding(mesh, prepared.values.sharding.spec), 2)
    np.testing.assert_array_equal(jax.jit(sj.linear)(x, prepared), want)
    assert all(p.prepared == ("dense",) for p, _ in sj.explain(sj.linear, x, prepared))

    def two(x, w):
        return sj.sparse_matmul(*sj.lift_quantize(x, "6:8"), w, out_dtype="float32")

    np.testing.assert_array_equal(jax.jit(two)(x, prepared), want)
    assert all(p.prepared == ("dense",) for p, _ in sj.explain(two, x, prepared))


@pytest.mark.parametrize("axes", CUTS, ids=str)
def test_in_shard_map_explicit_mode_and_gradients(axes):
    x, w = problem("float32")
    want = sj.linear(x, w)
    mesh = mesh_of()
    prepared = prepared_there(mesh, w, axes)
    specs = P(None, axes.get("k")), prepared.partition_spec(**axes)
    body = jax.shard_map(
        lambda x, w: sj.linear(x, w, reduce_axis=axes.get("k")),
        mesh=mesh,
        in_specs=specs,
        out_specs=P(None, axes.get("out")),
    )
    np.testing.assert_allclose(jax.jit(body)(x, prepared), want, rtol=1e-5, atol=1e-4)

    def loss(x, w):
        return (sj.linear(x, w) ** 2).sum()

    mesh = mesh_of(AxisType.Explicit)
    prepared = prepared_there(mesh, w, axes)
    with jax.set_mesh(mesh):
        y = jax.jit(sj.linear)(place(mesh, x, P()), prepared)
        gradient = jax.jit(jax.grad(loss))(place(mesh, x, P()), prepared)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(gradient, jax.grad(loss)(x, w), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("lead", ["t", None])
def test_stacked_weights_are_prepared_where_they_lie(lead):
    mesh, (x, w) = mesh_of(), problem()
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), w)
    specs = stack.partition_spec(out="d", batch=(lead,))
    prepared = sj.prepare(place(mesh, stack, specs), "dense")
    assert prepared.prepared["dense"].sharding.spec == P(lead, "d")
    run = jax.jit(lambda x, stack: jax.lax.scan(lambda x, w: (x, sj.linear(x, w)), x, stack)[1])
    np.testing.assert_array_equal(run(x, prepared), jnp.stack([sj.linear(x, w)] * 4))


def test_a_form_in_tiles_is_cut_by_whole_tiles(in_tiles):
    mesh, (x, w) = mesh_of(), problem()
    want = sj.linear(x, w)
    run = jax.jit(lambda x, w: sj.linear(x, w, implementation="in_tiles"))
    whole = sj.prepare(w, "in_tiles")
    np.testing.assert_array_equal(run(x, whole), want)
    for axes in ("d", ("d", "t")):
        prepared = sj.prepare(place(mesh, w, w.partition_spec(out=axes)), "in_tiles")
        assert prepared.prepared["in_tiles"].sharding.spec == P(axes)
        np.testing.assert_array_equal(run(x, prepared), want)
        # A form that is whole on each device is cut there.
        np.testing.assert_array_equal(run(x, prepared.replace(prepared=whole.prepared)), want)


@pytest.mark.parametrize(("axes", "out"), [({"out": "t"}, 40), ({"k": "t"}, 32)], ids=str)
def test_where_a_form_cannot_be_cut_a_warning_says_so(in_tiles, axes, out):
    """10 outputs on each device are no whole tiles, and tiles have all of K."""
    mesh, (x, w) = mesh_of(), problem(out=out)
    whole = sj.prepare(w, "in_tiles")
    with pytest.raises(ValueError, match=r"in_tiles.*drop_prepared"):
        whole.partition_spec(**axes)
    cut = place(mesh, w, w.partition_spec(**axes))
    with pytest.warns(UserWarning, match="'in_tiles' cannot be cut"):
        assert not sj.prepare(cut, "in_tiles").prepared
    cut = cut.replace(prepared=place(mesh, whole.prepared, {"in_tiles": P()}))
    with pytest.warns(UserWarning, match=r"\['in_tiles'\] cannot be") as caught:
        np.testing.assert_array_equal(jax.jit(sj.linear)(x, cut), sj.linear(x, w))
    assert len(caught) == 1
    assert [p.prepared for p, _ in _explained(x, cut)] == [()]
    if "k" in axes:
        specs = P(None, "t"), w.partition_spec(k="t").replace(prepared={"in_tiles": P("t")})
        body = jax.shard_map(
            lambda x, w: sj.linear(x, w, reduce_axis="t"), mesh=mesh, in_specs=specs, out_specs=P()
        )
        with pytest.warns(UserWarning, match=r"\['in_tiles'\] cannot be"):
            np.testing.assert_array_equal(body(x, cut), sj.linear(x, w))


def _explained(x, w):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sj.explain(lambda x, w: sj.linear(x, w), x, w)


@pytest.mark.parametrize("name", ["dense", "in_tiles"])
def test_the_form_of_another_weight_is_refused(in_tiles, name):
    """A whole form beside a shard of the weight would be wrong without a word."""
    mesh, (x, w) = mesh_of(), problem()
    whole = sj.prepare(w, name)
    specs = w.partition_spec(out="d").replace(prepared={name: P()})
    body = jax.shard_map(
        lambda x, w: sj.linear(x, w), mesh=mesh, in_specs=(P(), specs), out_specs=P(None, "d")
    )
    with pytest.raises(ValueError, match=rf"prepared\['{name}'\] must have shape .* whole"):
        body(x, whole)


def test_hopper_metadata_is_kept_on_shards():
    """The program for a GPU, without one: forms are cut by 64 outputs, and not with K."""
    mesh = mesh_of()
    x, w = problem(out=1024)
    x = jnp.zeros((64, 512), jnp.bfloat16)
    form = registry.get("hopper").form
    metadata = {"hopper": jnp.zeros(form.shape(w), jnp.uint8)}

    def explained(**axes):
        cut = place(mesh, w, w.partition_spec(**axes)).replace(prepared=metadata)
        ((found, _),) = sj.explain(lambda x, w: sj.linear(x, w), x, cut, platform="cuda")
        return found.out_features, found.prepared

    assert explained(out="t") == (256, ("hopper",))
    assert explained(out=("d", "t")) == (128, ("hopper",))
    with pytest.warns(UserWarning, match="hopper"):
        assert explained(k="t") == (1024, ())

"""No way to lay out x, W and y over a mesh that a dense product compiles may raise or be wrong."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import slidejax as sj

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 CPU devices")

# The axes of two dimensions over two mesh axes, and those of x, w (outputs, K) and y.
TWO = [(a, b) for a in (None, "d", "t") for b in (None, "d", "t") if a is None or a != b]
LAYOUTS = list(itertools.product(TWO, TWO, TWO))
SAMPLE = 30


def pytest_generate_tests(metafunc):
    if "layout" in metafunc.fixturenames:
        chosen = LAYOUTS
        if not metafunc.config.getoption("--every-case"):
            picked = np.random.default_rng(20).choice(len(LAYOUTS), SAMPLE, replace=False)
            chosen = [LAYOUTS[i] for i in sorted(picked)]
        metafunc.parametrize("layout", chosen, ids=str)


def mesh_of(kind=AxisType.Auto, **axes):
    shape = tuple(axes.values())
    devices = np.array(jax.devices("cpu")[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, tuple(axes), axis_types=(kind,) * len(axes))


def place(mesh, tree, specs):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def problem(x_shape, out, dtype="int8"):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(x_shape), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((x_shape[-1], out)), jnp.float32)
    return x, sj.pack(kernel, "6:8", dtype=dtype)


def collectives(fn, *args, **jit):
    """The transfers of a compiled program: `[(collective, dtype of its result)]`."""
    text = jax.jit(fn, **jit).lower(*args).compile().as_text()
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return {
        (op, dtype) for dtype, op in re.findall(rf"= \(?(\w+)\[.*? ({names})(?:-start)?\(", text)
    }


def test_there_are_343_layouts():
    assert len(LAYOUTS) == 343


def test_every_layout_is_right(layout):
    x_axes, w_axes, y_axes = layout
    mesh = mesh_of(d=2, t=2)
    x, w = problem((8, 128), 8)
    x_cut = place(mesh, x, P(*x_axes))
    w_cut = place(mesh, w, w.partition_spec(out=w_axes[0], k=w_axes[1]))
    run = jax.jit(sj.linear, out_shardings=NamedSharding(mesh, P(*y_axes)))
    np.testing.assert_array_equal(run(x_cut, w_cut), sj.linear(x, w))


def test_fsdp_gathers_the_packed_weight():
    """One mesh axis cuts the rows of x and the weight: the weight moves, in 8 bit."""
    mesh = mesh_of(d=8)
    x, w = problem((16, 1024), 64)
    for axes in ({"out": "d"}, {"k": "d"}):
        args = place(mesh, x, P("d")), place(mesh, w, w.partition_spec(**axes))
        found = collectives(sj.linear, *args, out_shardings=NamedSharding(mesh, P("d")))
        assert {op for op, _ in found} == {"all-gather"}
        assert {("all-gather", "s8"), ("all-gather", "u8")} <= found
        y = jax.jit(sj.linear, out_shardings=NamedSharding(mesh, P("d")))(*args)
        np.testing.assert_array_equal(y, sj.linear(x, w))


@pytest.mark.parametrize("x_axes", [("d", "t"), (None, "t"), ("t", "d")], ids=str)
def test_a_cut_sequence_needs_no_collective(x_axes):
    mesh = mesh_of(d=2, t=4)
    x, w = problem((4, 8, 128), 32)
    args = place(mesh, x, P(*x_axes)), place(mesh, w, w.partition_spec())
    residual = place(mesh, jnp.ones((4, 8, 32)), P(*x_axes))

    def run(x, w, residual):
        norm = sj.RMSNorm(jnp.ones(128))
        return sj.linear(x, w, residual=residual, prologue=norm)

    y = jax.jit(run)(*args, residual)
    np.testing.assert_allclose(y, run(x, w, jnp.ones((4, 8, 32))), rtol=1e-5, atol=1e-5)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(*x_axes)), 3)
    assert collectives(run, *args, residual) == set()

    def two(x, w):
        return sj.sparse_matmul(*sj.lift_quantize(x, "6:8"), w, out_dtype="float32")

    np.testing.assert_array_equal(jax.jit(two)(*args), two(x, w))
    assert collectives(two, *args) == set()


def test_a_mapped_batch_needs_no_collective():
    mesh = mesh_of(d=8)
    x, w = problem((8, 4, 128), 32)
    run = jax.vmap(sj.linear, (0, None))
    args = place(mesh, x, P("d")), place(mesh, w, w.partition_spec())
    np.testing.assert_array_equal(jax.jit(run)(*args), run(x, w))
    assert collectives(run, *args) == set()


@pytest.mark.parametrize("y_axes", [("d", "t"), ("d", None, "t"), (("d", "t"),)], ids=str)
@pytest.mark.parametrize("prologue", [False, True])
def test_the_sum_over_k_is_scattered_where_y_is_cut(y_axes, prologue):
    """Rows, then a sequence cut over the same axis: int32 sums are scattered, W stays."""
    mesh = mesh_of(d=2, t=4)
    x, w = problem((8, 8, 256), 32)
    rng = np.random.default_rng(1)
    bias = jnp.asarray(rng.standard_normal(32), jnp.float32)
    residual = jnp.asarray(rng.standard_normal((8, 8, 32)), jnp.float32)

    def run(x, w, bias, residual):
        fused = sj.Activation("silu") if prologue else None
        return sj.linear(x, w, bias, residual=residual, prologue=fused)

    args = (
        place(mesh, x, P("d", None, "t")),
        place(mesh, w, w.partition_spec(k="t")),
        bias,
        place(mesh, residual, P(*y_axes)),
    )
    sharding = NamedSharding(mesh, P(*y_axes))
    y = jax.jit(run, out_shardings=sharding)(*args)
    np.testing.assert_array_equal(y, run(x, w, bias, residual))
    found = collectives(run, *args, out_shardings=sharding)
    assert found == {("reduce-scatter", "s32"), ("all-reduce", "f32")}


# --- explicit mode --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_axes", "w_axes", "y_axes"),
    [
        (("d", None, None), {}, ("d", None, None)),
        (("d", "t", None), {}, ("d", "t", None)),
        (("d", None, None), {"out": "t"}, ("d", None, "t")),
        (("d", None, "t"), {"k": "t"}, ("d", None, None)),
        (("d", "t", None), {"out": "t"}, ("d", "t", None)),
        (("d", None, None), {"k": "d"}, ("d", None, None)),
        ((None, None, ("d", "t")), {}, (None, None, None)),
    ],
    ids=str,
)
def test_explicit_types_and_gradients(x_axes, w_axes, y_axes):
    mesh = mesh_of(AxisType.Explicit, d=2, t=4)
    x, w = problem((4, 8, 512), 32, "float32")
    x_cut, w_cut = place(mesh, (x, w), (P(*x_axes), w.partition_spec(**w_axes)))

    def loss(x, values, w):
        return (sj.linear(x, w.replace(values=values)) ** 2).sum()

    want = jax.grad(loss, (0, 1))(x, w.values, w)
    with jax.set_mesh(mesh):
        for run in (sj.linear, jax.jit(sj.linear)):
            y = run(x_cut, w_cut)
            assert jax.typeof(y).sharding.spec == P(*y_axes)
            np.testing.assert_allclose(y, sj.linear(x, w), rtol=1e-5, atol=1e-4)
        got = jax.jit(jax.grad(loss, (0, 1)))(x_cut, w_cut.values, w_cut)
    for a, b, like in zip(got, want, (x_cut, w_cut.values), strict=True):
        assert jax.typeof(a).sharding.spec == jax.typeof(like).sharding.spec
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_explicit_mode_has_the_other_ops_and_weights():
    mesh = mesh_of(AxisType.Explicit, d=2, t=4)
    x, w = problem((4, 8, 128), 32)
    specs = P("d", "t"), w.partition_spec(out="t")
    x_cut, w_cut = place(mesh, (x, w), specs)

    def two(x, w):
        return sj.sparse_matmul(*sj.lift_quantize(x, "6:8"), w, out_dtype="float32")

    def trained(x, w):
        return jax.grad(lambda m: sj.linear(x, m).sum(), allow_int=True)(sj.trainable.masters(w))

    with jax.set_mesh(mesh):
        y = jax.jit(two)(x_cut, w_cut)
        assert jax.typeof(y).sharding.spec == P("d", "t", None)
        np.testing.assert_array_equal(y, two(x, w))
        mapped = jax.jit(jax.vmap(sj.linear, (0, None)))(x_cut, w_cut)
        assert jax.typeof(mapped).sharding.spec == P("d", "t", None)
        np.testing.assert_array_equal(mapped, sj.linear(x, w))
        gradient = jax.jit(trained)(x_cut, w_cut)
        assert jax.typeof(gradient.values).sharding.spec == P("t", None, None)
        np.testing.assert_allclose(gradient.values, trained(x, w).values, rtol=1e-4, atol=1e-4)
        adapted = jax.jit(sj.linear)(x_cut, sj.adapters.add(w_cut, rank=2))
        np.testing.assert_allclose(adapted, y, rtol=1e-5, atol=1e-5)


# --- without Shardy -------------------------------------------------------------------------------


def test_without_shardy_there_is_one_clear_error():
    mesh = mesh_of(d=8)
    x, w = problem((8, 64), 8)
    before = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        args = place(mesh, x, P("d")), place(mesh, w, w.partition_spec())
        for run in (
            lambda x, w: sj.linear(x, w),
            lambda x, w: sj.sparse_matmul(*sj.lift_quantize(x, "6:8"), w),
        ):
            with pytest.raises(NotImplementedError, match="jax_use_shardy_partitioner"):
                jax.jit(run)(*args)
        one = jax.jit(lambda x, w: sj.linear(x, w))(x, w)  # one device, or all of it in shard_map
        specs = P("d"), w.partition_spec()
        body = jax.shard_map(
            lambda x, w: sj.linear(x, w), mesh=mesh, in_specs=specs, out_specs=P("d")
        )
        np.testing.assert_array_equal(jax.jit(body)(x, w), one)
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


# --- what runs on a shard -------------------------------------------------------------------------


def test_explain_shows_what_each_device_multiplies():
    """Column and row parallel weights run as one device has them."""
    mesh = mesh_of(d=2, t=4)
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("d")))
    up, down = problem((1, 512), 1024)[1], problem((1, 1024), 512)[1]
    up_cut = place(mesh, up, up.partition_spec(out="t"))
    down_cut = place(mesh, down, down.partition_spec(k="t"))

    def mlp(x, up, down):
        with jax.named_scope("up"):
            x = sj.linear(x, up)
        with jax.named_scope("down"):
            return sj.linear(x, down)

    found = sj.explain(mlp, x, up_cut, down_cut, platform="cuda")
    sizes = [(p.op, p.rows, p.in_features, p.out_features, p.layer) for p, _ in found]
    assert sizes == [
        ("linear", 32, 512, 256, "up"),
        ("sparse_matmul", 32, 256, 512, "down"),
    ]
    assert all(p.platform == "cuda" and "H100" in p.device for p, _ in found)
    # Without the compiled library only "dense" can run; the refusals say so.
    assert all(c.implementation in ("hopper", "dense") for _, c in found)
    assert str(found).count("\n") == 1 and len(str(found)) < 2000
    whole = sj.explain(mlp, jnp.zeros((64, 512), jnp.bfloat16), up, down, platform="cuda")
    assert [p.out_features for p, _ in whole] == [1024, 512]


def test_sums_that_are_not_finished_are_refused_as_a_dense_product_refuses_them():
    mesh = mesh_of(AxisType.Explicit, d=2, t=4)
    _, w = problem((16, 64), 32)
    expected = sj.linear(jnp.full((16, 64), 256.0), w)
    with jax.set_mesh(mesh):
        a = jax.device_put(jnp.ones((16, 256)), NamedSharding(mesh, P("d", "t")))
        b = jax.device_put(jnp.ones((256, 64)), NamedSharding(mesh, P("t", None)))
        to = P("d", None, unreduced={"t"})
        part = jax.jit(lambda a, b: jnp.einsum("mk,kn->mn", a, b, out_sharding=to))(a, b)
        with pytest.raises(ValueError, match="unreduced over the mesh axes 't': reduce it first"):
            jax.jit(sj.linear)(part, w)
        whole = jax.sharding.reshard(part, P("d", None))
        np.testing.assert_array_equal(jax.jit(sj.linear)(whole, w), expected)


def test_shards_of_k_that_are_no_blocks_are_refused_by_name():
    mesh = mesh_of(d=2, t=4)
    x, w = problem((16, 256), 64)  # four blocks of 64 columns
    specs = (P(None, ("d", "t")), w.partition_spec(k=("d", "t")))
    mapped = jax.shard_map(
        lambda x, w: sj.linear(x, w, reduce_axis=("d", "t")),
        mesh=mesh,
        in_specs=specs,
        out_specs=P(),
    )
    with pytest.raises(
        ValueError, match=r"w is a shard of K with 4 groups, .* no whole blocks of 8"
    ):
        mapped(x, w)
    assert jax.jit(sj.linear)(place(mesh, x, specs[0]), place(mesh, w, specs[1])).shape == (16, 64)

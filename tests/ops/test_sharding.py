"""All ways to cut a product over eight fake devices: equal results, without gathering x or W."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import pairs
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import slidejax as sj

COLUMNS = 256  # four blocks of 6:8
CUTS = [
    ("m", None, None),
    (None, "o", None),
    ("m", "o", None),
    (None, None, "k"),
    ("m", "o", "k"),
    (("m", "o"), None, "k"),
]

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 CPU devices")


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 2, 2), ("m", "o", "k"))


def problem(dtype, pattern="6:8"):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((16, COLUMNS)), jnp.float32)
    w = sj.pack(jnp.asarray(rng.standard_normal((COLUMNS, 32)), jnp.float32), pattern, dtype=dtype)
    return x, w, jnp.asarray(rng.standard_normal(32), jnp.float32)


def place(mesh, tree, specs):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def collectives(fn, *args):
    text = jax.jit(fn).lower(*args).compile().as_text()
    return set(
        re.findall(
            r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
            text,
        )
    )


@pytest.mark.parametrize(
    ("pattern", "dtype"), [("6:8", "int8"), ("6:8", "float32"), ("dense", "int8")]
)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_linear_under_jit(mesh, cut, pattern, dtype):
    rows, out, k = cut
    x, w, bias = problem(dtype, pattern)
    y = sj.linear(x, w, bias)
    args = (
        place(mesh, x, P(rows, k)),
        place(mesh, w, w.partition_spec(out=out, k=k)),
        place(mesh, bias, P(out)),
    )
    cut_y = jax.jit(sj.linear)(*args)
    np.testing.assert_allclose(cut_y, y, rtol=1e-5, atol=1e-5)
    if dtype == "int8":
        np.testing.assert_array_equal(cut_y, y)
    assert collectives(sj.linear, *args) == ({"all-reduce"} if k else set())
    assert cut_y.sharding.is_equivalent_to(NamedSharding(mesh, P(rows, out)), 2)


@pytest.mark.parametrize(
    ("cut", "pattern"), [*((cut, "6:8") for cut in CUTS), (CUTS[4], "dense")], ids=str
)
def test_the_two_ops_under_jit(mesh, cut, pattern):
    rows, out, k = cut
    x, w, bias = problem("int8", pattern)

    def run(x, w, bias):
        return sj.sparse_matmul(*sj.lift_quantize(x, pattern), w, bias, out_dtype="float32")

    args = (
        place(mesh, x, P(rows, k)),
        place(mesh, w, w.partition_spec(out=out, k=k)),
        place(mesh, bias, P(out)),
    )
    np.testing.assert_array_equal(jax.jit(run)(*args), run(x, w, bias))
    assert collectives(run, *args) == ({"all-reduce"} if k else set())


@pytest.mark.parametrize(
    ("pattern", "dtype"), [("6:8", "int8"), ("6:8", "float32"), ("dense", "int8")]
)
def test_shard_map(mesh, pattern, dtype):
    x, w, bias = problem(dtype, pattern)
    specs = P("m", "k"), w.partition_spec(out="o", k="k"), P("o")

    def run(x, w, bias):
        body = functools.partial(sj.linear, reduce_axis="k")
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("m", "o"))(x, w, bias)

    y = jax.jit(run)(x, w, bias)
    np.testing.assert_allclose(y, sj.linear(x, w, bias), rtol=1e-5, atol=1e-5)
    assert collectives(run, *place(mesh, (x, w, bias), specs)) == {"all-reduce"}

    def lifted(x, w, bias):
        return sj.sparse_matmul(
            *sj.lift_quantize(x, pattern, dtype, reduce_axis="k"),
            w,
            bias,
            out_dtype="float32",
            reduce_axis="k",
        )

    y = jax.jit(jax.shard_map(lifted, mesh=mesh, in_specs=specs, out_specs=P("m", "o")))(x, w, bias)
    np.testing.assert_allclose(y, sj.linear(x, w, bias), rtol=1e-5, atol=1e-5)


def test_gradients_over_a_mesh(mesh):
    x, w, bias = problem("float32")

    def loss(x, values, bias, linear=sj.linear):
        return (linear(x, w.replace(values=values), bias) ** 2).sum()

    want = jax.grad(loss, (0, 1, 2))(x, w.values, bias)
    body = functools.partial(sj.linear, reduce_axis="k")
    cut = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P("m", "k"), w.partition_spec("o", "k"), P("o")),
        out_specs=P("m", "o"),
    )
    mapped = jax.jit(jax.grad(functools.partial(loss, linear=cut), (0, 1, 2)))(x, w.values, bias)
    values = place(mesh, w.values, P("o", "k", None))
    automatic = jax.jit(jax.grad(loss, (0, 1, 2)))(
        place(mesh, x, P("m", "k")), values, place(mesh, bias, P("o"))
    )
    for got in (mapped, automatic):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_prepared_forms_stay_behind_on_shards(mesh):
    x, w, bias = problem("int8")
    w = sj.prepare(w, "dense")
    replicated = place(mesh, w, jax.tree.map(lambda _: P(), w))
    y = jax.jit(sj.linear)(place(mesh, x, P("m", "k")), replicated, bias)
    np.testing.assert_array_equal(y, sj.linear(x, w, bias))


@pytest.mark.parametrize(  # columns: three blocks in two, and no whole block
    ("columns", "w_axes", "pattern"),
    pairs([192, 100], [{}, {"out": "o"}, {"k": "k"}], ["6:8", "dense"]),
    ids=str,
)
def test_x_is_gathered_where_k_does_not_divide(mesh, columns, w_axes, pattern):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((columns, 32)), jnp.float32)
    w = sj.pack(kernel, pattern, dtype="int8")
    if "k" in w_axes and columns % w.pattern.block:
        pytest.skip("K of such a weight cannot be cut")
    x = jnp.asarray(rng.standard_normal((16, columns)), jnp.float32)
    args = place(mesh, x, P("m", "k")), place(mesh, w, w.partition_spec(**w_axes))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = jax.jit(lambda x, w: sj.linear(x, w))(*args)
    np.testing.assert_array_equal(y, sj.linear(x, w))
    divides = columns % (2 * w.pattern.block) == 0
    mine = [str(c.message) for c in caught if "whole number of blocks" in str(c.message)]
    assert len(mine) == (0 if divides else 1), caught
    assert divides or (f"{columns} inputs" in mine[0] and "('k',)" in mine[0])


# --- a residual -----------------------------------------------------------------------------------


def residual_problem(dtype="int8"):
    """In int8 all scales are powers of two: XLA may fuse a multiplication with an addition, in one
    program and not in another, and then both give the same bits."""
    x, w, bias = problem(dtype)
    if dtype == "int8":
        x = jnp.clip(jnp.round(x * 40), -127, 127).at[:, 0].set(127) / 32
        w = w.replace(scale=jnp.exp2(jnp.round(jnp.log2(w.scale))))
    residual = np.random.default_rng(1).standard_normal((16, 32)) * 20
    return x, w, bias, jnp.asarray(residual, jnp.bfloat16)


def lifted(x, w, bias, residual, reduce_axis=None):
    """The same product by the two ops."""
    rows = sj.lift_quantize(x, w.pattern, w.dtype, reduce_axis=reduce_axis)
    return sj.sparse_matmul(
        *rows, w, bias, out_dtype="float32", reduce_axis=reduce_axis, residual=residual
    )


def whole(x, w, bias, residual, reduce_axis=None):
    return sj.linear(x, w, bias, reduce_axis=reduce_axis, residual=residual)


@pytest.mark.parametrize("run", [whole, lifted])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_residual_is_cut_as_the_result_is(mesh, cut, run):
    rows, out, k = cut
    x, w, bias, residual = residual_problem()
    args = (
        place(mesh, x, P(rows, k)),
        place(mesh, w, w.partition_spec(out=out, k=k)),
        place(mesh, bias, P(out)),
        place(mesh, residual, P(rows, out)),
    )
    y = jax.jit(run)(*args)
    np.testing.assert_array_equal(y, run(x, w, bias, residual))
    assert collectives(run, *args) == ({"all-reduce"} if k else set())
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(rows, out)), 2)


@pytest.mark.parametrize("run", [whole, lifted])
def test_a_residual_in_shard_map_is_added_once(mesh, run):
    x, w, bias, residual = residual_problem()
    specs = P("m", "k"), w.partition_spec(out="o", k="k"), P("o"), P("m", "o")
    body = functools.partial(run, reduce_axis="k")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("m", "o"))
    y = jax.jit(mapped)(x, w, bias, residual)
    np.testing.assert_array_equal(y, run(x, w, bias, residual))
    assert collectives(mapped, *place(mesh, (x, w, bias, residual), specs)) == {"all-reduce"}


@pytest.mark.parametrize("run", [whole, lifted])
@pytest.mark.parametrize(
    ("spec", "copies"), [(P("m", "o"), (1, 1)), (P(None, "o"), (2, 1)), (P(), (2, 2))], ids=str
)
def test_gradients_of_a_residual_over_a_mesh(mesh, spec, copies, run):
    """A residual that shards of y have in common gets the sum of their gradients, once each."""
    x, w, bias, residual = residual_problem("float32")
    residual = residual[: 16 // copies[0], : 32 // copies[1]].astype(jnp.float32)
    in_specs = P("m", "k"), w.partition_spec("o", "k"), P("o"), spec
    body = functools.partial(run, reduce_axis="k")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=P("m", "o"))

    def loss(x, values, bias, residual, run):
        return (run(x, w.replace(values=values), bias, residual) ** 2).sum()

    def tiled(x, w, bias, residual):
        return run(x, w, bias, jnp.tile(residual, copies))

    args, every = (x, w.values, bias, residual), (0, 1, 2, 3)
    got = jax.jit(jax.grad(functools.partial(loss, run=mapped), every))(*args)
    want = jax.grad(functools.partial(loss, run=tiled), every)(*args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2)


# --- operands that want one axis for two things ---------------------------------------------------


@pytest.mark.parametrize(
    ("x_spec", "residual_spec", "w_axes", "run"),
    pairs(
        [P("m"), P(None, "m"), P("m", "k")],
        [P("m"), P(None, "m"), P("k", "m")],
        [{}, {"out": "m"}, {"k": "m"}],
        [whole, lifted],
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_operands_may_want_one_axis_for_two_things(mesh, x_spec, residual_spec, w_axes, run):
    x, w, bias, residual = residual_problem()
    args = (
        place(mesh, x, x_spec),
        place(mesh, w, w.partition_spec(**w_axes)),
        bias,
        place(mesh, residual, residual_spec),
    )
    np.testing.assert_array_equal(jax.jit(run)(*args), run(x, w, bias, residual))


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: sj.linear(x, w, implementation="hopper"),
        lambda x, w: sj.linear_chain(x, [sj.Stage(w)], implementation="decode"),
        lambda x, w: sj.sparse_matmul(
            *sj.lift_quantize(x, "6:8", "int8"), w, implementation="cusparselt"
        ),
        lambda x, w: jax.vmap(lambda x: sj.linear(x, w, implementation="hopper"))(x[:, None]),
    ],
    ids=["linear", "chain", "sparse_matmul", "vmap"],
)
def test_an_implementation_for_cuda_alone_is_the_same_error_over_several_devices(mesh, run):
    x, w, _ = problem("int8")
    x = jax.device_put(x, NamedSharding(mesh, P("m")))
    with pytest.raises(NotImplementedError, match=r"^slidejax .* refuses: runs on CUDA only"):
        jax.jit(run)(x, w)

"""Whatever takes weights takes those over a mesh with explicit axes, whose types say how they lie.

Outside of `jax.set_mesh` a derivative must be taken under `jax.jit`, as JAX asks of dense products.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import each, some
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import slidejax as sj
from slidejax.variants.serving import serving

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 CPU devices")

CUTS = [
    ({"out": "t"}, P("d")),
    ({"k": "t"}, P("d", "t")),
    ({"k": "d"}, P("d")),
    ({"out": "d", "k": "t"}, P()),
]
cuts = pytest.mark.parametrize(("axes", "x_spec"), CUTS, ids=str)
DTYPES = ["int8", "float32"]
KINDS = ["packed", "masters", "adapters", "masked adapters", "serving"]


@pytest.fixture
def mesh():
    devices = np.array(jax.devices("cpu")[:8]).reshape(2, 4)
    found = Mesh(devices, ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(found):
        yield found


def place(mesh, tree, specs):
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def problem(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 512)), jnp.float32)
    return x, sj.pack(jnp.asarray(rng.standard_normal((512, 32)), jnp.float32), "6:8", dtype=dtype)


def loss(x, w):
    return (sj.linear(x, w, jnp.ones(32)) ** 2).sum() + jnp.tanh(x).sum()


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-2)


def adapted(w, masked):
    """With an update that is not zero."""
    added = sj.adapters.add({"w": w}, rank=4, masked=masked)["w"]
    return jax.tree.map(lambda leaf: leaf + 0.01 if leaf.shape == (4, 32) else leaf, added)


@pytest.mark.parametrize(
    ("cut", "dtype", "kind"),
    some(
        [  # every kind with every dtype, and each of them with every cut or all but one
            (CUTS[(i + i // 2) % 4], *of_it)
            for i, of_it in enumerate((dtype, kind) for kind in KINDS for dtype in DTYPES)
        ],
        CUTS,
        DTYPES,
        KINDS,
    ),
)
def test_products_and_gradients(mesh, cut, dtype, kind):
    (axes, x_spec), (x, w) = cut, problem(dtype)

    def made(w):
        if kind == "masters":
            return sj.trainable.masters(w, "int8")
        if "adapters" in kind:
            return adapted(w, "masked" in kind)
        return serving(w) if kind == "serving" else w

    x_cut, w_cut = place(mesh, x, x_spec), made(place(mesh, w, w.partition_spec(**axes)))
    y = jax.jit(sj.linear)(x_cut, w_cut)
    assert jax.typeof(y).sharding.spec[-1] == axes.get("out")
    close(y, sj.linear(x, made(w)))
    gradient = jax.grad(loss, (0, 1), allow_int=True)
    got = jax.jit(gradient)(x_cut, w_cut)
    close(got, gradient(x, made(w)))
    assert jax.typeof(got[0]).sharding.spec == jax.typeof(x_cut).sharding.spec


@pytest.mark.parametrize(("cut", "dtype"), each(CUTS, DTYPES))
def test_what_makes_weights_of_weights(mesh, cut, dtype):
    (axes, _), (_, w) = cut, problem(dtype)
    w_cut = place(mesh, w, w.partition_spec(**axes))

    def merged(masked):
        return lambda w: sj.adapters.merge(adapted(w, masked))

    for make in (
        lambda w: sj.prepare(w, "dense"),
        lambda w: sj.trainable.deploy(sj.trainable.masters(w, "int8")),
        merged(False),
        merged(True),
        sj.unpack,
    ):
        for run in (make, jax.jit(make)):
            close(run(w_cut), make(w))
    assert jax.typeof(merged(False)(w_cut).values).sharding.spec == w_cut.values.sharding.spec


@cuts
def test_a_kernel_is_packed_and_prepared_where_it_lies(mesh, axes, x_spec):
    x, w = problem("float32")
    kernel = place(mesh, sj.unpack(w), P(axes.get("k"), axes.get("out")))
    for dtype in ("float32", "int8"):
        packed = sj.prepare(sj.pack(kernel, "6:8", dtype=dtype), "dense")
        want = sj.linear(x, sj.pack(np.asarray(kernel), "6:8", dtype=dtype))
        close(jax.jit(sj.linear)(place(mesh, x, x_spec), packed), want)

"""A prologue gives the same result as computing it before the layer."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import each
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import slidejax as sj
from slidejax.ops.prologue import ACTIVATIONS
from slidejax.variants.trainable import masters

COLUMNS, ROWS = 128, 8  # two blocks of 6:8
KINDS = ["rms_norm", "layer_norm", "layer_norm without bias", "activation", "glu"]


def random(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def prologue_of(kind, x):
    vector = lambda seed: 1 + random(seed, x.shape[-1:]) / 4  # noqa: E731
    return {
        "rms_norm": lambda: sj.RMSNorm(vector(1), 1e-5),
        "layer_norm": lambda: sj.LayerNorm(vector(1), vector(2), 1e-5),
        "layer_norm without bias": lambda: sj.LayerNorm(vector(1)),
        "activation": lambda: sj.Activation("gelu_tanh"),
        "glu": lambda: sj.GLU(random(3, x.shape, x.dtype), "silu"),
    }[kind]()


def weight(dtype="int8"):
    return sj.pack(random(5, (COLUMNS, 16)), "6:8", dtype=dtype)


def close(a, b):
    """Codes to one step, floats to a step of their codes."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a.shape == b.shape and np.abs(a - b).max() <= 1e-2 * np.abs(b).max()


def test_the_formulas_are_those_of_flax():
    x = random(0, (4, COLUMNS)) * 3 + 1
    scale, bias = random(1, COLUMNS), random(2, COLUMNS)
    rms = nn.RMSNorm(epsilon=1e-5).apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(sj.RMSNorm(scale, 1e-5).apply(x), rms, rtol=1e-6)
    layer = nn.LayerNorm(epsilon=1e-5).apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(
        sj.LayerNorm(scale, bias, 1e-5).apply(x), layer, rtol=1e-5, atol=1e-5
    )
    flax = {
        "silu": nn.silu,
        "gelu": lambda x: nn.gelu(x, approximate=False),
        "gelu_tanh": nn.gelu,
        "relu": nn.relu,
    }
    assert set(flax) == set(ACTIVATIONS)
    for name, function in flax.items():
        np.testing.assert_allclose(sj.Activation(name).apply(x), function(x), rtol=1e-6)
        np.testing.assert_allclose(sj.GLU(x + 1, name).apply(x), function(x) * (x + 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype"), each(KINDS, ["int8", "float8_e4m3fn", "bfloat16"]), ids=str
)
def test_equals_computing_it_first(kind, dtype):
    """Rounded to x's dtype once, and then quantised."""
    for x_dtype in (jnp.float32, jnp.bfloat16):
        x = random(0, (2, ROWS, COLUMNS), x_dtype)
        prologue = prologue_of(kind, x)
        y = prologue.apply(x)
        assert y.dtype == x_dtype
        got, expected = (
            sj.lift_quantize(x, "6:8", dtype, prologue=prologue),
            sj.lift_quantize(y, "6:8", dtype),
        )
        np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)
        steps = np.abs(np.asarray(got[0], np.float32) - np.asarray(expected[0], np.float32))
        # XLA may contract a product and a sum.
        assert (steps > 0).mean() < 1e-2 and (dtype != "int8" or steps.max() <= 1)
        w = weight(dtype)
        for implementation in (None, "reference") if dtype == "int8" else (None,):
            a, b = (
                sj.linear(x, w, prologue=prologue, implementation=implementation),
                sj.linear(y, w, implementation=implementation),
            )
            np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=2e-2
            )


@pytest.mark.parametrize("kind", KINDS)
def test_under_vmap(kind):
    x, w = random(0, (3, ROWS, COLUMNS)), weight()
    for op in (
        lambda x, p: sj.linear(x, w, prologue=p),
        lambda x, p: sj.lift_quantize(x, "6:8", prologue=p),
    ):
        prologue = prologue_of(kind, x)
        every = jax.tree.map(lambda leaf: 0 if leaf.ndim == 3 else None, prologue)
        expected = op(x, prologue)
        for a, b in zip(
            jax.tree.leaves(jax.vmap(op, (0, every))(x, prologue)),
            jax.tree.leaves(expected),
            strict=True,
        ):
            assert close(a, b)
        # One x and a batch of prologues: norm weights run one after the other.
        one = prologue_of(kind, x[0])
        batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 2]), one)
        if jax.tree.leaves(one):
            mapped = jax.vmap(op, (None, 0))(x[0], batch)
            second = op(x[0], jax.tree.map(lambda leaf: leaf * 2, one))
            for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(second), strict=True):
                assert close(a[1], b)


@pytest.mark.parametrize(("kind", "dtype"), each(KINDS, ["int8", "float32"]), ids=str)
def test_gradients(kind, dtype):
    """The gradients of x, of the prologue's arrays and of float values are the same, too."""
    x, w = random(0, (ROWS, COLUMNS)), weight(dtype)
    prologue = prologue_of(kind, x)
    target = random(7, (ROWS, 16))
    values = w.values if dtype == "float32" else jnp.zeros(())

    def loss(fused, x, prologue, values):
        v = w.replace(values=values) if dtype == "float32" else w
        y = sj.linear(x, v, prologue=prologue) if fused else sj.linear(prologue.apply(x), v)
        return (y * target).sum()

    got, expected = (
        jax.grad(loss, (1, 2, 3))(fused, x, prologue, values) for fused in (True, False)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(got[1]))
    lifted, pull = jax.vjp(
        lambda x, p: sj.lift_quantize(x, "6:8", "float32", prologue=p)[0], x, prologue
    )
    _, expected_pull = jax.vjp(
        lambda x, p: sj.lift_quantize(p.apply(x), "6:8", "float32")[0], x, prologue
    )
    cotangent = random(8, lifted.shape)
    for a, b in zip(
        jax.tree.leaves(pull(cotangent)), jax.tree.leaves(expected_pull(cotangent)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_integer_codes_have_no_gradient():
    x, up = random(0, (2, 8)), random(1, (2, 8))
    grads = jax.grad(
        lambda x, up: sj.lift_quantize(x, "6:8", "int8", prologue=sj.GLU(up))[1].sum(), (0, 1)
    )(x, up)
    assert all(not leaf.any() for leaf in grads)


@pytest.fixture
def mesh():
    if len(jax.devices("cpu")) < 4:
        pytest.skip("needs 4 CPU devices")
    return Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("m", "k"))


def specs(prologue, rows, k):
    return jax.tree.map(lambda leaf: P(rows, k) if leaf.ndim == 2 else P(k), prologue)


CUTS = [
    *((kind, ("m", "k")) for kind in KINDS),
    ("rms_norm", ("m", None)),
    ("glu", ("m", None)),
    ("layer_norm", (None, "k")),
]


@pytest.mark.parametrize(("kind", "cut"), CUTS, ids=str)
def test_sharded(mesh, kind, cut):
    """Rows and K can be split: sums over a row are taken over its shards."""
    rows, k = cut
    x, w = random(0, (ROWS, COLUMNS)), weight()
    prologue = prologue_of(kind, x)
    expected = sj.linear(x, w, prologue=prologue)

    def place(tree, specs):
        return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, specs)

    placed = (
        place(x, P(rows, k)),
        place(w, w.partition_spec(k=k)),
        place(prologue, specs(prologue, rows, k)),
    )

    def op(x, w, prologue):
        return sj.linear(x, w, prologue=prologue)

    compiled = jax.jit(op).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(*placed), expected, rtol=1e-4, atol=2e-2)
    lifted, scale = jax.jit(lambda x, p: sj.lift_quantize(x, "6:8", prologue=p))(
        placed[0], placed[2]
    )
    expected_lifted, expected_scale = sj.lift_quantize(x, "6:8", prologue=prologue)
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-5)
    assert np.abs(np.asarray(lifted, np.int32) - expected_lifted).max() <= 1

    mapped = jax.shard_map(
        lambda x, w, p: sj.linear(x, w, reduce_axis=k, prologue=p), mesh=mesh,
        in_specs=(P(rows, k), w.partition_spec(k=k), specs(prologue, rows, k)),
        out_specs=P(rows, None),
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(mapped)(*placed), expected, rtol=1e-4, atol=2e-2)
    if jax.tree.leaves(prologue):
        loss = lambda fn: lambda p: (fn(placed[0], placed[1], p) ** 2).sum()  # noqa: E731
        got, reference = jax.jit(jax.grad(loss(mapped)))(placed[2]), jax.grad(loss(op))(prologue)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * float(jnp.abs(b).max()))


def test_lowers_for_cuda_and_is_explained():
    x, w = random(0, (64, COLUMNS), jnp.bfloat16), weight()
    prologue = sj.GLU(x)
    lowered = (
        jax.jit(lambda x, p: sj.linear(x, w, prologue=p, implementation="hopper"))
        .trace(x, prologue)
        .lower(lowering_platforms=("cuda",))
    )
    assert "slidejax_linear_hopper" in lowered.as_text() and 'prologue = "glu"' in lowered.as_text()
    [(problem, choice)] = sj.explain(
        lambda x, p: sj.linear(x, w, prologue=p), x, prologue, platform="cpu"
    )
    assert (problem.rows, problem.in_features, choice.implementation) == (64, COLUMNS, "dense")


def test_inside_a_wrapped_weight():
    x, w = random(0, (4, COLUMNS)), masters(weight())
    prologue = sj.RMSNorm(random(1, COLUMNS))
    np.testing.assert_allclose(
        sj.linear(x, w, prologue=prologue), sj.linear(prologue.apply(x), w), rtol=1e-6
    )


def test_bad_arguments():
    x, w = random(0, (2, COLUMNS)), weight()
    for error, message, prologue in (
        (TypeError, "prologue must be", lambda: "silu"),
        (ValueError, "activation must be one of silu", lambda: sj.Activation("swish")),
        (ValueError, "activation must be one of silu", lambda: sj.GLU(x, "mish")),
        (ValueError, "eps must be", lambda: sj.RMSNorm(x[0], eps=-1.0)),
        (ValueError, "RMSNorm: weight must have shape \\(128,\\)", lambda: sj.RMSNorm(x)),
        (ValueError, "LayerNorm: bias must have shape", lambda: sj.LayerNorm(x[0], x[0, :3])),
        (
            ValueError,
            "LayerNorm: weight must be floating",
            lambda: sj.LayerNorm(jnp.ones(COLUMNS, jnp.int32)),
        ),
        (ValueError, "GLU: up must have shape \\(2, 128\\)", lambda: sj.GLU(x[:1])),
        (ValueError, "GLU: up must have x's dtype", lambda: sj.GLU(x.astype(jnp.bfloat16))),
    ):
        with pytest.raises(error, match=message):
            sj.linear(x, w, prologue=prologue())
        with pytest.raises(error, match=message):
            sj.lift_quantize(x, "6:8", prologue=prologue())


# --- a gate and up side by side -------------------------------------------------------------------


def halves(x, up):
    return jnp.concatenate([x, up], -1)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_a_gate_and_up_side_by_side_are_those_apart(dtype):
    x, up = random(0, (3, 2, 40), jnp.bfloat16), random(1, (3, 2, 40), jnp.bfloat16)
    both = halves(x, up)
    apart, together = sj.GLU(up, "gelu_tanh"), sj.GLU(activation="gelu_tanh")
    w = sj.pack(random(2, (40, 24), jnp.float32), "6:8", dtype=dtype)
    residual = random(3, (3, 2, 24), jnp.bfloat16)
    for found, want in (
        (
            sj.linear(both, w, prologue=together, residual=residual),
            sj.linear(x, w, prologue=apart, residual=residual),
        ),
        (
            sj.lift_quantize(both, "6:8", "int8", prologue=together)[0],
            sj.lift_quantize(x, "6:8", "int8", prologue=apart)[0],
        ),
        (
            jax.vmap(lambda x: sj.linear(x, w, prologue=together))(both),
            jax.vmap(lambda x, up: sj.linear(x, w, prologue=sj.GLU(up, "gelu_tanh")))(x, up),
        ),
    ):
        np.testing.assert_array_equal(np.asarray(found, "float32"), np.asarray(want, "float32"))


def test_the_derivative_of_both_halves():
    x, up = random(0, (4, 64), jnp.float32), random(1, (4, 64), jnp.float32)
    w = sj.pack(random(2, (64, 24), jnp.float32), "6:8")

    def together(both, w):
        return (sj.linear(both, w, prologue=sj.GLU()) ** 2).sum()

    def apart(x, up, w):
        return (sj.linear(x, w, prologue=sj.GLU(up)) ** 2).sum()

    d_both, d_w = jax.grad(together, (0, 1), allow_int=True)(halves(x, up), w)
    d_x, d_up, want_w = jax.grad(apart, (0, 1, 2), allow_int=True)(x, up, w)
    np.testing.assert_allclose(d_both, halves(d_x, d_up), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_w.values, want_w.values, rtol=1e-5, atol=1e-5)


def test_both_halves_on_a_mesh():
    """Rows and outputs are cut; K of the weight is gathered, because the halves are not."""
    mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("m", "o"))
    x, up = random(0, (8, 128), jnp.float32), random(1, (8, 128), jnp.float32)
    w = sj.pack(random(2, (128, 32), jnp.float32), "6:8", dtype="int8")
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    run = jax.jit(lambda both, w: sj.linear(both, w, prologue=sj.GLU()))
    want = sj.linear(x, w, prologue=sj.GLU(up))
    for spec, cut in ((("m",), {"out": "o"}), ((None, "o"), {}), (("m",), {"k": "o"})):
        placed = jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)),
            w,
            w.partition_spec(**cut),
        )
        np.testing.assert_array_equal(run(put(halves(x, up), *spec), placed), want)


def test_both_halves_lower_to_the_lift_without_a_copy():
    x = jnp.ones((512, 2 * 448), jnp.bfloat16)
    w = sj.pack(jnp.ones((448, 64)), "6:8", dtype="int8")
    run = jax.jit(lambda x, w: sj.linear(x, w, prologue=sj.GLU(), implementation="hopper"))
    text = run.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "slidejax_linear_hopper" in text or "slidejax_lift_quantize_fused" in text
    assert "stablehlo.slice" not in text and "logistic" not in text


def test_halves_that_do_not_fit_are_refused():
    w = sj.pack(jnp.ones((40, 24)), "6:8", dtype="int8")
    with pytest.raises(ValueError, match=re.escape("x must be [..., 80]")):
        sj.linear(jnp.ones((2, 40)), w, prologue=sj.GLU())
    with pytest.raises(ValueError, match="two halves"):
        sj.lift_quantize(jnp.ones((2, 41)), "6:8", prologue=sj.GLU())
    with pytest.raises(ValueError, match="reduce_axis splits the columns"):
        jax.vmap(lambda x: sj.linear(x, w, prologue=sj.GLU(), reduce_axis="k"), axis_name="k")(
            jnp.ones((1, 2, 80))
        )

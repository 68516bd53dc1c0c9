"""The Hopper implementation through JAX: on a GPU against the reference, and the lowered programs
where there is no GPU."""

import cuda_formulas as formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.ops.implementations import hopper
from slidejax.ops.implementations.hopper import HOPPER, HopperWeight

DTYPES = (jnp.int8, jnp.float8_e4m3fn)


def problem(rows, columns, out, pattern="6:8", dtype=jnp.int8, seed=0):
    rng = np.random.default_rng(seed)
    w = sj.pack(jnp.asarray(rng.standard_normal((columns, out)), jnp.float32), pattern, dtype=dtype)
    lifted, scale = sj.lift_quantize(
        jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32), pattern, dtype
    )
    return lifted, scale, w, jnp.asarray(rng.standard_normal(out), jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "6:8", "14:16"])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16, jnp.float32, None])
@pytest.mark.parametrize(
    ("rows", "columns", "out"), [(1, 96, 7), (77, 600, 520), (300, 3584, 1000)]
)
def test_int8_equals_the_formulas_bit_for_bit(on_hopper, rows, columns, out, pattern, out_dtype):
    lifted, scale, w, bias = problem(rows, columns, out, pattern)
    got = jax.jit(HOPPER.matmul, static_argnums=4)(lifted, scale, w, bias, out_dtype)
    acc = formulas.accumulate(
        np.asarray(lifted), formulas.lifted_weight(np.asarray(w.values), np.asarray(w.zeros))
    )
    want = (
        acc
        if out_dtype is None
        else formulas.finish(acc, np.asarray(scale)[:, 0], np.asarray(w.scale), bias)
    )
    np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want.astype(got.dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 77, 1500])
def test_e4m3_is_as_exact_as_its_sums(on_hopper, rows):
    lifted, scale, w, _ = problem(rows, 3584, 1000, dtype=jnp.float8_e4m3fn)
    got = np.asarray(
        jax.jit(HOPPER.matmul, static_argnums=4)(lifted, scale, w, None, None), np.float64
    )
    want = formulas.accumulate(
        np.asarray(lifted), formulas.lifted_weight(np.asarray(w.values), np.asarray(w.zeros))
    )
    # The tensor cores keep 13 bits of each step's sum.
    assert np.linalg.norm(got - want) <= 2e-3 * np.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    ("rows", "columns", "out"),
    [
        (1, 96, 7),
        (16, 4096, 4096),
        (16, 14336, 4096),
        (64, 14336, 4096),
        (77, 600, 520),
        (256, 3584, 1000),
    ],
)
def test_a_residual_is_added_before_the_one_rounding(
    on_hopper, rows, columns, out, out_dtype, residual
):
    lifted, scale, w, bias = problem(rows, columns, out)
    r = jax.random.normal(jax.random.key(5), (rows, out)).astype(residual)
    got = jax.jit(HOPPER.matmul, static_argnums=(4, 5))(
        lifted, scale, w, bias, out_dtype, "cuda", r
    )
    acc = formulas.accumulate(
        np.asarray(lifted), formulas.lifted_weight(np.asarray(w.values), np.asarray(w.zeros))
    )
    want = formulas.finish(acc, np.asarray(scale)[:, 0], np.asarray(w.scale), bias)
    want = want + np.asarray(r, np.float32)
    np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want.astype(got.dtype)))


# --- the lift and the product in one call ---------------------------------------------------------


def in_one_call(x, prologue, w, bias, out_dtype):
    return hopper.linear_call(
        x, prologue, HopperWeight.packed(w), bias, w.lifted_columns, out_dtype
    )


def in_two_calls(x, w, bias, out_dtype, prologue):
    lifted, scale = sj.lift_quantize(x, w.pattern, w.dtype, prologue=prologue)
    return sj.sparse_matmul(lifted, scale, w, bias, out_dtype=out_dtype, implementation="hopper")


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "out"),
    [
        (1, 576, 1536),
        (16, 3584, 4608),
        (5, 18944, 3584),
        (64, 1000, 520),
        (256, 3584, 4608),
        (300, 4096, 37888),
        (512, 18944, 3584),
        (1500, 600, 7),
    ],
)
def test_one_call_equals_two(on_hopper, rows, columns, out, dtype, prepared):
    """Several times, with other weights in between: a kernel that begins before the lift has ended
    may use nothing that the lift writes."""
    ws = [
        sj.pack(jax.random.normal(jax.random.key(i), (columns, out)), "6:8", dtype=dtype)
        for i in range(2)
    ]
    ws = [sj.prepare(w, "hopper") for w in ws] if prepared else ws
    xs = [jax.random.normal(jax.random.key(9 + i), (rows, columns), jnp.bfloat16) for i in range(2)]
    bias = jax.random.normal(jax.random.key(2), (out,))
    two = jax.jit(in_two_calls, static_argnums=(3, 4))
    want = [[two(x, w, bias, jnp.bfloat16, None) for w in ws] for x in xs]

    @jax.jit
    def often(xs, ws):
        return [
            [in_one_call(x * 1, None, w, bias, jnp.bfloat16) for w in ws]
            for x in xs
            for _ in range(3)
        ]

    for _ in range(4):
        got = often(xs, ws)
        for i, row in enumerate(got):
            for y, expected in zip(row, want[i // 3], strict=True):
                np.testing.assert_array_equal(formulas.bits(y), formulas.bits(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "4:6", "8:10", "14:16"])
@pytest.mark.parametrize("kind", ["rms", "layer", "gelu", "glu"])
@pytest.mark.parametrize("rows", [3, 700])
def test_one_call_with_a_prologue_equals_two(on_hopper, rows, kind, pattern):
    x, up = (jax.random.normal(jax.random.key(i), (rows, 1136), jnp.bfloat16) for i in range(2))
    scale = jax.random.normal(jax.random.key(2), (1136,))
    prologue = {
        "rms": lambda: sj.RMSNorm(scale, 1e-6), "layer": lambda: sj.LayerNorm(scale, None, 1e-6), "gelu": lambda: sj.Activation("gelu"),
        "glu": lambda: sj.GLU(up, "silu"),
    }[kind]()  # fmt: skip
    w = sj.pack(jax.random.normal(jax.random.key(3), (1136, 328)), pattern, dtype="int8")
    two = jax.jit(lambda x, w, prologue: in_two_calls(x, w, None, jnp.float32, prologue))(
        x, w, prologue
    )
    one = jax.jit(lambda x, w, prologue: in_one_call(x, prologue, w, None, jnp.float32))(
        x, w, prologue
    )
    np.testing.assert_array_equal(formulas.bits(one), formulas.bits(two))


def assert_equals_the_reference(rows, columns, out, implementation):
    w = sj.prepare(
        sj.pack(jax.random.normal(jax.random.key(0), (columns, out)), "6:8", dtype="int8"),
        implementation,
    )
    x = jax.random.normal(jax.random.key(1), (rows, columns), jnp.bfloat16)
    got = jax.jit(
        lambda x, w: sj.linear(x, w, implementation=implementation, out_dtype=jnp.float32)
    )(x, w)
    want = jax.jit(lambda x, w: sj.linear(x, w, implementation="reference", out_dtype=jnp.float32))(
        x, w
    )
    np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 40, 128, 256, 512])
@pytest.mark.parametrize(
    ("columns", "out"), [(3584, 3584), (18944, 3584), (3584, 4608), (1536, 576)]
)
def test_int8_equals_the_reference_for_few_rows(on_hopper, rows, columns, out):
    """The shapes for which CTA groups of a cluster divide K."""
    assert_equals_the_reference(rows, columns, out, "hopper")


# --- 2x2 clusters, which share the weights, and CTA pairs beside them -----------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "columns", "out"),
    [(1024, 3584, 9216), (4096, 18944, 3584), (2500, 1000, 5003), (6000, 3584, 3584)],
)
@pytest.mark.parametrize("dense", [False, True], ids=["6:8", "dense"])
def test_int8_equals_the_reference_for_many_rows(on_hopper, rows, columns, out, dense):
    """Whole tiles, and tiles cut along K."""
    assert_equals_the_reference(
        rows, columns // 32 * 32 if dense else columns, out, "dense" if dense else "hopper"
    )


@pytest.mark.gpu
def test_what_follows_waits_for_both_launches(on_hopper):
    """Each product reads what both launches of the product before it have written, and overwrites
    what that product has read."""
    w = sj.prepare(
        sj.pack(jax.random.normal(jax.random.key(0), (3584, 3584)), "6:8", dtype="int8"), "hopper"
    )
    x = jax.random.normal(jax.random.key(1), (4096, 3584), jnp.bfloat16)

    def chain(implementation):
        def step(x, _):
            y = sj.linear(x, w, implementation=implementation, out_dtype=jnp.bfloat16)
            return y / 64, None

        return jax.jit(lambda x: jax.lax.scan(step, x, None, length=20)[0])

    run = chain("hopper")
    want = chain("reference")(x)
    for _ in range(5):
        np.testing.assert_array_equal(formulas.bits(run(x)), formulas.bits(want))


# --- dense weights --------------------------------------------------------------------------------


def dense_linear(x, w, bias=None):
    return sj.linear(x, w, bias, implementation="dense")


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "out"), [(1, 96, 7), (77, 592, 520), (300, 3584, 1000), (1000, 18944, 136)]
)
def test_dense_int8_equals_the_formulas_bit_for_bit(on_hopper, rows, columns, out, bias, out_dtype):
    rng = np.random.default_rng(rows)
    codes, kernel = (rng.integers(-127, 128, (n, columns)).astype(np.int8) for n in (rows, out))
    scale_x, scale_w, b = (rng.random(n).astype(np.float32) for n in (rows, out, out))
    b = jnp.asarray(b) if bias else None

    @jax.jit
    def product(codes, scale_x, kernel, scale_w, bias):
        weight = HopperWeight.dense(kernel, scale_w)
        return hopper.matmul_call(codes, scale_x, weight, bias, out_dtype)

    got = product(codes, jnp.asarray(scale_x), kernel, jnp.asarray(scale_w), b)
    want = formulas.finish(formulas.accumulate(codes, kernel), scale_x, scale_w, b)
    np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want.astype(got.dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("pattern", "prepared"), [("8:10", False), ("8:10", True), ("dense", False)]
)
def test_dense_linear_is_close_to_the_reference(on_hopper, dtype, pattern, prepared):
    x = jax.random.normal(jax.random.key(0), (130, 720), jnp.bfloat16)
    w = sj.pack(jax.random.normal(jax.random.key(1), (720, 264)), pattern, dtype=dtype)
    bias = jax.random.normal(jax.random.key(2), (264,))
    want = sj.linear(x, w, bias, implementation="reference", out_dtype=jnp.float32)
    got = jax.jit(dense_linear)(x, sj.prepare(w, "dense") if prepared else w, bias)
    assert jnp.linalg.norm(got.astype(jnp.float32) - want) <= 4e-3 * jnp.linalg.norm(want)

"""The decode implementation through JAX: on a GPU against the formulas, and as it is lowered."""

import cuda_formulas as formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patterns import PATTERNS

import slidejax as sj
from slidejax.ops import registry
from slidejax.ops.implementations.decode import DECODE

ROWS, WIDE_ROWS = 8, 16  # the most of values of 8 and of 16 bits
FLOATS = [jnp.bfloat16, jnp.float16, jnp.float32]
# The largest error of a float32 sum, as a part of the sum of the magnitudes.
SUM_ERROR = 1e-6


def problem(rows, columns, out, pattern="6:8", dtype=jnp.int8, x_dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.standard_normal((columns, out)), jnp.float32)
    w = sj.pack(kernel, pattern, dtype=dtype)
    x = jnp.asarray(formulas.values(rows, columns, np.float32, seed)).astype(x_dtype)
    return x, w, jnp.asarray(rng.standard_normal(out), jnp.float32)


def residual_of(x, out, dtype, seed=0):
    """A residual for the rows of x, of very different sizes."""
    return jnp.asarray(formulas.values(x.shape[0], out, np.float32, seed + 1)).astype(dtype)


def expected(x, w, bias, out_dtype, residual=None):
    """docs/contract.md's formulas, in float32 before the last rounding."""
    return formulas.linear(x, w, bias, jnp.dtype(out_dtype), residual)


def assert_within_rounding(y, x, w, bias, out_dtype, residual=None):
    """y is as near the float64 sum of 16-bit values' products as the contract says."""
    codes, weight, scale = formulas.operands(x, w)
    assert (scale == 1).all()
    exact = formulas.accumulate(codes, weight)
    magnitude = formulas.accumulate(np.abs(codes), np.abs(weight))
    for term in (bias, residual):
        if term is not None:
            term = np.asarray(term, np.float64)
            exact, magnitude = exact + term, magnitude + np.abs(term)
    rounding = float(jnp.finfo(out_dtype).eps) / 2
    bound = SUM_ERROR * magnitude + rounding * np.abs(exact) + float(jnp.finfo(out_dtype).tiny)
    over = np.abs(np.asarray(y, np.float64) - exact) / bound
    assert over.max() <= 1, (over.max(), np.unravel_index(over.argmax(), over.shape))


def run(x, w, bias=None, residual=None, **options):
    def linear(x, w, bias, residual):
        return sj.linear(x, w, bias, implementation="decode", residual=residual, **options)

    return jax.jit(linear)(x, w, bias, residual)


# --- lowering -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("residual_dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("pattern", ["6:8", "dense"])
def test_one_call_from_x_to_y(pattern, residual_dtype, dtype):
    x, w, bias = problem(3, 600, 24, pattern, dtype)
    residual = None if residual_dtype is None else residual_of(x, 24, residual_dtype)
    traced = jax.jit(
        lambda x, w, bias, residual: sj.linear(
            x, w, bias, implementation="decode", residual=residual
        )
    ).trace(x, w, bias, residual)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @slidejax" in line]
    assert len(calls) == 1 and "slidejax_linear_decode" in calls[0]
    operands, results = calls[0].rsplit("->", 1)
    assert "tensor<3x24xbf16>" in results
    # The residual goes in as it is, and XLA adds nothing.
    found = {
        None: "tensor<0xf32>)",
        "bfloat16": "tensor<3x24xbf16>)",
        "float32": "tensor<3x24xf32>)",
    }
    assert operands.rstrip().endswith(found[residual_dtype])
    assert "stablehlo.add" not in text


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
def test_an_unprepared_weight_runs_it_without_any_measurement(monkeypatch, tmp_path, dtype):
    """A weight as pack makes it is never unpacked in the loop of a GPU program."""
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr("slidejax.ops.problem.device_kind", lambda platform: "NVIDIA A100")
    monkeypatch.setattr("slidejax.ops.choice.device_kind", lambda platform: "NVIDIA A100")
    x, w, _ = problem(1, 600, 24, dtype=dtype)
    [(_, choice)] = sj.explain(sj.linear, x, w, platform="cuda")
    assert choice.implementation == "decode" and "estimated for" in choice.reason


@pytest.mark.parametrize(
    ("rows", "dtype", "reason"),
    [
        (ROWS + 1, jnp.int8, "at most 8 rows of int8 with 20000 inputs, not 9"),
        (WIDE_ROWS + 1, jnp.bfloat16, "at most 16 rows, not 17"),
        (1, jnp.float32, "must be int8, float8_e4m3fn, bfloat16 or float16, not float32"),
        (3, jnp.float8_e4m3fn, "run in the Hopper kernel"),  # lowered for an H100
    ],
)
def test_refusals_say_why(rows, dtype, reason):
    x, w, _ = problem(rows, 20_000, 24, dtype=dtype)
    traced = jax.jit(lambda x, w: sj.linear(x, w, implementation="decode")).trace(x, w)
    with pytest.raises(NotImplementedError, match=reason):
        traced.lower(lowering_platforms=("cuda",))


def test_it_refuses_products_of_lifted_rows():
    x, w, _ = problem(1, 600, 24)
    lifted, scale = sj.lift_quantize(x, w.pattern, w.dtype)
    traced = jax.jit(lambda a, s, w: sj.sparse_matmul(a, s, w, implementation="decode")).trace(
        lifted, scale, w
    )
    with pytest.raises(NotImplementedError, match="linear alone"):
        traced.lower(lowering_platforms=("cuda",))


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_gpu():
    if reason := DECODE.available():
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "columns", "out"),
    [
        *((1, 4096, 520), (2, 600, 16), (3, 1999, 33), (4, 256, 5000), (5, 129, 7)),
        *((8, 3584, 1000), (9, 129, 7), (11, 1536, 576), (16, 1280, 5000)),
    ],
)
def test_int8_equals_the_formulas_bit_for_bit(on_gpu, rows, columns, out, x_dtype, pattern):
    x, w, bias = problem(rows, columns, out, pattern, x_dtype=x_dtype)
    for out_dtype in (jnp.bfloat16, jnp.float32):
        got = run(x, w, bias, out_dtype=out_dtype)
        want = expected(x, w, bias, out_dtype)
        np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("dtype", "x_dtype", "out_dtype"),
    [
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float16),
        (jnp.float16, jnp.float16, jnp.float16),
        (jnp.float16, jnp.bfloat16, jnp.float32),
    ],
)
@pytest.mark.parametrize(
    ("rows", "columns", "out"),
    [(1, 4096, 520), (2, 600, 16), (3, 1999, 33), (4, 256, 5000), (5, 129, 7), (8, 3584, 1000)],
)
def test_16_bit_values_are_within_rounding(
    on_gpu, rows, columns, out, dtype, x_dtype, out_dtype, pattern
):
    x, w, bias = problem(rows, columns, out, pattern, dtype, x_dtype)
    y = run(x, w, bias, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert_within_rounding(y, x, w, bias, out_dtype)


@pytest.mark.gpu
@given(
    rows=st.integers(1, WIDE_ROWS),
    columns=st.integers(1, 3000),
    out=st.integers(1, 700),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16]),
    x_dtype=st.sampled_from([jnp.bfloat16, jnp.float16, jnp.float32]),
    seed=st.integers(0, 99),
)
def test_any_shape_of_16_bit_values(on_gpu, rows, columns, out, pattern, dtype, x_dtype, seed):
    x, w, bias = problem(rows, columns, out, pattern, dtype, x_dtype, seed)
    residual = residual_of(x, out, x_dtype, seed)
    y = run(x, w, bias, residual, out_dtype=jnp.float32)
    assert_within_rounding(y, x, w, bias, jnp.float32, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["dense", "4:6", "6:8", "14:16"])
def test_whole_numbers_are_exact_in_16_bits(on_gpu, pattern):
    """Float32 sums of small whole numbers have no error, so a wrong product shows by its bits."""
    x, w, _ = problem(4, 3000, 700, pattern, jnp.bfloat16)
    x = jnp.round(x * 4 / jnp.abs(x).max(1, keepdims=True))
    w = w.replace(values=jnp.round(2 * w.values))
    codes, weight, _ = formulas.operands(x, w)
    want = formulas.accumulate(codes, weight)
    np.testing.assert_array_equal(np.asarray(run(x, w, out_dtype=jnp.float32)), want)


@pytest.mark.gpu
@given(
    rows=st.integers(1, 2 * ROWS),
    columns=st.integers(1, 3000),
    out=st.integers(1, 700),
    pattern=st.sampled_from(PATTERNS),
    x_dtype=st.sampled_from(FLOATS),
    residual_dtype=st.sampled_from([None, *FLOATS]),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_with_and_without_residual(
    on_gpu, rows, columns, out, pattern, x_dtype, residual_dtype, has_bias, seed
):
    columns = columns if rows <= ROWS else min(columns, 1280)  # more are refused
    x, w, bias = problem(rows, columns, out, pattern, x_dtype=x_dtype, seed=seed)
    bias = bias if has_bias else None
    residual = None if residual_dtype is None else residual_of(x, out, residual_dtype, seed)
    got, want = run(x, w, bias, residual), expected(x, w, bias, x_dtype, residual)
    np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("residual_dtype", FLOATS)
@pytest.mark.parametrize(("rows", "columns", "out"), [(1, 4096, 520), (8, 600, 1000)])
def test_a_residual_of_every_dtype(on_gpu, rows, columns, out, residual_dtype, out_dtype):
    x, w, bias = problem(rows, columns, out)
    residual = residual_of(x, out, residual_dtype)
    for given_bias in (None, bias):
        got = run(x, w, given_bias, residual, out_dtype=out_dtype)
        want = expected(x, w, given_bias, out_dtype, residual)
        np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("rows", "columns", "out"), [(8, 18944, 100), (8, 177_000, 24)])
def test_a_residual_is_added_once_where_the_call_is_cut(on_gpu, rows, columns, out, dtype):
    """K in slices, up to the longest rows whose int8 sums fit."""
    x, w, bias = problem(rows, columns, out)
    residual = residual_of(x, out, dtype)
    want = expected(x, w, bias, x.dtype, residual)
    np.testing.assert_array_equal(formulas.bits(run(x, w, bias, residual)), formulas.bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["decode", "hopper", "cusparselt", "dense"])
def test_a_residual_is_added_by_every_implementation(on_gpu, implementation):
    """The stream of a transformer: x itself is the residual, and donated."""
    if reason := registry.get(implementation).available():
        pytest.skip(reason)
    x, w, bias = problem(8, 512, 512)
    want = expected(x, w, bias, x.dtype, x)
    if implementation == "cusparselt":  # the contract lets it round to bfloat16 twice
        codes, weight, scale = formulas.operands(x, w)
        acc = formulas.accumulate(codes, weight)
        want = formulas.twice_rounded(acc, scale, np.asarray(w.scale), bias, x)
    layer = jax.jit(
        lambda x: sj.linear(x, w, bias, implementation=implementation, residual=x),
        donate_argnums=0,
    )
    np.testing.assert_array_equal(formulas.bits(layer(x + 0)), formulas.bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(1, 18944), (8, 18944), (1, 65536), (7, 40000)])
def test_long_rows(on_gpu, rows, columns):
    """Rows beyond the registers, and K in slices where the codes do not fit in shared memory."""
    x, w, _ = problem(rows, columns, 100)
    want = expected(x, w, None, jnp.bfloat16)
    np.testing.assert_array_equal(formulas.bits(run(x, w)), formulas.bits(want))
    for pattern in ("6:8", "14:16"):
        x, w, _ = problem(rows, columns, 100, pattern, jnp.bfloat16)
        assert_within_rounding(run(x, w), x, w, None, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "out"), [(2, 300_001), (1, 271_000), (8, 271_000)])
def test_many_outputs(on_gpu, rows, out):
    """Some thread blocks have one tile more than others, which may then not keep its scales."""
    x, w, bias = problem(rows, 64, out)
    for residual in (None, residual_of(x, out, jnp.float32)):
        want = expected(x, w, bias, jnp.bfloat16, residual)
        got = run(x, w, bias, residual)
        np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 8])  # the kernel's own rows, and rows converted ahead
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16, jnp.float16])
def test_rows_with_inf_or_nan_are_nan_and_no_others(on_gpu, dtype, rows):
    x, w, _ = problem(8, 600, 40, dtype=dtype)
    x = x.at[1, 5].set(jnp.nan).at[3, 599].set(jnp.inf).at[6].set(0)
    first = 3 if rows == 4 else 0
    got = np.asarray(run(x[first : first + rows], w), np.float32)
    bad = np.isnan(got).all(1)
    assert bad.tolist() == [first + row in (1, 3) for row in range(rows)]
    assert np.isfinite(got[~bad]).all() and (got[6 - first] == 0).all()


@pytest.mark.gpu
def test_in_scan_vmap_grad_and_with_a_prologue(on_gpu):
    x, w, bias = problem(4, 512, 512)
    assert sj.linear(x, w, bias, implementation="decode").shape == (4, 512)

    def linear(x, implementation="decode", **options):
        return sj.linear(x, w, bias, implementation=implementation, **options)

    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
    step = lambda x, w: (sj.linear(x, w, implementation="decode"), None)  # noqa: E731
    twice = jax.jit(lambda x: jax.lax.scan(step, x, stacked)[0])(x)
    once = sj.linear(sj.linear(x, w, implementation="hopper"), w, implementation="hopper")
    np.testing.assert_array_equal(formulas.bits(twice), formulas.bits(once))
    mapped = jax.vmap(linear)(x[:, None])[:, 0]
    np.testing.assert_array_equal(formulas.bits(mapped), formulas.bits(linear(x)))
    for d, e in zip(
        jax.grad(lambda x: linear(x).astype(jnp.float32).sum())(x),
        jax.grad(lambda x: linear(x, "hopper").astype(jnp.float32).sum())(x),
        strict=True,
    ):
        np.testing.assert_array_equal(formulas.bits(d), formulas.bits(e))
    prologue = sj.GLU(x[:, ::-1], "silu")
    np.testing.assert_array_equal(
        formulas.bits(jax.jit(lambda x: linear(x, prologue=prologue))(x)),
        formulas.bits(jax.jit(lambda x: linear(prologue.apply(x)))(x)),
    )

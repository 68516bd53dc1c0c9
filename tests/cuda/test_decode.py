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
from slidejax.ops.implementations import decode
from slidejax.ops.implementations.decode import DECODE

ROWS = decode.MAX_ROWS


def problem(rows, columns, out, pattern="6:8", dtype=jnp.int8, x_dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.standard_normal((columns, out)), jnp.float32)
    w = sj.pack(kernel, pattern, dtype=dtype)
    x = jnp.asarray(formulas.values(rows, columns, np.float32, seed)).astype(x_dtype)
    return x, w, jnp.asarray(rng.standard_normal(out), jnp.float32)


def expected(x, w, bias, out_dtype):
    """docs/design.md's formulas, in float32 before the last rounding."""
    codes, scale = formulas.quantize(np.asarray(x), np.asarray(w.values).dtype)
    if w.pattern.prunes:
        weight = formulas.lifted_weight(np.asarray(w.values), np.asarray(w.zeros))
        codes = formulas.lift(codes, w.pattern.group)
    else:
        weight = np.asarray(w.values).reshape(w.out_features, -1)
        codes = np.pad(codes, ((0, 0), (0, weight.shape[1] - codes.shape[1])))
    acc = formulas.accumulate(codes, weight)
    return formulas.finish(acc, scale, np.asarray(w.scale), bias).astype(jnp.dtype(out_dtype))


def run(x, w, bias=None, **options):
    return jax.jit(lambda x, w, bias: sj.linear(x, w, bias, implementation="decode", **options))(
        x, w, bias
    )


# --- lowering -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["6:8", "dense"])
def test_one_call_from_x_to_y(pattern):
    x, w, bias = problem(3, 600, 24, pattern)
    traced = jax.jit(lambda x, w, bias: sj.linear(x, w, bias, implementation="decode")).trace(
        x, w, bias
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @slidejax" in line]
    assert len(calls) == 1 and "slidejax_linear_decode" in calls[0]
    assert "tensor<3x24xbf16>" in calls[0].rsplit("->", 1)[1]


def test_an_unprepared_weight_runs_it_without_any_measurement(monkeypatch, tmp_path):
    """A weight as pack makes it is never unpacked in the loop of a GPU program."""
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr("slidejax.ops.problem.device_kind", lambda platform: "NVIDIA A100")
    monkeypatch.setattr("slidejax.ops.choice.device_kind", lambda platform: "NVIDIA A100")
    x, w, _ = problem(1, 600, 24)
    [(_, choice)] = sj.explain(sj.linear, x, w, platform="cuda")
    assert choice.implementation == "decode" and "reads the weight as it is" in choice.reason


@pytest.mark.parametrize(
    ("rows", "dtype", "reason"),
    [
        (ROWS + 1, jnp.int8, f"at most {ROWS} rows, not {ROWS + 1}"),
        (1, jnp.bfloat16, "must be int8 or float8_e4m3fn, not bfloat16"),
        (1, jnp.float8_e4m3fn, "runs in the Hopper kernel"),  # lowered for an H100
    ],
)
def test_refusals_say_why(rows, dtype, reason):
    x, w, _ = problem(rows, 600, 24, dtype=dtype)
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
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    ("rows", "columns", "out"),
    [(1, 4096, 520), (2, 600, 16), (3, 1999, 33), (4, 256, 5000), (5, 129, 7), (8, 3584, 1000)],
)
def test_int8_equals_the_formulas_bit_for_bit(on_gpu, rows, columns, out, x_dtype, pattern):
    x, w, bias = problem(rows, columns, out, pattern, x_dtype=x_dtype)
    for out_dtype in (jnp.bfloat16, jnp.float32):
        got = run(x, w, bias, out_dtype=out_dtype)
        want = expected(x, w, bias, out_dtype)
        np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))


@pytest.mark.gpu
@given(
    rows=st.integers(1, ROWS),
    columns=st.integers(1, 3000),
    out=st.integers(1, 700),
    pattern=st.sampled_from(PATTERNS),
    x_dtype=st.sampled_from([jnp.bfloat16, jnp.float16, jnp.float32]),
    seed=st.integers(0, 99),
)
def test_any_shape(on_gpu, rows, columns, out, pattern, x_dtype, seed):
    x, w, bias = problem(rows, columns, out, pattern, x_dtype=x_dtype, seed=seed)
    got = run(x, w, bias)
    np.testing.assert_array_equal(formulas.bits(got), formulas.bits(expected(x, w, bias, x_dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(1, 18944), (8, 18944), (1, 65536), (7, 40000)])
def test_long_rows(on_gpu, rows, columns):
    """Rows beyond the registers, and K in slices where the codes do not fit in shared memory."""
    x, w, _ = problem(rows, columns, 100)
    want = expected(x, w, None, jnp.bfloat16)
    np.testing.assert_array_equal(formulas.bits(run(x, w)), formulas.bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "out"), [(2, 300_001), (1, 271_000), (8, 271_000)])
def test_many_outputs(on_gpu, rows, out):
    """Some thread blocks have one tile more than others, which may then not keep its scales."""
    x, w, bias = problem(rows, 64, out)
    want = expected(x, w, bias, jnp.bfloat16)
    np.testing.assert_array_equal(formulas.bits(run(x, w, bias)), formulas.bits(want))


@pytest.mark.gpu
def test_rows_with_inf_or_nan_are_nan_and_no_others(on_gpu):
    x, w, _ = problem(8, 600, 40)
    x = x.at[1, 5].set(jnp.nan).at[3, 599].set(jnp.inf).at[6].set(0)
    got = np.asarray(run(x, w), np.float32)
    bad = np.isnan(got).all(1)
    assert bad.tolist() == [False, True, False, True, False, False, False, False]
    assert np.isfinite(got[~bad]).all() and (got[6] == 0).all()


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

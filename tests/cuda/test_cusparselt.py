"""The cuSPARSELt products against exact sums over the packed form."""

import cuda_formulas as formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.ops.cuda import calls
from slidejax.ops.implementations import cusparselt
from slidejax.ops.implementations.cusparselt import CUSPARSELT

pytestmark = pytest.mark.gpu

DTYPES = (jnp.int8, jnp.float8_e4m3fn, jnp.bfloat16, jnp.float16)
ids = lambda d: np.dtype(d).name  # noqa: E731


@pytest.fixture(autouse=True)
def _library():
    if reason := CUSPARSELT.available():
        pytest.skip(reason)


def problem(rows, columns, out, pattern="6:8", dtype=jnp.int8, seed=0):
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.standard_normal((columns, out)), jnp.float32)
    w = sj.pack(
        kernel if np.dtype(dtype).itemsize == 1 else kernel.astype(dtype), pattern, dtype=dtype
    )
    x = jnp.asarray(
        rng.standard_normal((rows, columns)) * 3,
        jnp.bfloat16 if dtype != jnp.float16 else jnp.float16,
    )
    group = w.pattern.group
    lifted, scale = calls.lift_quantize_call(
        x,
        jnp.zeros(0, jnp.float32),
        group=group,
        lifted_columns=w.pattern.lifted(columns),
        dtype=w.dtype,
    )
    return lifted, scale[:, None], w, jnp.asarray(rng.standard_normal(out), jnp.float32)


def expected(lifted, scale, w, bias=None):
    weight = formulas.lifted_weight(np.asarray(w.values), np.asarray(w.zeros))
    acc = formulas.accumulate(np.asarray(lifted), weight)
    return acc, formulas.finish(acc, np.asarray(scale)[:, 0], np.asarray(w.scale), bias)


def check(y, want, dtype):
    """Allows for one rounding of the result (for two with 16-bit operands, whose accumulators the
    library rounds), and for the error of the sums: the tensor cores of some GPUs keep about 14 bits
    of a float8 sum."""
    y, want = np.asarray(y).astype(np.float64), want.astype(np.float64)
    step = {1: 1, 2: 2}[np.dtype(dtype).itemsize] * float(jnp.finfo(jnp.bfloat16).eps)
    sums = 3e-3 if np.dtype(dtype) == jnp.float8_e4m3fn else 2e-4
    np.testing.assert_allclose(y, want, rtol=step, atol=sums * np.abs(want).max())


linear = jax.jit(CUSPARSELT.matmul, static_argnames="out_dtype")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "8:10", "10:12", "12:14", "14:16"])
def test_every_pattern(pattern, dtype):
    lifted, scale, w, bias = problem(64, 300, 96, pattern, dtype)
    check(linear(lifted, scale, w, bias, jnp.bfloat16), expected(lifted, scale, w, bias)[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(
    ("rows", "columns", "out"),
    [(1, 64, 32), (7, 65, 33), (32, 512, 48), (100, 1000, 200), (257, 4096, 512)],
)
def test_any_shape(rows, columns, out, dtype):
    for with_bias in (False, True):
        lifted, scale, w, bias = problem(rows, columns, out, dtype=dtype)
        bias = bias if with_bias else None
        check(
            linear(lifted, scale, w, bias, jnp.bfloat16), expected(lifted, scale, w, bias)[1], dtype
        )


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=ids)
def test_results_are_rounded_once(out_dtype):
    lifted, scale, w, bias = problem(40, 640, 64)
    y = linear(lifted, scale, w, bias, out_dtype)
    want = expected(lifted, scale, w, bias)[1].astype(out_dtype)
    assert y.dtype == out_dtype
    np.testing.assert_array_equal(np.asarray(y).astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize(("rows", "out"), [(32, 64), (5, 40)])
def test_int8_accumulators_are_exact(rows, out):
    lifted, scale, w, _ = problem(rows, 2048, out)
    acc = linear(lifted, scale, w, None, None)
    assert acc.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(acc), expected(lifted, scale, w)[0])


def test_raw_float_accumulators():
    lifted, scale, w, _ = problem(33, 1024, 40, dtype=jnp.float8_e4m3fn)
    acc = linear(lifted, scale, w, None, None)
    want = expected(lifted, scale, w)[0]
    np.testing.assert_allclose(np.asarray(acc), want, atol=2e-3 * np.abs(want).max())
    with pytest.raises(NotImplementedError, match="accumulators"):
        linear(*problem(32, 64, 32, dtype=jnp.bfloat16)[:3], None, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_nan_stays_in_its_row(dtype):
    rng = np.random.default_rng(0)
    w = sj.pack(
        jnp.asarray(rng.standard_normal((128, 64)), jnp.float32).astype(jnp.float32),
        "6:8",
        dtype=dtype,
    )
    x = rng.standard_normal((8, 128)).astype(jnp.bfloat16)
    x[2, 5], x[4, 7] = np.nan, np.inf
    lifted, scale = calls.lift_quantize_call(
        jnp.asarray(x),
        jnp.zeros(0, jnp.float32),
        group=8,
        lifted_columns=w.pattern.lifted(128),
        dtype=w.dtype,
    )
    y = np.asarray(linear(lifted, scale[:, None], w, None, jnp.bfloat16)).astype(np.float32)
    assert np.isnan(y[[2, 4]]).all() and np.isfinite(np.delete(y, [2, 4], 0)).all()


def test_scale_inside_the_product():
    """The call can apply the scale of each output itself; slidejax does not use that yet."""
    lifted, scale, w, bias = problem(64, 1024, 96)
    y_type = jax.ShapeDtypeStruct((64, 96), jnp.bfloat16)
    workspace = jax.ShapeDtypeStruct((1 << 21,), jnp.uint8)
    default = {"algorithm": np.int32(-1), "split_k": np.int32(1), "split_k_mode": np.int32(0)}
    operands = (lifted, scale[:, 0], cusparselt.compressed(w), w.scale, bias)
    y, _ = calls.call(
        "slidejax_sparse_matmul_cusparselt",
        (y_type, workspace),
        *operands,
        raw=np.bool_(False),
        alpha_vector=np.bool_(True),
        **default,
    )
    want = expected(lifted, scale, w, bias)[1]
    np.testing.assert_allclose(
        np.asarray(y).astype(np.float32), want, rtol=2**-6, atol=2**-7 * np.abs(want).max()
    )


def test_minus_zero_is_a_zero():
    kernel = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    kernel[::3] = -0.0
    w = sj.pack(jnp.asarray(kernel, jnp.bfloat16), "6:8")
    w = w.replace(values=jnp.where(w.values == 0, jnp.asarray(-0.0, w.values.dtype), w.values))
    lifted, scale, *_ = problem(32, 64, 32, dtype=jnp.bfloat16)
    check(linear(lifted, scale, w, None, jnp.bfloat16), expected(lifted, scale, w)[1], jnp.bfloat16)


def test_search_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    lifted, scale, w, bias = problem(256, 1024, 512)
    before = linear(lifted, scale, w, bias, jnp.bfloat16)
    timings = cusparselt.search(w, 256)
    times = [t["microseconds"] for t in timings]
    assert times == sorted(times) and times[0] > 0
    choice = cusparselt._choice(w.dtype, calls.accumulator(w.dtype), 512, 256, lifted.shape[1])
    assert (
        choice["algorithm"] == timings[0]["algorithm"] and len(list(tmp_path.rglob("*.json"))) == 1
    )
    after = jax.jit(CUSPARSELT.matmul, static_argnames="out_dtype")(
        lifted, scale, w, bias, jnp.bfloat16
    )
    np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    assert (
        cusparselt._choice(w.dtype, calls.accumulator(w.dtype), 512, 16, lifted.shape[1])[
            "algorithm"
        ]
        == -1
    )


def test_errors_say_what_was_asked():
    lifted, scale, w, bias = problem(32, 64, 32)
    compressed = cusparselt.compressed(w)
    with pytest.raises(Exception, match=r"sparse_matmul_cusparselt.*workspace.*int8\[32,96\]"):
        jax.block_until_ready(
            cusparselt.matmul_call(
                lifted,
                scale[:, 0],
                compressed,
                w.scale,
                bias,
                dtype=jnp.bfloat16,
                workspace_bytes=8,
            )
        )

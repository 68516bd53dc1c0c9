"""The cuSPARSELt products against exact sums over the packed form."""

from concurrent.futures import ThreadPoolExecutor

import cuda_formulas as formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.ops.cuda import calls
from slidejax.ops.cuda import cusparselt as library
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


def sum_error(dtype):
    """Of the largest sum. The tensor cores of some GPUs keep about 14 bits of a float8 sum."""
    return 3e-3 if np.dtype(dtype) == jnp.float8_e4m3fn else 2e-4


def check(y, want, dtype):
    """Allows for two roundings to bfloat16, and for the error of the sums."""
    y, want = np.asarray(y).astype(np.float64), want.astype(np.float64)
    step = 2 * float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(y, want, rtol=step, atol=sum_error(dtype) * np.abs(want).max())


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


@pytest.mark.parametrize("out_dtype", [jnp.float16, jnp.float32], ids=ids)
@pytest.mark.parametrize(("rows", "out"), [(64, 96), (40, 70)])
def test_results_in_float16_and_float32_are_rounded_once(rows, out, out_dtype):
    lifted, scale, w, bias = problem(rows, 640, out)
    y = linear(lifted, scale, w, bias, out_dtype)
    want = expected(lifted, scale, w, bias)[1].astype(out_dtype)
    assert y.dtype == out_dtype
    np.testing.assert_array_equal(np.asarray(y).astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize(("rows", "out"), [(64, 96), (40, 70)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_results_in_bfloat16_are_rounded_twice(rows, out, with_bias):
    """Bit for bit as the formula has it, which stays within its bound of the exact results."""
    lifted, scale, w, bias = problem(rows, 2560, out)
    bias = bias if with_bias else None
    y = np.asarray(linear(lifted, scale, w, bias, jnp.bfloat16))
    acc = expected(lifted, scale, w)[0]
    given = (acc, np.asarray(scale)[:, 0], np.asarray(w.scale), bias)
    np.testing.assert_array_equal(y.astype(np.float32), formulas.twice_rounded(*given).astype("f4"))
    exact, bound = formulas.twice_rounded_bound(*given)
    assert (np.abs(y.astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize(
    ("residual_dtype", "out_dtype", "dtype"),
    [
        *((jnp.bfloat16, jnp.bfloat16, dtype) for dtype in DTYPES),
        *((residual, jnp.float32, jnp.int8) for residual in (jnp.bfloat16, jnp.float16)),
        (jnp.float32, jnp.bfloat16, jnp.int8),
    ],
    ids=ids,
)
@pytest.mark.parametrize(("rows", "out"), [(64, 96), (40, 70)])
def test_a_residual_is_added(rows, out, residual_dtype, out_dtype, dtype):
    lifted, scale, w, bias = problem(rows, 640, out, dtype=dtype)
    residual = jnp.asarray(np.random.default_rng(5).standard_normal((rows, out)) * 30)
    residual = residual.astype(residual_dtype)
    y = np.asarray(linear(lifted, scale, w, bias, out_dtype, residual=residual))
    acc = expected(lifted, scale, w)[0]
    given = (acc, np.asarray(scale)[:, 0], np.asarray(w.scale), bias, residual)
    if dtype != jnp.int8:  # the sum is rounded before the residual may cancel most of it
        exact, bound = formulas.twice_rounded_bound(*given)
        bound = bound + sum_error(dtype) * np.abs(formulas.finish(*given[:3])).max()
        assert (np.abs(y.astype(np.float64) - exact) <= bound).all()
    elif out_dtype == jnp.float32:
        np.testing.assert_array_equal(y, formulas.finish(*given))
    else:
        np.testing.assert_array_equal(
            y.astype(np.float32), formulas.twice_rounded(*given).astype("f4")
        )


def test_float8_results_are_within_the_bound():
    """Sums of 512 products of small whole numbers are exact on every tensor core."""
    lifted, scale, w, bias = problem(64, 512, 96, dtype=jnp.float8_e4m3fn)
    whole = np.random.default_rng(1).integers(-2, 3, lifted.shape)
    lifted = jnp.asarray(whole, jnp.float32).astype(lifted.dtype)
    w = w.replace(values=jnp.sign(w.values.astype(jnp.float32)).astype(w.dtype))
    y = np.asarray(linear(lifted, scale, w, bias, jnp.bfloat16)).astype(np.float64)
    acc = expected(lifted, scale, w)[0]
    exact, bound = formulas.twice_rounded_bound(
        acc, np.asarray(scale)[:, 0], np.asarray(w.scale), bias
    )
    assert (np.abs(y - exact) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("rows", [1024, 1000, 300])  # 300 are too few for four parts
@pytest.mark.parametrize(("parts", "beside"), [(2, 0), (2, 1), (4, 1)])
def test_parts_change_nothing(parts, beside, rows, dtype):
    lifted, scale, w, bias = problem(rows, 512, 96, dtype=dtype)
    form = cusparselt.compressed(w)

    def run(parts):
        # Any algorithm but the default, so that the call refuses nothing in silence.
        return cusparselt.matmul_call(
            lifted, scale[:, 0], form, w.scale, bias, dtype=jnp.bfloat16,
            workspace_bytes=library.WORKSPACE, algorithm=0, parts=parts, beside=beside,
        )  # fmt: skip

    one, several = jax.jit(run, static_argnums=0)(1), jax.jit(run, static_argnums=0)(parts)
    check(several, expected(lifted, scale, w, bias)[1], dtype)
    if dtype == jnp.int8:  # the order of sums does not matter
        np.testing.assert_array_equal(np.asarray(one), np.asarray(several))
    for _ in range(3):
        np.testing.assert_array_equal(
            np.asarray(several), np.asarray(jax.jit(run, static_argnums=0)(parts))
        )


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


@pytest.fixture
def two_parts(monkeypatch):
    """Every call is cut into two parts, as a search may find best."""
    found = {"algorithm": 0, "parts": 2, "microseconds": 1.0}
    monkeypatch.setattr(library, "nearest", lambda product, rows: (rows, found))


def layers(x, w):
    """Products that depend on each other, so that a part that is finished too late would show."""
    step = lambda x, _: (jnp.tanh(sj.linear(x, w, implementation="cusparselt") / 64), None)  # noqa: E731
    return jax.lax.scan(step, x, None, length=12)[0]


def square(seed):
    rng = np.random.default_rng(seed)
    w = sj.pack(jnp.asarray(rng.standard_normal((512, 512)), jnp.float32), "6:8", dtype="int8")
    return jnp.asarray(rng.standard_normal((1000, 512)), jnp.bfloat16), sj.prepare(
        w, "cusparselt", tune=False
    )


def test_parts_in_a_loop_and_its_graph(two_parts, monkeypatch):
    x, w = square(0)
    run = jax.jit(layers)
    several = [np.asarray(run(x, w)) for _ in range(5)]  # recorded in one run, replayed in another
    monkeypatch.setattr(library, "nearest", lambda product, rows: None)
    want = np.asarray(jax.jit(lambda x, w: layers(x, w))(x, w))
    for got in several:
        np.testing.assert_array_equal(got, want)


def test_threads_may_share_a_call_in_parts(two_parts):
    run = jax.jit(layers)
    problems = [square(seed) for seed in range(4)]
    wants = [np.asarray(run(*problem)) for problem in problems]

    def repeat(i):
        return [np.array_equal(np.asarray(run(*problems[i])), wants[i]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(equal) for equal in pool.map(repeat, range(4)))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(
    ("columns", "out", "pattern"),
    [(512, 96, "2:4"), (300, 33, "6:8"), (4096, 1000, "6:8"), (1000, 200, "14:16")],
)
def test_the_compressed_form_is_the_librarys_own(columns, out, pattern, dtype):
    """Byte for byte where the library has no choice: no kept value is zero."""
    w = problem(8, columns, out, pattern, dtype)[2]
    w = w.replace(values=jnp.where(w.values == 0, jnp.ones((), w.dtype), w.values))
    size = jax.ShapeDtypeStruct((cusparselt._compressed_bytes(w),), jnp.uint8)
    none = np.zeros(0, np.int64)
    want = calls.call("slidejax_compress_cusparselt", size, w.values, w.zeros, layout=none)
    if not library.layout(w.dtype.name, out, w.lifted_columns):
        pytest.skip("the library's order is no sum over bits here, so that it compresses itself")
    got, want = np.asarray(cusparselt.compressed(w)), np.asarray(want)
    # In whole windows. Room for more columns holds whatever the library likes.
    multiple = cusparselt._multiple(w.dtype)
    padded = -(-out // multiple) * multiple
    used = padded * w.lifted_columns // 2 * w.dtype.itemsize
    if w.lifted_columns % 128 == 0:
        used = got.size
    np.testing.assert_array_equal(got[:used], want[:used])


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_zeros_among_the_kept_values(dtype):
    lifted, scale, w, bias = problem(64, 1000, 200, dtype=dtype)
    rng = np.random.default_rng(3)
    zero = jnp.asarray(rng.random(w.values.shape) < 0.3)
    w = w.replace(values=jnp.where(zero, jnp.zeros((), w.dtype), w.values))
    check(linear(lifted, scale, w, bias, jnp.bfloat16), expected(lifted, scale, w, bias)[1], dtype)


def test_minus_zero_is_a_zero():
    kernel = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    kernel[::3] = -0.0
    w = sj.pack(jnp.asarray(kernel, jnp.bfloat16), "6:8")
    w = w.replace(values=jnp.where(w.values == 0, jnp.asarray(-0.0, w.values.dtype), w.values))
    lifted, scale, *_ = problem(32, 64, 32, dtype=jnp.bfloat16)
    check(linear(lifted, scale, w, None, jnp.bfloat16), expected(lifted, scale, w)[1], jnp.bfloat16)


def test_a_search_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    lifted, scale, w, bias = problem(256, 1024, 512)
    before = linear(lifted, scale, w, bias, jnp.bfloat16)
    product = library.Product.of(w.dtype, jnp.bfloat16, 512, lifted.shape[1])
    assert CUSPARSELT.settings(w, 256).startswith("the library's default")
    timings = library.search(product, 256)
    times = [t["microseconds"] for t in timings]
    assert times == sorted(times) and times[0] > 0
    choice = cusparselt._choice(product, 256)
    assert choice["algorithm"] == timings[0]["algorithm"]
    assert len(list(tmp_path.rglob("*.json"))) == 1
    assert CUSPARSELT.settings(w, 256).startswith(f"algorithm {choice['algorithm']}")
    after = jax.jit(CUSPARSELT.matmul, static_argnames="out_dtype")(
        lifted, scale, w, bias, jnp.bfloat16
    )
    np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    assert cusparselt._choice(product, 1)["algorithm"] == -1
    # The library alone is timed, and not remembered.
    assert library.search(product, 4096, finish=False)[0]["parts"] == 1
    assert set(library.searched(product)) == {256}


def test_prepare_searches_once_and_outside_a_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "ROWS", (64, 256))
    w = problem(32, 256, 128)[2]
    product = library.Product.of(w.dtype, jnp.bfloat16, 128, w.lifted_columns)
    sj.prepare(w, "cusparselt", tune=False)
    jax.jit(lambda w: sj.prepare(w, "cusparselt"))(w)
    assert not library.searched(product)
    prepared = sj.prepare(w, "cusparselt")
    found = library.searched(product)
    assert set(found) == {64, 256}
    sj.prepare(prepared, "cusparselt")
    assert library.searched(product) == found
    x = jnp.ones((100, 256), jnp.bfloat16)
    [(_, choice)] = sj.explain(lambda x: sj.linear(x, prepared, implementation="cusparselt"), x)
    assert "the fastest of a search" in str(choice)


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

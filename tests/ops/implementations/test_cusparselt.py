"""The implementation "cusparselt" as it is lowered without a GPU; tests/cuda runs it."""

import re

import cuda_formulas as formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slidejax as sj
from slidejax.ops.cuda import cusparselt as library
from slidejax.ops.implementations.cusparselt import CUSPARSELT
from slidejax.ops.problem import Problem

cpu_only = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="tests what a machine without a GPU does"
)
NAME = "cusparselt"


def call_of(x, w, **options):
    """The lowered call: its attributes, the type of y and the bytes of its workspace."""
    run = jax.jit(lambda x, w: sj.linear(x, w, implementation=NAME, **options))
    text = run.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    [call] = [line for line in text.splitlines() if "slidejax_sparse_matmul_cusparselt" in line]
    y, workspace = re.findall(r"tensor<([^>]*)>", call.rsplit("->", 1)[1])
    attributes = dict(re.findall(r"(\w+) = (-?\w+)(?: :|[,}])", call))
    return attributes, y, int(workspace.removesuffix("xui8"))


def problem(rows=64, columns=128, out=64, dtype="int8"):
    x = jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((columns, out), jnp.bfloat16)
    return x, jax.eval_shape(lambda kernel: sj.pack(kernel, "6:8", dtype=dtype), kernel)


# --- two roundings --------------------------------------------------------------------------------


@given(st.data())
def test_two_roundings_stay_within_the_bound(data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    has_bias, has_residual = data.draw(st.booleans()), data.draw(st.booleans())
    size = data.draw(st.sampled_from([1, 100, 2**24, 2**30]))
    rng = np.random.default_rng(seed)
    acc = rng.integers(-size, size + 1, (16, 24))
    scale_x, scale_w = (np.exp2(rng.uniform(-30, 10, n)).astype(np.float32) for n in acc.shape)
    bias = (rng.standard_normal(24) * np.exp2(rng.uniform(-20, 10))).astype(np.float32)
    residual = (rng.standard_normal(acc.shape) * np.exp2(rng.uniform(-20, 10))).astype("f4")
    terms = (bias if has_bias else None, residual if has_residual else None)
    exact, bound = formulas.twice_rounded_bound(acc, scale_x, scale_w, *terms)
    y = formulas.twice_rounded(acc, scale_x, scale_w, *terms).astype(np.float64)
    assert (np.abs(y - exact) <= bound).all()
    # One rounding of the exact sums is within it as well.
    once = formulas.finish(acc, scale_x, scale_w, *terms).astype(jnp.bfloat16).astype(np.float64)
    assert (np.abs(once - exact) <= bound).all()


def test_the_bound_is_no_wider_than_it_must_be():
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**20), 2**20, (256, 256))
    scales = [np.exp2(rng.uniform(-3, 3, 256)).astype(np.float32) for _ in range(2)]
    exact, bound = formulas.twice_rounded_bound(acc, *scales)
    error = np.abs(formulas.twice_rounded(acc, *scales).astype(np.float64) - exact)
    assert 0.9 < (error / bound)[bound > 0].max() <= 1


# --- lowering -------------------------------------------------------------------------------------


@cpu_only
@pytest.mark.parametrize(
    ("out_dtype", "name", "of_result"),
    [(jnp.bfloat16, "bf16", 0), (jnp.float32, "f32", 0), (jnp.float16, "f16", 4)],
    ids=["bfloat16", "float32", "float16"],
)
def test_accumulators_take_memory_only_where_y_cannot_hold_them(out_dtype, name, of_result):
    attributes, y, workspace = call_of(*problem(), out_dtype=out_dtype)
    assert attributes["raw"] == "false" and attributes["algorithm"] == "-1"
    assert attributes["parts"] == "1"
    assert y == f"64x64x{name}"
    assert workspace == 256 + library.WORKSPACE + 64 * 64 * of_result


@cpu_only
def test_a_residual_is_an_operand_of_the_call():
    x, w = problem()
    residual = jnp.ones((64, 64), jnp.bfloat16)
    _, y, workspace = call_of(x, w, residual=residual)
    assert y == "64x64xbf16" and workspace == 256 + library.WORKSPACE


@cpu_only
def test_padding_takes_memory():
    _, _, workspace = call_of(*problem(rows=33))
    # The library writes 64 rows of 64 results in bfloat16, and reads 64 rows of 192 codes.
    assert workspace == 256 + library.WORKSPACE + 64 * 64 * 2 + 64 * 192


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "result"),
    [
        ("int8", "bfloat16", "bfloat16"),
        ("int8", "float16", "int32"),
        ("int8", None, "int32"),
        ("float8_e4m3fn", "bfloat16", "bfloat16"),
        ("float8_e4m3fn", "float32", "float32"),
        ("float16", "bfloat16", "float16"),
        ("bfloat16", "float32", "bfloat16"),
    ],
)
def test_what_the_library_writes(dtype, out_dtype, result):
    product = library.Product.of(jnp.dtype(dtype), out_dtype, 64, 192)
    assert product.result.name == result and str(product) == f"{dtype}->{result} 64x192"


# --- the search -----------------------------------------------------------------------------------


class Module:
    """The compiled module as a search sees it."""

    def __init__(self, fails=()):
        self.searched, self.fails = [], fails

    def cusparselt_tune(self, dtype, result, out, rows, columns, workspace_limit, finish):
        if rows in self.fails:
            raise RuntimeError(f"out of memory at {rows}")
        self.searched.append((result, rows, finish))
        return [
            {
                "algorithm": 5,
                "split_k": 1,
                "split_k_mode": 0,
                "parts": 2,
                "microseconds": 10.0,
                "workspace_bytes": 512,
            }
        ]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """`gpu(module)`: this machine seems to have a GPU and the library."""
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))

    def install(module):
        monkeypatch.setattr(library.library, "on_gpu", lambda: True)
        monkeypatch.setattr(library.library, "load", lambda: (module, None))
        monkeypatch.setattr(library, "missing", lambda: None)
        monkeypatch.setattr(library, "version", lambda: (0, 8, 1))
        return module

    return install


def test_all_usual_rows_are_searched_once(gpu):
    module = gpu(Module())
    _, w = problem()
    CUSPARSELT.search_missing(w)
    assert set(module.searched) == {("bfloat16", rows, True) for rows in library.ROWS}
    CUSPARSELT.search_missing(w)
    assert len(module.searched) == len(library.ROWS)
    CUSPARSELT.search_missing(w, (64, 300))
    assert module.searched[-1] == ("bfloat16", 300, True)
    assert len(module.searched) == len(library.ROWS) + 1


def test_a_search_serves_the_rows_around_it(gpu):
    gpu(Module())
    product = library.Product.of(jnp.int8, jnp.bfloat16, 64, 192)
    for rows in library.ROWS:
        assert library.nearest(product, rows) is None
        library.search(product, rows)
    near = {rows: library.nearest(product, rows) for rows in (1, 32, 100, 700, 5000, 10**6)}
    assert [found[0] for found in near.values()] == [64, 64, 64, 1024, 4096, 16384]
    # The library alone is timed, and nothing is kept.
    other = library.Product.of(jnp.int8, jnp.float32, 64, 192)
    library.search(other, 64, finish=False)
    assert library.nearest(other, 64) is None


def test_info_says_how_many_shapes_were_searched(gpu):
    assert CUSPARSELT.facts()["cusparselt_searched_shapes"] is None
    gpu(Module())
    CUSPARSELT.search_missing(problem()[1])
    CUSPARSELT.search_missing(problem(out=96)[1])
    facts = CUSPARSELT.facts()
    assert facts["cusparselt_searched_shapes"] == "2; others run its default algorithm"
    assert facts["cusparselt_version"] == "0.8.1"


def test_a_search_of_many_rows_does_not_serve_few(gpu):
    gpu(Module())
    product = library.Product.of(jnp.int8, jnp.bfloat16, 64, 192)
    library.search(product, 4096)
    assert library.nearest(product, 1024) is None and library.nearest(product, 1 << 20) is None
    assert library.nearest(product, 8192)[0] == 4096


def test_a_search_that_fails_is_a_warning_and_others_go_on(gpu):
    module = gpu(Module(fails=(16384,)))
    with pytest.warns(UserWarning, match="16384 rows: out of memory"):
        CUSPARSELT.search_missing(problem()[1])
    assert len(module.searched) == len(library.ROWS) - 1


def test_explain_says_which_algorithm_runs(gpu):
    x, w = problem(rows=256)

    def note(rows, out_dtype=jnp.bfloat16):
        return CUSPARSELT.note(
            Problem(
                "linear",
                "cuda",
                "NVIDIA A100-SXM4-80GB",
                rows,
                128,
                64,
                w.pattern,
                np.dtype(x.dtype),
                w.dtype,
                np.dtype(out_dtype),
            )
        )

    gpu(Module())
    assert "default algorithm, without a search" in note(256)
    CUSPARSELT.search(w, 256)
    assert note(256).startswith("algorithm 5 in 2 parts, the fastest of a search at M=256")
    # float32 results come from other algorithms.
    assert "default algorithm" in note(256, jnp.float32) and "default algorithm" in note(2048)


@cpu_only
def test_explain_says_default_ahead_of_time():
    x, w = problem()
    [(_, choice)] = sj.explain(
        lambda x, w: sj.linear(x, w, implementation=NAME), x, w, platform="cuda"
    )
    assert "asked for; the library's default algorithm" in str(choice)


# --- refusals -------------------------------------------------------------------------------------


@cpu_only
def test_float8_needs_an_instruction_for_it():
    def reason(device):
        return CUSPARSELT.refuses(
            Problem(
                "linear",
                "cuda",
                device,
                64,
                128,
                64,
                sj.Pattern.parse("6:8"),
                np.dtype(jnp.bfloat16),
                np.dtype(jnp.float8_e4m3fn),
                np.dtype(jnp.bfloat16),
            )
        )

    assert "no sparse products of float8_e4m3fn" in reason("NVIDIA A100-SXM4-80GB")
    assert reason("NVIDIA L4") is None and reason("A card of tomorrow") is None

"""`slidejax bench` and `slidejax tune` where there is no GPU: what is measured and reported, and cuSPARSELt's search with a
library that is made up."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.bench import contenders, run, shapes, timing, tuning
from slidejax.ops.choice import choose
from slidejax.ops.cuda import library as cuda_library
from slidejax.ops.implementations import cusparselt
from slidejax.ops.implementations.base import nothing_to_skip
from slidejax.ops.implementations.cusparselt import CUSPARSELT

QUICK = timing.Clock(warmup=0.001, seconds=0.005)


@pytest.fixture(scope="module")
def results():
    return run.measure([(64, 96), (32, 96)], rows=[4], dtypes=["int8"], clock=QUICK)


def test_the_best_dense_product_is_taken_layer_by_layer(results):
    unscaled = ("dense int8 unscaled", "dense fp8 unscaled")
    for row in results["linear"]:
        assert row["us"]["best dense 8 bit"] == min(row["us"][name] for name in unscaled)
    [total] = results["sums"]
    assert total["us"]["best dense 8 bit"] == pytest.approx(
        sum(row["us"]["best dense 8 bit"] for row in results["linear"])
    )
    assert total["us"]["best dense 8 bit"] <= min(total["us"][name] for name in unscaled) + 1e-9
    [ours] = [name for name in total["us"] if name not in contenders.BASELINES]
    assert total["ratios"][ours]["best dense 8 bit"] == pytest.approx(
        total["us"]["best dense 8 bit"] / total["us"][ours]
    )
    assert contenders.best_dense({"dense int8 unscaled": None, "dense fp8 unscaled": 2.0}) == 2.0
    assert contenders.best_dense({}) is None


@pytest.mark.parametrize("inputs", [1, 4])
@pytest.mark.parametrize("loops", [1, pytest.param(3, marks=pytest.mark.gpu)])
def test_every_application_that_is_counted_runs(inputs, loops):
    """XLA drops results that nobody reads, and on a CPU, where there is no loop, takes out of it what is the same each time."""
    ran = []

    def apply(x, weights):
        def count(product):
            ran.append(1)
            return product

        product = x @ weights
        return jax.pure_callback(count, product, product)

    xs = [jnp.full((2, 3), float(i)) for i in range(inputs)]
    program = timing._program(timing.Contender("counted", apply, jnp.ones((3, 5))), xs, loops)
    copies = 16 if jax.default_backend() == "gpu" else 1  # of weights as small as these
    results = program.room()
    for _ in range(2):  # into the results of the first
        ran.clear()
        results = jax.block_until_ready(program(results))
        assert len(ran) == program.applications == loops * max(2, inputs, copies)
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result, xs[i % inputs] @ jnp.ones((3, 5)))


def test_the_bounds_of_a_dense_layer_are_the_layer_without_scales():
    kernel = contenders.kernel_of(16, 64)
    x = run.inputs_of(8, 64, 1)[0]
    exact = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
    by_name = {c.name: c for c in contenders.baselines(kernel)}
    assert {*by_name, contenders.BEST_DENSE} == set(contenders.BASELINES)
    for name, dtype in (("dense int8 unscaled", jnp.int32), ("dense fp8 unscaled", jnp.bfloat16)):
        c = by_name[name]
        acc, scale = c.apply(x, c.weights)
        assert acc.dtype == dtype and scale.shape == (8, 1)
        _, scale_w = contenders._quantise(
            kernel.T, 127 if dtype == jnp.int32 else 448, c.weights.dtype, 1
        )
        y = np.asarray(acc, np.float32) * np.asarray(scale) * np.asarray(scale_w)[:, 0]
        assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.05


def test_lifting_is_compared_with_quantising_alone(results):
    [row] = results["lift"]
    assert row["over_quantise"] == pytest.approx(row["us"] / row["quantise_us"])
    assert row["quantise_gb_per_s"] == pytest.approx(
        (3 * 4 * 96 + 4 * 4) / row["quantise_us"] / 1e3
    )


def test_the_table_shows_every_column(results):
    text = run.table(results)
    for word in (*contenders.BASELINES, "over quantise", "64x96, 32x96", "not timed: int8 hopper"):
        assert word in text
    assert "settings of" not in text  # what has some does not run here
    row = dict(
        results["linear"][0],
        settings={"cusparselt": "3, the fastest of a search at M=4 (1.0 us for the product alone)"},
    )
    assert "6:8 int8 M=4 64x96: 3, the fastest" in run.table({**results, "linear": [row]})


def test_presets():
    assert {"qwen2.5-7b", "llama-3-8b", "square-8192"} <= set(shapes.PRESETS)
    assert shapes.PRESETS["square-8192"] == ((8192, 8192),)
    assert shapes.default_preset() in shapes.PRESETS


# --- cuSPARSELt's search --------------------------------------------------------------------------


class Library:
    """The compiled module as `cusparselt.search` sees it."""

    def __init__(self):
        self.searched = []

    def cusparselt_tune(self, dtype, result, alpha_vector, out, rows, columns, workspace_limit):
        self.searched.append((dtype, result, out, rows, columns))
        fast = {
            "algorithm": 7,
            "split_k": 1,
            "split_k_mode": 0,
            "microseconds": 12.5,
            "workspace_bytes": 1024,
        }
        return [fast, {**fast, "algorithm": 0, "microseconds": 20.0}]


@pytest.fixture
def library(monkeypatch, tmp_path):
    module = Library()
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda_library, "load", lambda: (module, None))
    monkeypatch.setattr(cuda_library, "on_gpu", lambda: True)
    monkeypatch.setattr(cusparselt, "missing", lambda: None)
    monkeypatch.setattr(cusparselt, "version", lambda: (0, 8, 0))
    monkeypatch.setattr(CUSPARSELT, "refuses", nothing_to_skip)
    monkeypatch.setattr(
        contenders, "sparse", lambda w, rows, both: ({}, {})
    )  # a CPU cannot run the library
    return module


def test_tune_searches_cusparselt_and_calls_use_what_it_found(library, tmp_path):
    w = sj.pack(contenders.kernel_of(64, 96), "6:8", dtype="int8")
    assert CUSPARSELT.settings(w, 256).startswith("the library's default")
    notes = []
    tuning.measure([(64, 96)], rows=[256, 4096], dtypes=["int8"], clock=QUICK, note=notes.append)
    columns = sj.Pattern.parse("6:8").lifted(96)
    assert library.searched == [("int8", "int32", 64, rows, columns) for rows in (256, 4096)]
    assert any("fastest algorithm is 7: 12.5 us" in note for note in notes)
    assert (
        CUSPARSELT.settings(w, 256)
        == "7, the fastest of a search at M=256 (12.5 us for the product alone)"
    )
    assert "M=4096" in CUSPARSELT.settings(w, 8192) and "default" in CUSPARSELT.settings(w, 16)
    assert cusparselt._choice(w.dtype, np.int32, 64, 256, columns) == {
        "algorithm": 7,
        "split_k": 1,
        "split_k_mode": 0,
        "workspace_bytes": 1024,
    }
    [saved] = tmp_path.rglob(
        "*cusparselt-0.8.0.json"
    )  # for this device and this release of the library
    assert {
        int(rows) for entries in json.loads(saved.read_text()).values() for rows in entries
    } == {256, 4096}


def test_the_pattern_dense_is_timed_and_not_tuned(library):
    w = sj.pack(contenders.kernel_of(64, 96), "dense", dtype="int8")
    assert choose(contenders.problem_of(w, 16)).implementation == "dense"
    options = {"rows": [16], "dtypes": ["int8"], "clock": QUICK, "dry_run": True}
    with pytest.raises(ValueError, match="nothing to choose"):
        tuning.measure([(64, 96)], patterns=["dense"], **options)
    notes = []
    tuning.measure([(64, 96)], patterns=["dense", "6:8"], note=notes.append, **options)
    assert "nothing to choose" in notes[0] and [note for note in notes if "M=16" in note] == [
        "N=64 K=96 6:8 int8 M=16"
    ]


def test_a_dry_run_searches_nothing(library, tmp_path):
    tuning.measure([(64, 96)], rows=[16], dtypes=["int8"], clock=QUICK, dry_run=True)
    assert library.searched == [] and not list(tmp_path.rglob("*.json"))


def test_a_search_that_fails_leaves_the_default(library, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("cuSPARSELt has no algorithm")

    monkeypatch.setattr(library, "cusparselt_tune", fail)
    notes = []
    tuning.measure([(64, 96)], rows=[16], dtypes=["int8"], clock=QUICK, note=notes.append)
    assert any("cannot be searched: cuSPARSELt has no algorithm" in note for note in notes)

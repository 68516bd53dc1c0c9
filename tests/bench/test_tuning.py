"""`slidejax tune` on a machine without a GPU, with a compiled library that is made up."""

import json

import jax.numpy as jnp
import pytest

import slidejax as sj
from slidejax.bench import contenders, tuning
from slidejax.bench.timing import Clock
from slidejax.ops.choice import choose
from slidejax.ops.cuda import cusparselt
from slidejax.ops.cuda import library as cuda_library
from slidejax.ops.implementations.base import nothing_to_skip
from slidejax.ops.implementations.cusparselt import CUSPARSELT, _choice

QUICK = Clock(0.001, 0.005)


class Library:
    """The compiled module as `cusparselt.search` sees it."""

    def __init__(self):
        self.searched = []

    def cusparselt_tune(self, dtype, result, out, rows, columns, workspace_limit, finish):
        assert finish
        self.searched.append((dtype, result, out, rows, columns))
        fast = {
            "algorithm": 7,
            "split_k": 1,
            "split_k_mode": 0,
            "parts": 1,
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
    # A CPU cannot run the library.
    monkeypatch.setattr(contenders, "sparse", lambda w, rows, both: ({}, {}))
    return module


def test_tune_searches_cusparselt_and_calls_use_what_it_found(library, tmp_path):
    w = sj.pack(contenders.kernel_of(64, 96), "6:8", dtype="int8")
    assert CUSPARSELT.settings(w, 256).startswith("the library's default")
    notes = []
    tuning.measure([(64, 96)], rows=[256, 4096], dtypes=["int8"], clock=QUICK, note=notes.append)
    columns = sj.Pattern.parse("6:8").lifted(96)
    assert library.searched == [("int8", "bfloat16", 64, rows, columns) for rows in (256, 4096)]
    assert any("fastest algorithm is 7: 12.5 us" in note for note in notes)
    assert (
        CUSPARSELT.settings(w, 256)
        == "algorithm 7, the fastest of a search at M=256 (12.5 us without the lift)"
    )
    assert "M=4096" in CUSPARSELT.settings(w, 8192) and "default" in CUSPARSELT.settings(w, 64)
    product = cusparselt.Product.of(w.dtype, jnp.bfloat16, 64, columns)
    assert _choice(product, 256) == {
        "algorithm": 7,
        "split_k": 1,
        "split_k_mode": 0,
        "parts": 1,
        "beside": 1,
        "workspace_bytes": 1024,
    }
    # The file is for this device and this release of the library.
    [saved] = tmp_path.rglob("*cusparselt-0.8.0.json")
    assert {
        int(rows)
        for name, entries in json.loads(saved.read_text()).items()
        if name != "sha256"
        for rows in entries
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

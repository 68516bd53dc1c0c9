"""`slidejax tune` on a CPU."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import error, output, run

QUICK = ("--seconds", "0.005", "--warmup", "0.001", "--dtype", "int8", "--rows", "2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def two_ways(monkeypatch):
    """On a CPU one implementation runs, so that the reference is timed as well."""
    from slidejax.ops.implementations.reference import Reference

    monkeypatch.setattr(Reference, "competes", True)


def test_tune_records_what_it_measures(capsys, cache, two_ways):
    status, out, err = run(capsys, "tune", "--shape", "32,64", *QUICK, "--json")
    [entry] = json.loads(out)
    assert status == 0 and (entry["out"], entry["in"], entry["rows"]) == (32, 64, 2)
    assert {"dense", "reference"} <= entry["us"].keys()
    [table] = cache.rglob("*.json")
    assert f"recorded in {table}" in err and "N=32 K=64 6:8 int8 M=2" in err
    [recorded] = json.loads(table.read_text())["entries"]
    assert {t["implementation"] for t in recorded["times"]} == {"dense", "reference"}


def test_a_dry_run_records_nothing(capsys, cache, two_ways):
    text = output(capsys, "tune", "--shape", "32,64", *QUICK, "--dry-run")
    assert "N=32 K=64 6:8 int8 M=2: " in text and not list(cache.rglob("*.json"))


def test_a_models_layers_are_measured(capsys, cache, two_ways, out):
    got = json.loads(output(capsys, "tune", out, *QUICK, "--dry-run", "--json"))
    shapes = {(48, 48), (48, 24), (48, 104), (104, 48)}
    assert {(e["in"], e["out"]) for e in got} == shapes and {e["pattern"] for e in got} == {"6:8"}


def test_the_pattern_dense_leaves_nothing_to_choose(capsys):
    options = ("--shape", "32,64", "--pattern", "dense", "--dtype", "bfloat16", "--rows", "2")
    assert "there is nothing to choose" in error(capsys, "tune", *options)

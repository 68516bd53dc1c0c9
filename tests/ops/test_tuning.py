import json

import jax.numpy as jnp
import numpy as np
import pytest
from tuning_entries import entry

import slidejax as sj
from slidejax.ops import tuning
from slidejax.ops.tuning import Variant


def test_tables_are_merged_and_damaged_ones_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    path = tuning.record("Test GPU", [entry(1, {"dense": 3.0})])
    tuning.record("Test GPU", [entry(1, {"dense": 2.0}), entry(2, {"dense": 5.0})])
    assert [e["us"][Variant("dense")] for e in tuning.entries("Test GPU")] == [2.0, 5.0]
    assert json.loads(path.read_text())["device"] == "Test GPU"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"test-gpu\.json"):
        tuning.entries("Test GPU")


def test_shipped_tables_are_sound():
    for path in sorted(tuning._SHIPPED.glob("*.json")):
        for e in tuning._read(path):
            sj.Pattern.parse(e["pattern"])
            assert (
                np.dtype(jnp.dtype(e["dtype"]))
                and e["rows"] > 0
                and all(us > 0 for us in e["us"].values())
            )


def test_files_name_implementation_and_form_and_those_of_format_1_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    path = tuning.table_path("Test GPU")
    path.parent.mkdir()
    old = {"format": 1, "entries": [entry(1, {"hopper+prepared": 1.0, "hopper": 2.0})]}
    path.write_text(json.dumps(old))
    times = {Variant("hopper", "hopper"): 1.0, Variant("hopper"): 2.0}
    assert [e["us"] for e in tuning.entries("Test GPU")] == [times]
    mine = {Variant("mine", "its form"): 0.5, Variant("mine"): 3.0}
    tuning.record("Test GPU", [entry(2, mine)])
    assert [e["us"] for e in tuning.entries("Test GPU")] == [times, mine]
    table = json.loads(path.read_text())
    assert table["format"] == 2 and table["entries"][1] == {
        **{name: value for name, value in entry(2, {}).items() if name != "us"},
        "times": [
            {"implementation": "mine", "form": "its form", "us": 0.5},
            {"implementation": "mine", "form": None, "us": 3.0},
        ],
    }
    path.write_text(json.dumps({"format": 2, "entries": [entry(1, {"dense": 1.0})]}))
    with pytest.raises(ValueError, match="damaged entry"):
        tuning.entries("Test GPU")


def test_an_h100_has_its_own_measurements_and_lends_the_others_of_an_h200(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    found = {
        (e["in"], e["out"], e["pattern"], e["dtype"], e["rows"]): e["us"]
        for e in tuning.entries("NVIDIA H100 80GB HBM3")
    }
    assert tuning.Variant("decode") in found[3584, 4608, "6:8", "int8", 1]
    assert (3584, 4608, "2:4", "int8", 4096) in found  # measured on an H200 alone
    # An H200's own measurement wins over the H100's.
    [own] = [
        e["us"]
        for e in tuning.entries("NVIDIA H200")
        if (e["in"], e["out"], e["pattern"], e["dtype"], e["rows"])
        == (3584, 4608, "6:8", "int8", 4096)
    ]
    assert own != found[3584, 4608, "6:8", "int8", 4096]

import json
import os
import subprocess
import sys

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
    for use in (lambda: tuning.record("Test GPU", []), lambda: tuning.check_record("Test GPU")):
        with pytest.raises(ValueError, match=r"test-gpu\.json"):
            use()
    assert path.read_text() == "{"


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
    assert table["format"] == 3 and table["entries"][1] == {
        **{name: value for name, value in entry(2, {}).items() if name != "us"},
        "times": [
            {"implementation": "mine", "form": "its form", "us": 0.5},
            {"implementation": "mine", "form": None, "us": 3.0},
        ],
    }
    path.write_text(json.dumps({"format": 2, "entries": [entry(1, {"dense": 1.0})]}))
    with pytest.raises(ValueError, match="damaged entry"):
        tuning.check_record("Test GPU")


BAD_TABLES = {
    "cut short": '{"format": 1, "entr',
    "empty": "",
    "deep": "[" * 100_000,
    "newer": json.dumps({"format": 99, "entries": []}),
    "no checksum": json.dumps({"format": 3, "entries": []}),
    "wrong checksum": json.dumps({"format": 3, "entries": [], "sha256": "0"}),
    "old with a checksum": json.dumps({"format": 2, "entries": [], "sha256": "0"}),
    "a time of nan": json.dumps({"format": 1, "entries": [entry(1, {"dense": float("nan")})]}),
} | {
    str(change): json.dumps({"format": 1, "entries": [entry(1, {"dense": 1.0}) | change]})
    for change in (
        {"us": {"dense": -1}},
        {"us": {"dense": 0}},
        {"us": {"dense": "fast"}},
        {"us": {"dense": True}},
        {"us": None},
        {"us": [1]},
        {"rows": 0},
        {"in": -1},
        {"out": 1.5},
        {"dtype": None},
        {"pattern": "3:4"},
        {"pattern": []},
    )
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_is_not_used_and_not_replaced(tmp_path, monkeypatch, name):
    """The choice goes on without it, after a warning; only `slidejax tune` stops."""
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    path = tuning.table_path("NVIDIA H200")
    path.parent.mkdir()
    path.write_text(BAD_TABLES[name])
    w, x = sj.pack(jnp.ones((64, 32)), "6:8", dtype="int8"), jnp.ones((4, 64))
    with pytest.warns(UserWarning, match="measurements are not used: .*nvidia-h200"):
        assert len(tuning.entries("NVIDIA H200")) > 0  # the shipped ones
    [(_, choice)] = sj.explain(sj.linear, x, w, platform="cuda")
    assert choice.implementation in sj.implementations()
    with pytest.raises(ValueError, match=r"nvidia-h200\.json"):
        tuning.record("NVIDIA H200", [entry(1, {"dense": 3.0})])
    assert path.read_text() == BAD_TABLES[name]


def test_no_home_is_needed(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SLIDEJAX_CACHE", raising=False)
    monkeypatch.setattr(tuning.Path, "home", no_home)
    tuning._warn.cache_clear()
    with pytest.warns(UserWarning, match="SLIDEJAX_CACHE must name a folder"):
        assert len(tuning.entries("NVIDIA H200")) > 0
    with pytest.raises(ValueError, match="SLIDEJAX_CACHE"):
        tuning.check_record("NVIDIA H200")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not used"):
        assert len(tuning.entries("NVIDIA H200")) > 0
    with pytest.raises(OSError, match="file"):
        tuning.check_record("NVIDIA H200")


def test_nothing_bad_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    for us in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="positive and finite"):
            tuning.record("Test GPU", [entry(1, {"dense": us})])
    assert tuning.entries("Test GPU") == ()


_WRITERS = """
import os
from slidejax.ops import tuning
children = []
for child in range(12):
    children.append(os.fork())
    if children[-1] == 0:
        for n in range(4):
            one = {"in": 64 + child, "out": 64 + n, "pattern": "6:8", "dtype": "int8", "rows": 1}
            tuning.record("cpu", [one | {"us": {"dense": 1.0}}])
        os._exit(0)
print({os.waitpid(child, 0)[1] for child in children}, len(tuning.entries("cpu")))
print(os.listdir(tuning.table_path("cpu").parent))
"""


def test_no_entry_of_several_writers_is_lost(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _WRITERS],
        env={**os.environ, "SLIDEJAX_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "{0} 48\n['cpu.json']\n", ran.stderr


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

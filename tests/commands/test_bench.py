"""`slidejax bench` on a CPU."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import output


def test_bench_on_a_cpu(capsys):
    options = [
        "--shape",
        "64,96",
        "-M",
        "2,4",
        "--patterns",
        "6:8,dense",
        "--dtypes",
        "int8",
        "--seconds",
        "0.01",
    ]
    got = json.loads(output(capsys, "bench", *options, "--warmup", "0.001", "--json"))
    found = [(e["out"], e["in"], e["rows"], e["pattern"]) for e in got["linear"]]
    assert found == [(64, 96, m, p) for m in (2, 4) for p in ("6:8", "dense")]
    for entry in got["linear"]:
        assert {"jax bf16", "jax int8", "jax fp8"} <= entry["us"].keys()
        assert all(us is None or us > 0 for us in entry["us"].values())
        assert ("CUDA" if entry["pattern"] == "6:8" else "no zeros to skip") in entry["refused"][
            "hopper"
        ]
    assert [(s["rows"], s["pattern"]) for s in got["sums"]] == [
        (m, p) for m in (2, 4) for p in ("6:8", "dense")
    ]
    assert all(e["gb_per_s"] > 0 and e["copy_gb_per_s"] > 0 for e in got["lift"])

"""`slidejax bench` on a CPU."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import error, output, usage_error

LENGTH = f"from 1 to {2**20}"


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
    assert [(e["rows"], e["pattern"]) for e in got["normed"]] == [
        (m, p) for m in (2, 4) for p in ("6:8", "dense")
    ]
    assert [(s["rows"], s["pattern"]) for s in got["sums"]] == [
        (m, p) for m in (2, 4) for p in ("6:8", "dense")
    ]
    assert all(e["gb_per_s"] > 0 and e["copy_gb_per_s"] > 0 for e in got["lift"])


QUICK = ["--seconds", "0.0001", "--warmup", "0.0001", "--rounds", "1"]
TINY = ["--model", "tiny", "--layers", "1", "--context", "8", "--steps", "2", *QUICK]


def test_a_whole_model_on_a_cpu(capsys):
    options = ["--batch", "2", "--prefill", "none", "--pattern", "4:6", "--dtype", "bfloat16"]
    got = json.loads(output(capsys, "bench", *TINY, *options, "--json"))
    assert (got["model"], got["layers"], got["context"], got["steps"]) == ("tiny", 1, 8, 2)
    assert {row["workload"] for row in got["times"]} == {"decode 2"}
    ours = {"4:6 bfloat16 raw", "4:6 bfloat16 prepared", "dense int8"}
    assert ours <= got["contenders"].keys()
    assert all(len(row["rounds"]) == 1 for row in got["times"])


def test_a_prefill_alone(capsys):
    got = json.loads(
        output(capsys, "bench", *TINY, "--batch", "none", "--prefill", "1x4", "--json")
    )
    assert {row["workload"] for row in got["times"]} == {"prefill 1x4"}


def test_a_whole_model_prints_its_table_and_a_profile_needs_a_gpu(capsys):
    said = output(capsys, "bench", *TINY, "--batch", "1", "--prefill", "1x4", "--profile")
    assert "jax bf16, decode 1: no GPU was profiled" in said
    assert "decode 1: one step" in said and "prefill 1x4: one prefill" in said
    assert "a CPU's times say nothing about a GPU" in said


@pytest.mark.parametrize(("flags", "said"), [
    (["--model", "gpt"], "argument --model: invalid choice: 'gpt'"),
    (["--layers", "0"], "argument --layers: must be from 1 to 1000, got '0'"),
    (["--batch", "1,many"], f"argument --batch: must be a whole number {LENGTH}, got 'many'"),
    (["--batch", ","], "argument --batch: must be names with commas between them, got ','"),
    (["--prefill", "8"], "argument --prefill: must be SEQUENCESxTOKENS such as 8x512, or none"),
    (["--prefill", "8x0"], f"argument --prefill: must be {LENGTH}, got '0' in '8x0'"),
    (["--prefill", "ax8"], f"argument --prefill: must be a whole number {LENGTH}, got 'a' in 'ax8'"),
    (["--prefill", "99999x99999"], f"argument --prefill: must be at most {2**24} tokens together"),
    (["--context", "-1"], f"argument --context: must be {LENGTH}, got '-1'"),
    (["--steps", "1.5"], f"argument --steps: must be a whole number {LENGTH}, got '1.5'"),
    (["--rounds", "0"], "argument --rounds: must be from 1 to 20, got '0'"),
    (["--pattern", "5:8"], "argument --pattern: pattern must be"),
    (["--dtype", "int4"], "argument --dtype: dtype must be"),
    (["--seconds", "inf"], "argument --seconds: must be above 0 and at most 3600, got 'inf'"),
    (["--warmup", "inf"], "argument --warmup: must be above 0 and at most 3600, got 'inf'"),
    (["--json", ""], "argument --json: must be a file to write, or -, got ''"),
    (["--json", "."], "argument --json: must be a file to write, or -, got '.'"),
    (["--json", f"{__file__}/x"], "argument --json: must be a file that can be written, got"),
])  # fmt: skip
def test_bad_values_are_named(capsys, flags, said):
    assert said in usage_error(capsys, "bench", "--model", "tiny", *flags)


@pytest.mark.parametrize(("flags", "said"), [
    ("--layers 3", "--layers goes with --model only, got --layers 3"),
    ("--prefill 8x512,1x2", "--prefill goes with --model only, got --prefill 8x512,1x2"),
    ("--prefill none", "--prefill goes with --model only, got --prefill none"),
    ("--model tiny --rows 1,2", "--rows does not go with --model, got --rows 1,2"),
    ("--model tiny --shape 3,4", "--shape does not go with --model, got --shape 3,4"),
    ("--model tiny --preset smollm2", "--preset does not go with --model"),
    ("--batch none", "--batch goes with --model only, got --batch none"),
    ("--profile", "--profile goes with --model only, got --profile"),
    ("--at-once 4", "--at-once goes with --model only, got --at-once 4"),
    ("--model tiny --batch none --prefill none", "leave nothing to time"),
    ("--model tiny --steps 9 --context 8", "--steps must be at most --context, 8, got 9"),
    ("--model tiny --steps 600", "--steps must be at most --context, 512, got 600"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_named(capsys, flags, said):
    assert said in error(capsys, "bench", *flags.split())

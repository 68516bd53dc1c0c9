"""compute-sanitizer over the kernels, and how its reports are read."""

import os
import shutil
import subprocess

import cuda_sanitizer as sanitizer
import pytest

MEMCHECK = """\
========= COMPUTE-SANITIZER
lift rows: bfloat16 to int8, group 8, [1, 7]: 123
========= Invalid __global__ read of size 4 bytes
=========     at void slidejax::lift::RingKernel<float, (int)4>(const float *)+0x70 in ring.cuh:8
=========     by thread (31,0,0) in block (0,0,0)
=========     Access at 0x7f5a is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f00 of size 124 bytes
=========
========= Invalid __global__ read of size 4 bytes
=========     at void slidejax::lift::RingKernel<float, (int)4>(const float *)+0x70 in ring.cuh:8
=========     by thread (30,0,0) in block (0,0,0)
=========
========= Invalid __global__ write of size 2 bytes
=========     at Other(float *)+0x90 in other.cu:3
=========
lift cast: bfloat16 to float32, group 8, [1, 7]: FAILED: nan in element 0 of a result of 1 float32
2 cases, 1 failed
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at Race(float *)+0x90 in planted.cu:13
=========     and Read access at Race(float *)+0xb0 in planted.cu:14 [64 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = """\
========= COMPUTE-SANITIZER
decode int8 own: bfloat16 by int8, group 8, [1, 64] to 37: 5
1 cases, 0 failed
========= ERROR SUMMARY: 0 errors
"""


def test_reports_of_one_kind_are_counted():
    first, second = sanitizer.reports(MEMCHECK)
    assert (first.count, first.where) == (2, "RingKernel ring.cuh:8")
    assert first.what == "Invalid __global__ read of size 4 bytes"
    assert "1 bytes after the nearest allocation" in first.text
    assert (second.count, second.where) == (1, "Other other.cu:3")
    (race,) = sanitizer.reports(RACECHECK)
    assert race.what == "Error: Race reported between Write access"
    assert race.where == "Race planted.cu:13" and "64 hazards" in race.text
    assert sanitizer.reports(CLEAN) == []


def test_what_racecheck_cannot_follow_is_left_out_in_its_functions_alone():
    function = (
        "slidejax::decode::Decoder<signed char, (int)3, (int)1>::Contribute(const Item &, int)"
    )
    race = RACECHECK.replace("Race(float *)", function)
    for tool, text, count in [("racecheck", race, 0), ("memcheck", race, 1)]:
        run = sanitizer.Run(tool, "decode", text, "", 1.0)
        assert len(sanitizer.unexplained(run)) == count and len(sanitizer.reports(text)) == 1
    run = sanitizer.Run("racecheck", "lift", RACECHECK, "", 1.0)
    assert [report.where for report in sanitizer.unexplained(run)] == ["Race planted.cu:13"]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("Race(float *)", "Race"),
        ("void a::b::Kernel<int, (a::Form)1>(a::Params)", "Kernel"),
        ("a::(anonymous namespace)::FillKernel(a::DType, void *, long, bool)", "FillKernel"),
    ],
)
def test_names_of_kernels(function, name):
    assert sanitizer.kernel_name(function) == name


def test_the_summary_names_what_was_found_and_what_is_not_whole():
    runs = [
        sanitizer.Run("memcheck", "lift", MEMCHECK, "", 1.0),
        sanitizer.Run("memcheck", "lift", MEMCHECK, "out of time", 2.0),
        sanitizer.Run("memcheck", "decode", CLEAN, "", 0.5),
        sanitizer.Run("none", "decode", CLEAN.replace(": 5", ": 6"), "", 0.5),
    ]
    assert [len(run.results) for run in runs] == [2, 2, 1, 1]
    (other,) = sanitizer.different(runs)
    assert other.startswith("memcheck decode int8 own:") and other.endswith(": 5 instead of 6")
    lines = sanitizer.summary(runs)
    assert lines[1].split() == ["memcheck", "decode", "1", "0", "0.5"]
    assert lines[2].split() == ["memcheck", "lift", "4", "6", "2.0"]
    assert "memcheck lift: out of time" in lines
    assert any(line.startswith("memcheck, 4 times: Invalid __global__ read") for line in lines)


def test_the_cases_fit_the_kernels_they_launch():
    """The host's code of the cases is read by a compiler; the kernels are not compiled."""
    headers = "/usr/local/cuda/include"
    if shutil.which("g++") is None or not os.path.exists(f"{headers}/cuda_runtime.h"):
        pytest.skip("needs g++ and CUDA's headers")
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{sanitizer.ROOT / 'cuda'}"]
    command += ["-isystem", headers, *sanitizer.CASES.glob("*.cc")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    if reason := sanitizer.missing():
        pytest.skip(reason)
    if os.environ.get("SLIDEJAX_TEST_SANITIZER") != "1":
        pytest.skip("takes minutes; SLIDEJAX_TEST_SANITIZER=1 asks for it")
    return list(sanitizer.run_all(sanitizer.build(tmp_path_factory.mktemp("sanitize")), 600))


@pytest.mark.gpu
def test_every_tool_finds_the_fault_that_was_planted_for_it(runs, on_hopper):
    planted = {run.tool: run for run in runs if run.kernels.startswith("planted")}
    assert [name for name in sanitizer.TOOLS if not sanitizer.reports(planted[name].text)] == []


@pytest.mark.gpu
def test_no_tool_finds_a_fault_in_a_kernel(runs, on_hopper):
    ours = [run for run in runs if sanitizer.is_ours(run)]
    found = any(sanitizer.unexplained(run) or run.ended for run in ours)
    assert not found and not sanitizer.different(ours), "\n".join(sanitizer.summary(ours))

"""The problems that the decode kernel takes. tests/cuda/test_decode.py tests its results."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

import slidejax as sj
from slidejax.ops.cuda import library
from slidejax.ops.implementations.decode import DECODE
from slidejax.ops.problem import Problem

INT8, FLOAT8 = jnp.dtype("int8"), jnp.dtype("float8_e4m3fn")


def problem(device="NVIDIA L4", **changes):
    bf16 = jnp.dtype("bfloat16")
    sizes = (1, 64, 32, sj.Pattern.parse("6:8"))
    taken = Problem("linear", "cuda", device, *sizes, bf16, INT8, bf16)
    return dataclasses.replace(taken, **changes)


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(capability, built)`: a GPU, and a library built for these architectures."""

    def present(capability, built="80,86,89-real,90a-real,120"):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(library, "build_info", lambda: {"architectures": built})
        monkeypatch.setattr(library, "on_gpu", lambda: True)
        monkeypatch.setattr(library, "missing", lambda: None)
        monkeypatch.setattr(jax, "devices", lambda *_: [device])

    return present


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": 8}, None),
        ({"rows": 8, "in_features": 50_000}, None),
        ({"rows": 16, "in_features": 2560}, None),
        ({"rows": 16, "in_features": 2561}, "at most 8 rows of int8 with 2561 inputs, not 16"),
        ({"rows": 16, "in_features": 5120, "pattern": sj.Pattern.parse("dense")}, None),
        ({"rows": 17}, "at most 16 rows, not 17"),
        ({"rows": 16, "in_features": 50_000, "dtype": jnp.dtype("float16")}, None),
        ({"rows": 17, "dtype": jnp.dtype("bfloat16")}, "at most 16 rows, not 17"),
        ({"op": "sparse_matmul"}, "linear alone"),
        ({"dtype": jnp.dtype("bfloat16")}, None),
        ({"dtype": jnp.dtype("float16")}, None),
        ({"dtype": jnp.dtype("float32")}, "bfloat16 or float16, not float32"),
        ({"platform": "default"}, "CUDA"),
    ],
)
def test_what_is_refused(gpu, changes, reason):
    gpu("8.9")
    found = DECODE.refuses(problem(**changes))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("device", "capability", "built", "reason"),
    [
        ("NVIDIA A100-SXM4-40GB", "8.0", "80-real,90a", "capability 8.9 or later, not 8.0"),
        ("NVIDIA A10", "8.6", "80,86", "not 8.6"),
        ("NVIDIA L4", "8.9", "80,89", None),
        ("NVIDIA L4", "8.9", "80", "not 8.0"),  # old code on a new GPU
        ("NVIDIA GeForce RTX 5090", "12.0", "90,120", None),
    ],
)
def test_float8_needs_code_that_multiplies_it(gpu, device, capability, built, reason):
    gpu(capability, built)
    assert DECODE.refuses(problem(device)) is None
    found = DECODE.refuses(problem(device, dtype=FLOAT8))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("rows", range(1, 9))
def test_more_than_two_rows_of_float8_are_left_to_the_hopper_kernel(rows):
    device = "NVIDIA H100 80GB HBM3"
    found = DECODE.refuses(problem(device, dtype=FLOAT8, rows=rows, in_features=50_000))
    assert found is None if rows <= 2 else "run in the Hopper kernel" in found
    assert DECODE.refuses(problem(device, dtype=FLOAT8, rows=rows)) is None  # x is small

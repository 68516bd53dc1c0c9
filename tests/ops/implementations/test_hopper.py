"""The implementation "hopper" as it is lowered without a GPU; tests/cuda runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.ops.implementations import hopper
from slidejax.ops.implementations.hopper import HOPPER, HopperWeight

DTYPES = (jnp.int8, jnp.float8_e4m3fn)
cpu_only = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="tests what a machine without a GPU does"
)


def problem(rows, columns, out, pattern="6:8", dtype=jnp.int8, seed=0):
    rng = np.random.default_rng(seed)
    w = sj.pack(jnp.asarray(rng.standard_normal((columns, out)), jnp.float32), pattern, dtype=dtype)
    lifted, scale = sj.lift_quantize(
        jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32), pattern, dtype
    )
    return lifted, scale, w, jnp.asarray(rng.standard_normal(out), jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_accumulators_are_what_a_mesh_can_sum(dtype):
    """If K is split over a mesh, int8 operands give int32 results, and e4m3 gives float32."""
    lifted, scale, w, _ = problem(16, 128, 64, dtype=dtype)
    traced = jax.jit(lambda lifted, scale: HOPPER.matmul(lifted, scale, w, None, None)).trace(
        lifted, scale
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    [call] = [line for line in text.splitlines() if "slidejax_sparse_matmul_hopper" in line]
    assert f"tensor<16x64x{'i32' if dtype == jnp.int8 else 'f32'}>" in call.rsplit("->", 1)[1]


@cpu_only
@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("NVIDIA H100 80GB HBM3", "int8", None),
        ("NVIDIA GH200 480GB", "float8_e4m3fn", None),
        ("NVIDIA A100-SXM4-80GB", "int8", "needs a Hopper GPU"),
        ("NVIDIA H200", "bfloat16", "values must be int8 or float8_e4m3fn, not bfloat16"),
    ],
)
def test_devices_and_dtypes_that_it_refuses(device, dtype, reason):
    got = hopper.refuses_device(device, jnp.dtype(dtype))
    assert got is None if reason is None else reason in got


@pytest.mark.parametrize(("rows", "one_call"), [(64, True), (65, False)])
def test_few_rows_are_lifted_and_multiplied_in_one_call(rows, one_call):
    w = sj.pack(jnp.ones((128, 64)), "6:8", dtype="int8")
    run = jax.jit(lambda x: sj.linear(x, w, implementation="hopper"))
    x = jax.ShapeDtypeStruct((rows, 128), jnp.bfloat16)
    text = run.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert ("slidejax_linear_hopper" in text) == one_call
    assert ("slidejax_sparse_matmul_hopper" in text) != one_call


@cpu_only
def test_workspace_ahead_of_time_holds_metadata_that_is_not_prepared(monkeypatch):
    """Where the library is not there, nobody knows whether the tile makes its metadata itself."""
    monkeypatch.setattr("slidejax.ops.implementations.hopper._module", lambda: None)
    w = sj.pack(jnp.ones((128, 70)), "6:8", dtype="int8")
    size = 2 * 2 * 1024  # 70 outputs fill two pieces of 64, 192 lifted columns one pair of 128
    assert HopperWeight.packed(w).workspace_bytes(16) == 256 + size
    held = w.replace(prepared={"hopper": jnp.zeros(size, jnp.uint8)})
    assert HopperWeight.packed(held).workspace_bytes(16) == 256
    dense = HopperWeight.dense(jnp.zeros((70, 128), jnp.int8), jnp.ones(70))
    assert dense.workspace_bytes(16) == 256 and dense.group == 0

"""The decode kernels, compiled for the CPU and run thread by thread (cuda_on_cpu/), against the
formulas.

Each case draws another order of the threads, and asynchronous copies arrive as early or as late as
they may. Reads beyond the arrays are found, and so are writes beyond a block's shared memory. Each
tensor-core instruction is computed from the fragments of all lanes.
"""

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import cuda_formulas as formulas
import jax.numpy as jnp
import numpy as np
import pytest
from patterns import PATTERNS

import slidejax as sj

ROOT = Path(__file__).parents[2]
DTYPES = ["int8", "float8_e4m3fn", "bfloat16", "float16"]
X_DTYPES = ["bfloat16", "float16", "float32"]
DEVICES = [(132, 232448), (108, 166912), (46, 101376), (2, 232448)]  # multiprocessors, bytes
AROUND = 64  # bytes on both sides of y


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    target = tmp_path_factory.mktemp("emulated") / "decode.so"
    cuda, own = (ROOT / "tests/cuda" / name for name in ("cuda_on_cpu", "decode_on_cpu"))
    # The emulator's folders come first: their headers take the place of those of the same name.
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing"]
    flags += ["-ffp-contract=off", f"-I{cuda}", f"-I{own}", f"-I{ROOT / 'cuda'}"]
    sources = [cuda / "emulator.cc", own / "decode.cc"]
    subprocess.run(["g++", *flags, "-x", "c++", *sources, "-o", target], check=True)
    return ctypes.CDLL(str(target))


def in_memory(array, at=0):
    """The array's bytes, which begin `at` bytes behind a multiple of 64."""
    if array is None:
        return None
    array = np.ascontiguousarray(array)
    whole = np.zeros(array.nbytes + 128, np.uint8)
    begin = -whole.ctypes.data % 64 + at
    whole[begin : begin + array.nbytes] = array.view(np.uint8).reshape(-1)
    return whole[begin : begin + array.nbytes]


def pointer(part):
    return None if part is None else ctypes.c_void_p(part.ctypes.data)


def run(library, x, w, bias, residual, out_dtype, device, at, lazy, seed):
    """y of one call."""
    rows, out = x.shape[0], w.out_features
    group = w.pattern.group if w.pattern.prunes else 0
    size = rows * out * jnp.dtype(out_dtype).itemsize
    y = np.full(size + 2 * AROUND, 0xCD, np.uint8)
    given = [in_memory(x, at)]
    given += [in_memory(a) for a in (w.values, w.zeros, w.scale, bias, residual)]
    of_x, values, zeros, scale, of_bias, of_residual = (pointer(part) for part in given)
    name = str(x.dtype).encode(), str(w.dtype).encode(), str(jnp.dtype(out_dtype)).encode()
    status = library.decode(
        *(of_x, name[0], values, name[1], zeros, scale, of_bias, of_residual),
        *(ctypes.c_void_p(y.ctypes.data + AROUND), name[2]),
        *(rows, out, x.shape[1], group, w.groups // 8, *device, lazy, seed),
    )
    assert status == 0
    assert (y[:AROUND] == 0xCD).all() and (y[AROUND + size :] == 0xCD).all()
    return y[AROUND : AROUND + size].view(jnp.dtype(out_dtype)).reshape(rows, out)


def compare(y, x, w, bias, residual, out_dtype):
    """int8 bit for bit; sums of float terms within a millionth of the sum of their magnitudes."""
    finite = np.isfinite(np.asarray(x, np.float32)).all(1)
    assert np.isnan(np.asarray(y, np.float32)[~finite]).all()
    with np.errstate(invalid="ignore"):
        want = formulas.linear(x, w, bias, jnp.dtype(out_dtype), residual)
    if w.dtype == jnp.int8:
        np.testing.assert_array_equal(formulas.bits(y)[finite], formulas.bits(want)[finite])
        return
    codes, weight, scale = formulas.operands(x, w)
    magnitude = formulas.accumulate(np.abs(codes), np.abs(weight)) * scale[:, None]
    magnitude = magnitude * np.asarray(w.scale) + sum(
        np.abs(np.asarray(term, np.float64)) for term in (bias, residual) if term is not None
    )
    step = 2 * float(jnp.finfo(out_dtype).eps)
    got, want = np.asarray(y, np.float64), np.asarray(want, np.float64)
    assert (np.abs(got - want)[finite] <= (1e-6 * magnitude + step * np.abs(want))[finite]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_order_of_threads(library, pattern, dtype):
    rng = random.Random(f"{pattern} {dtype}")
    for rows in (rng.choice([1, 1, 2]), rng.choice([3, 4, 5, 8])):
        columns = rng.choice([rng.randint(1, 700), 8 * rng.randint(1, 80), 64 * rng.randint(1, 30)])
        out, seed = rng.randint(1, 40), rng.randint(0, 99)
        kernel = np.random.default_rng(seed).standard_normal((columns, out), np.float32)
        w = sj.pack(jnp.asarray(kernel), pattern, dtype=dtype)
        x_dtype, out_dtype = rng.choice(X_DTYPES), rng.choice(["bfloat16", "float32"])
        x = jnp.asarray(formulas.values(rows, columns, np.float32, seed)).astype(x_dtype)
        if rng.random() < 0.3:
            x = x.at[0, columns - 1].set(rng.choice([np.nan, np.inf]))
        bias = rng.choice([None, kernel[0]])
        residual = rng.choice([None, jnp.ones((rows, out), x_dtype)])
        at = rng.choice([0, 0, 0, 4])  # of x: rows that start anywhere are converted ahead
        run_with = rng.choice(DEVICES), at, rng.randint(0, 1), rng.randint(0, 10**6)
        y = run(library, x, w, bias, residual, out_dtype, *run_with)
        compare(y, x, w, bias, residual, out_dtype)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_k_in_slices(library, dtype):
    """Where shared memory does not hold the codes of all of K."""
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((12000, 5)), jnp.float32)
    w = sj.pack(kernel, "6:8", dtype=dtype)
    x = jnp.asarray(formulas.values(8, 12000, np.float32)).astype("bfloat16")
    y = run(library, x, w, None, None, "float32", (46, 101376), 0, 1, 0)
    compare(y, x, w, None, None, "float32")

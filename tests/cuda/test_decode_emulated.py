"""The decode kernels, compiled for the CPU and run thread by thread (cuda_on_cpu/), against the
formulas.

Each case draws another order of the threads, and asynchronous copies arrive as early or as late as
they may. Reads beyond the arrays are found, and so are writes beyond a block's shared memory. Each
tensor-core instruction is computed from the fragments of all lanes.
"""

import ctypes
import random

import cuda_emulator
import cuda_formulas as formulas
import jax.numpy as jnp
import numpy as np
import pytest
from patterns import PATTERNS

import slidejax as sj

DTYPES = ["int8", "float8_e4m3fn", "bfloat16", "float16"]
X_DTYPES = ["bfloat16", "float16", "float32"]
DEVICES = [(132, 232448), (108, 166912), (46, 101376), (2, 232448)]  # multiprocessors, bytes
AROUND = 64  # bytes on both sides of y


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_emulator.load(tmp_path_factory, "decode")


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


class Stage(ctypes.Structure):
    """A call of a chain, as decode_on_cpu/decode.cc has it."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_type", ctypes.c_char_p),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("values", ctypes.c_void_p),
        ("type", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in ("zeros", "scale", "bias", "residual", "y")),
        ("y_type", ctypes.c_char_p),
        ("activation", ctypes.c_char_p),
        *((name, ctypes.c_int) for name in ("rows", "out", "columns", "group", "blocks")),
    )


class Call:
    """A call of the kernel: its operands in memory of their own, and room for its results.

    Args:
      x: `[rows, in]`, or the `Call` whose results it takes.
      w: the weight.
      out_dtype: of the results.
      bias, residual, norm: arrays or None. The residual may also be a `Call`.
      activation: of a gate; None for none.
      at: how many bytes behind a multiple of 64 x begins.
    """

    def __init__(
        self, x, w, out_dtype, bias=None, residual=None, norm=None, activation=None, at=0, eps=1e-6
    ):
        self.x, self.w, self.bias, self.residual, self.norm = x, w, bias, residual, norm
        self.activation, self.eps, self.dtype = activation, eps, jnp.dtype(out_dtype)
        self.rows, self.columns = x.shape
        self.shape = self.rows, w.out_features // (1 if activation is None else 2)
        self.size = self.shape[0] * self.shape[1] * self.dtype.itemsize
        self.memory = np.full(self.size + 2 * AROUND, 0xCD, np.uint8)
        self.memory = in_memory(self.memory)
        arrays = (w.values, w.zeros, w.scale, bias, norm)
        self.kept = [in_memory(None if a is None else np.asarray(a)) for a in arrays]
        self.given = in_memory(x, at) if not isinstance(x, Call) else x.result
        self.added = residual.result if isinstance(residual, Call) else in_memory(residual)

    @property
    def result(self):
        return self.memory[AROUND : AROUND + self.size]

    def stage(self):
        values, zeros, scale, bias, norm = (pointer(part) for part in self.kept)
        x_dtype = self.x.dtype
        group = self.w.pattern.group if self.w.pattern.prunes else 0
        activation = None if self.activation is None else self.activation.encode()
        return Stage(
            *(pointer(self.given), str(x_dtype).encode(), norm, self.eps),
            *(values, str(self.w.dtype).encode(), zeros, scale, bias, pointer(self.added)),
            *(pointer(self.result), str(self.dtype).encode(), activation),
            *(self.rows, self.shape[1], self.columns, group, self.w.groups // 8),
        )

    def y(self):
        around = self.memory[:AROUND], self.memory[AROUND + self.size :]
        assert all((part == 0xCD).all() for part in around)
        return self.result.view(self.dtype).reshape(self.shape).copy()


def run_chain(library, calls, device, lazy, seed):
    """The results of calls in one chain."""
    stages = (Stage * len(calls))(*(call.stage() for call in calls))
    assert library.decode_chain(stages, len(calls), *device, lazy, seed) == 0
    return [call.y() for call in calls]


def run(library, x, w, bias, residual, out_dtype, device, at, lazy, seed):
    """y of one call."""
    call = Call(x, w, out_dtype, bias, residual, at=at)
    return run_chain(library, [call], device, lazy, seed)[0]


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


def more_rows(rng, dtype):
    """More rows than the kernel without tensor cores takes. Often they are two tiles or groups."""
    return rng.choice([3, 4, 5, 8, 9, 11, 16])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_are_those_of_slidejax(dtype):
    for pattern in PATTERNS:
        kernel = np.random.default_rng(0).standard_normal((130, 5), np.float32)
        ours, theirs = formulas.pack(kernel, pattern, dtype), sj.pack(kernel, pattern, dtype=dtype)
        for name in ("values", "zeros", "scale"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(formulas.bits(a), formulas.bits(b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_order_of_threads(library, pattern, dtype):
    rng = random.Random(f"{pattern} {dtype}")
    for rows in (rng.choice([1, 1, 2]), more_rows(rng, dtype)):
        columns = rng.choice([rng.randint(1, 700), 8 * rng.randint(1, 80), 64 * rng.randint(1, 30)])
        out, seed = rng.randint(1, 40), rng.randint(0, 99)
        kernel = np.random.default_rng(seed).standard_normal((columns, out), np.float32)
        w = formulas.pack(kernel, pattern, dtype)
        x_dtype, out_dtype = jnp.dtype(rng.choice(X_DTYPES)), rng.choice(["bfloat16", "float32"])
        x = formulas.values(rows, columns, np.float32, seed).astype(x_dtype)
        if rng.random() < 0.3:
            x[0, columns - 1] = rng.choice([np.nan, np.inf])
        bias = rng.choice([None, kernel[0]])
        residual = rng.choice([None, np.ones((rows, out), x_dtype)])
        at = rng.choice([0, 0, 0, 4])  # of x: rows that start anywhere are converted ahead
        run_with = rng.choice(DEVICES), at, rng.randint(0, 1), rng.randint(0, 10**6)
        y = run(library, x, w, bias, residual, out_dtype, *run_with)
        compare(y, x, w, bias, residual, out_dtype)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_many_tiles_of_many_steps_without_tensor_cores(library, pattern, dtype):
    """Two thread blocks have all of the weight, and its ends are inside a tile and a step."""
    rng = random.Random(f"{pattern} {dtype}")
    rows = rng.randint(1, 2)
    columns, out = 8 * rng.randint(200, 330), rng.randint(100, 150)
    kernel = np.random.default_rng(rows).standard_normal((columns, out), np.float32)
    w = formulas.pack(kernel, pattern, dtype)
    x = formulas.values(rows, columns, np.float32).astype(jnp.bfloat16)
    residual = np.ones((rows, out), jnp.bfloat16)
    schedule = rng.randint(0, 1), rng.randint(0, 10**6)
    y = run(library, x, w, kernel[0], residual, "float32", DEVICES[3], 0, *schedule)
    compare(y, x, w, kernel[0], residual, "float32")


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_k_in_slices(library, dtype):
    """Where shared memory does not hold the codes of all of K."""
    kernel = np.random.default_rng(0).standard_normal((12000, 5), np.float32)
    w = formulas.pack(kernel, "6:8", dtype)
    x = formulas.values(8, 12000, np.float32).astype(jnp.bfloat16)
    y = run(library, x, w, None, None, "float32", (46, 101376), 0, 1, 0)
    compare(y, x, w, None, None, "float32")


# --- norms, gates and chains ----------------------------------------------------------------------


def packed(pattern, dtype, columns, out, seed):
    kernel = np.random.default_rng(seed).standard_normal((columns, out), np.float32)
    return formulas.pack(kernel / np.float32(np.sqrt(columns)), pattern, dtype)


def normalised(x, weight, eps=1e-6):
    """x after the norm, each step in float32. The sum of squares must be exact."""
    v = np.asarray(x, np.float32)
    squares = (v * v).sum(1, keepdims=True, dtype=np.float32)
    mean = squares * (np.float32(1) / np.float32(v.shape[1]))
    factor = np.float32(1) / np.sqrt(mean + np.float32(eps))
    return (v * (factor * np.asarray(weight))).astype(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_a_norm(library, x_dtype, dtype):
    """Rows of small integers, whose squares have an exact sum."""
    rng = random.Random(f"{x_dtype} {dtype}")
    for rows in (rng.choice([1, 2, 4]), more_rows(rng, dtype)):
        pattern, columns = rng.choice(PATTERNS), rng.choice([8 * rng.randint(1, 80), 515, 1000])
        numbers = np.random.default_rng(rows)
        x = numbers.integers(-9, 10, (rows, columns)).astype(jnp.dtype(x_dtype))
        weight = 1 + numbers.standard_normal(columns, np.float32) / 4
        w = packed(pattern, dtype, columns, 24, rows)
        call = Call(x, w, "float32", norm=weight, at=rng.choice([0, 0, 4]))
        (y,) = run_chain(library, [call], rng.choice(DEVICES), rng.randint(0, 1), rows)
        compare(y, normalised(x, weight), w, None, None, "float32")


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_a_gate(library, activation, dtype):
    rng = random.Random(f"{activation} {dtype}")
    for rows in (1, rng.choice([2, more_rows(rng, dtype)])):
        pattern, half = rng.choice(PATTERNS), rng.randint(1, 40)
        w = packed(pattern, dtype, 200, 2 * half, rows)
        x = formulas.values(rows, 200, np.float32, rows).astype(jnp.bfloat16)
        bias = rng.choice([None, np.linspace(-1, 1, 2 * half, dtype=np.float32)])
        run_with = rng.choice(DEVICES), rng.randint(0, 1), rng.randint(0, 10**6)
        both = run(library, x, w, bias, None, "bfloat16", run_with[0], 0, *run_with[1:])
        call = Call(x, w, "bfloat16", bias, activation=activation)
        (y,) = run_chain(library, [call], *run_with)
        # One shape for all cases, so that JAX compiles one program for all of them.
        gate, up = (np.resize(part, 640) for part in np.split(both, 2, axis=1))
        want = np.asarray(sj.GLU(jnp.asarray(up), activation).apply(jnp.asarray(gate)))
        want = want[: y.size].reshape(y.shape)
        if activation == "relu":
            np.testing.assert_array_equal(formulas.bits(y), formulas.bits(want))
        np.testing.assert_allclose(
            y.astype(np.float32), want.astype(np.float32), rtol=2**-7, atol=1e-4
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["dense", "2:4", "6:8", "14:16"])
def test_a_chain_has_the_bits_of_its_calls(library, pattern, dtype):
    """The tail of a layer and the head of the next one, under any schedule.

    The emulator fails if a kernel reads what the chain writes before it has waited.
    """
    rng = random.Random(f"{pattern} {dtype}")
    for rows in (rng.choice([1, 2]), more_rows(rng, dtype)):
        hidden, inner = rng.choice([(40, 24), (64, 136), (48, 1000)])
        weights = [
            packed(pattern, dtype, *shape, seed)
            for seed, shape in enumerate(
                [(72, hidden), (hidden, 2 * inner), (inner, hidden), (hidden, 56)]
            )
        ]
        x = formulas.values(rows, 72, np.float32, rows).astype(jnp.bfloat16)
        stream = formulas.values(rows, hidden, np.float32, rows).astype(jnp.bfloat16)
        norms = np.random.default_rng(rows).standard_normal((2, hidden), np.float32)
        bias = rng.choice([None, np.ones(56, np.float32)])

        def calls(x, second, third, fourth, added, weights=weights, norms=norms, bias=bias):
            o = Call(x, weights[0], "bfloat16", residual=stream)  # noqa: B023
            gate_up = Call(second or o, weights[1], "bfloat16", norm=norms[0], activation="silu")
            down = Call(third or gate_up, weights[2], "bfloat16", residual=added or o)
            return (
                o,
                gate_up,
                down,
                Call(fourth or down, weights[3], "bfloat16", bias, None, norms[1]),
            )

        device = rng.choice(DEVICES)
        chain = calls(x, None, None, None, None)
        together = run_chain(library, chain, device, rng.randint(0, 1), rng.randint(0, 10**6))
        alone = calls(x, None, None, None, None)
        for call, y in zip(alone, together, strict=True):
            (one,) = run_chain(library, [call], device, rng.randint(0, 1), rng.randint(0, 10**6))
            np.testing.assert_array_equal(formulas.bits(one), formulas.bits(y))


def test_a_chain_where_shared_memory_holds_half_of_a_call(library):
    """A gate whose outputs are computed in two halves, or in more."""
    w = packed("2:4", "bfloat16", 2048, 400, 0)
    x = formulas.values(1, 2048, np.float32)
    device = (1, 16000)
    both = run(library, x, w, None, None, "float32", device, 0, 1, 0)
    (y,) = run_chain(library, [Call(x, w, "float32", activation="relu")], device, 1, 0)
    want = np.maximum(both[:, :200], 0) * both[:, 200:]
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * np.abs(want).max())

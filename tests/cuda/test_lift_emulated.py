"""The lift kernels, compiled for the CPU and run thread by thread (cuda_on_cpu/), against the
formulas.

Each case draws another order of the threads, and asynchronous copies arrive as early or as late as
they may, so that a missing barrier shows. Reads beyond the arrays are found, and so are writes
beyond the results and beyond a block's shared memory.
"""

import ctypes

import cuda_emulator
import cuda_formulas as formulas
import ml_dtypes
import numpy as np
import pytest

from slidejax.ops.cuda import prologues
from slidejax.ops.prologue import ACTIVATIONS

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
PROLOGUES = prologues.NAMES.values()
H100, A100, SMALL = 232448, 166912, 101376  # shared memory that a block may have
GROUPS = (0, 4, 6, 8, 10, 12, 14, 16)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_emulator.load(
        tmp_path_factory,
        "lift",
        "lift/lift.cu",
        "lift/fused.cu",
        "lift/geometry.cc",
    )


LINE = 128


def in_memory(array, at=32, around=0xCD):
    """The array's bytes, which begin at byte `at` of a line of memory, with `around` around them.

    Returns:
      (the whole memory, the array's bytes).
    """
    whole = np.full(array.nbytes + 3 * LINE, around, np.uint8)
    begin = LINE + (at - whole.ctypes.data) % LINE
    part = whole[begin : begin + array.nbytes]
    part[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return whole, part


def run(
    library,
    x,
    group,
    dtype,
    absmax=None,
    *,
    prologue="none",
    activation="silu",
    up=None,
    weight=None,
    bias=None,
    eps=1e-6,
    width=None,
    halves=False,
    multiprocessors=None,
    shared=H100,
    seed=0,
    at=(32, 32),
):
    """Codes and scales. With `halves` x has the gate and up. The seed also says when copies arrive,
    and whether rows share a multiprocessor; `at` says where in a line of memory x and up begin."""
    if multiprocessors is None:
        multiprocessors = 1 if seed // 2 % 2 else 16
    (rows, stride), dtype = x.shape, np.dtype(dtype)
    columns = stride // 2 if halves else stride
    if width is None:
        width = formulas.lift(np.zeros((1, columns), np.int8), group).shape[1]
    kept = [
        in_memory(a, begin) if a is not None else None
        for a, begin in ((x, at[0]), (absmax, 32), (up, at[1]), (weight, 32), (bias, 32))
    ]
    pointers = [ctypes.c_void_p(k[1].ctypes.data) if k is not None else None for k in kept]
    whole, lifted = in_memory(np.full(rows * width * dtype.itemsize, 0xCD, np.uint8))
    scale = np.full(rows, -7, np.float32)
    status = library.lift_quantize(
        pointers[0],
        x.dtype.name.encode(),
        *pointers[1:],
        ctypes.c_void_p(lifted.ctypes.data),
        dtype.name.encode(),
        ctypes.c_void_p(scale.ctypes.data),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_int64(stride),
        ctypes.c_int64(width),
        group,
        prologue.encode(),
        activation.encode(),
        ctypes.c_float(eps),
        multiprocessors,
        shared,
        seed % 2,
        seed,
    )
    assert status == 0, "an unknown name" if status == -1 else f"CUDA error {status}"
    inside = lifted.ctypes.data - whole.ctypes.data
    assert (whole[:inside] == 0xCD).all() and (whole[inside + lifted.size :] == 0xCD).all(), (
        "a write beyond the results"
    )
    return lifted.view(dtype).reshape(rows, width), scale


def check(library, x, group, dtype, absmax=None, **options):
    codes, scale = run(library, x, group, dtype, absmax, **options)
    expected, expected_scale = formulas.quantize(x, dtype, absmax)
    np.testing.assert_array_equal(scale, expected_scale)
    # Of unquantised rows with nan any nan will do.
    fine = np.isfinite(expected_scale) | (np.dtype(dtype).itemsize == 1)
    np.testing.assert_array_equal(
        codes[fine].astype(np.float32), formulas.lift(expected, group)[fine].astype(np.float32)
    )


@pytest.mark.parametrize("x_dtype", [BF16, np.float16, np.float32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("group", GROUPS)
def test_codes_and_scales(library, group, x_dtype):
    for seed, dtype in enumerate((np.int8, E4M3, BF16, np.float32)):
        for rows, columns in ((5, 448), (3, 1001)):
            check(
                library,
                formulas.values(rows, columns, x_dtype, seed=columns),
                group,
                dtype,
                seed=seed + group,
            )


@pytest.mark.parametrize(
    "columns", [1, 2, 7, 8, 15, 33, 129, 255, 257, 1999, 3584, 5003, 18944, 18943]
)
def test_any_number_of_columns(library, columns):
    for seed, group in enumerate((0, 6, 8, 14)):
        for x_dtype in (BF16, np.float32):
            check(
                library,
                formulas.values(3, columns, x_dtype, seed=columns),
                group,
                np.int8,
                seed=seed,
            )


def test_rows_that_do_not_fit_in_shared_memory_and_other_gpus(library):
    for columns in (65536, 70001):
        for x_dtype in (BF16, np.float32):
            check(library, formulas.values(2, columns, x_dtype), 8, np.int8)
    for shared in (A100, SMALL):
        for columns in (3584, 18943, 28672, 49152):
            for group in (0, 8, 14):
                check(
                    library,
                    formulas.values(3, columns, BF16),
                    group,
                    np.int8,
                    shared=shared,
                    seed=columns,
                )


@pytest.mark.parametrize("x_dtype", [BF16, np.float32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("rows", [1, 33, 70, 150])
def test_any_number_of_rows(library, rows, x_dtype):
    """With more rows than blocks the ring turns."""
    for seed, (columns, group, dtype) in enumerate(
        ((96, 8, np.int8), (100, 8, E4M3), (512, 0, np.int8), (515, 0, np.int8))
    ):
        for multiprocessors in (1, 3):
            for again in (0, 4):
                check(
                    library,
                    formulas.values(rows, columns, x_dtype),
                    group,
                    dtype,
                    multiprocessors=multiprocessors,
                    seed=seed + rows + again,
                )


@pytest.mark.parametrize("columns", [3584, 3583])
def test_many_rows_of_several_warps(library, columns):
    x = formulas.values(40, columns, BF16)
    for seed in range(4):
        check(library, x, 8, np.int8, seed=seed)


@pytest.mark.parametrize("columns", [1024, 5120, 8192, 8200, 11008, 23000, 28672])
def test_many_rows_of_every_length(library, columns):
    """Many rows keep a multiprocessor busy: the bytes of a row decide about blocks, warps and
    depth."""
    x = formulas.values(18, columns, BF16)
    for seed, group in enumerate((0, 6, 8)):
        check(library, x, group, np.int8, seed=seed)


@pytest.mark.parametrize("at", [(0, 0), (16, 112), (112, 0), (48, 64)])
def test_rows_begin_anywhere_in_a_line_of_memory(library, at):
    rng = np.random.default_rng(0)
    for seed, columns in enumerate((512, 515, 3583)):
        x, up = (rng.standard_normal((5, columns)).astype(BF16) for _ in range(2))
        for group in (0, 8):
            check(library, x, group, np.int8, seed=seed, at=at)
            for prologue, arguments in (
                ("glu", {"up": up}),
                ("rms_norm", {"weight": np.ones(columns, np.float32)}),
            ):
                check_prologue(
                    library,
                    prologue,
                    x,
                    group,
                    np.int8,
                    launch={"seed": seed, "at": at},
                    **arguments,
                )


@pytest.mark.parametrize("dtype", [np.int8, E4M3, BF16], ids=lambda d: np.dtype(d).name)
def test_rows_with_inf_nan_zero_and_given_absmax(library, dtype):
    for columns in (512, 515):
        for x_dtype in (BF16, np.float16, np.float32):
            x = formulas.values(8, columns, x_dtype)
            x[1, 3], x[2, columns - 1], x[3, 5], x[4], x[5] = np.inf, -np.inf, np.nan, 0, -0.0
            for group in (0, 8):
                check(library, x, group, dtype)
            absmax = np.abs(x.astype(np.float32)).max(1) * np.float32(0.5)  # clips
            if np.dtype(dtype).itemsize == 1:
                check(library, x, 8, dtype, absmax)


def test_quantise_only_pads(library):
    x = formulas.values(4, 1000, BF16)
    for width in (1000, 1003, 1024):
        codes, _ = run(library, x, 0, np.int8, width=width)
        np.testing.assert_array_equal(codes[:, :1000], formulas.quantize(x, np.int8)[0])
        assert (codes[:, 1000:] == 0).all()


# --- prologues ------------------------------------------------------------------------------------


def activated(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(__import__("math").erf)(x / np.sqrt(2)))


def after(prologue, x, *, activation="silu", up=None, weight=None, bias=None, eps=1e-6):
    """The prologue's formula in float64, rounded to x's dtype."""
    v = x.astype(np.float64)
    if prologue == "rms_norm":
        y = v / np.sqrt((v**2).mean(1, keepdims=True) + eps) * weight
    elif prologue == "layer_norm":
        y = (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + eps) * weight + (
            0 if bias is None else bias
        )
    else:
        y = activated(activation, v) * (1 if up is None else up.astype(np.float64))
    return y.astype(np.float32).astype(x.dtype)


def check_prologue(library, prologue, x, group, dtype, *, launch=None, **arguments):
    codes, scale = run(library, x, group, dtype, prologue=prologue, **arguments, **(launch or {}))
    y = after(prologue, x, **arguments)
    expected, expected_scale = formulas.quantize(y, dtype)
    expected = formulas.lift(expected, group)
    # float32 and float64 round y to different neighbours here and there
    np.testing.assert_allclose(scale, expected_scale, rtol=2e-5 if x.dtype == np.float32 else 8e-3)
    same_scale = np.abs(scale / expected_scale - 1) < 2e-5
    assert same_scale.mean() > 0.7
    difference = np.abs(codes.astype(np.float32) - expected.astype(np.float32))[same_scale]
    assert (difference > 0).mean() < 5e-3
    if np.dtype(dtype) == np.int8:
        assert difference.max() <= 1


def arguments_of(prologue, x, rng):
    vector = lambda: (1 + rng.standard_normal(x.shape[1]) / 4).astype(np.float32)  # noqa: E731
    return {
        "rms_norm": lambda: {"weight": vector()},
        "layer_norm": lambda: {"weight": vector(), "bias": vector(), "eps": 1e-5},
        "activation": lambda: {"activation": "gelu"},
        "glu": lambda: {"up": rng.standard_normal(x.shape).astype(x.dtype)},
    }[prologue]()


@pytest.mark.parametrize("x_dtype", [BF16, np.float16, np.float32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_prologues(library, prologue, x_dtype):
    rng = np.random.default_rng(0)
    for seed, (rows, columns) in enumerate(((9, 448), (7, 1001), (40, 64), (3, 5003))):
        x = (rng.standard_normal((rows, columns)) + 0.3).astype(x_dtype)
        for group in (0, 4, 6, 8, 14):
            for dtype in (np.int8, E4M3):
                launch = {"seed": seed + group, "multiprocessors": 1 + seed % 2}
                check_prologue(
                    library,
                    prologue,
                    x,
                    group,
                    dtype,
                    launch=launch,
                    **arguments_of(prologue, x, rng),
                )


@pytest.mark.parametrize("x_dtype", [BF16, np.float32], ids=lambda d: np.dtype(d).name)
def test_a_gate_and_up_side_by_side_are_read_where_they_lie(library, x_dtype):
    rng = np.random.default_rng(0)
    for seed, (columns, group) in enumerate(((448, 8), (1001, 0), (64, 4), (333, 6))):
        gate, up = (rng.standard_normal((5, columns)).astype(x_dtype) for _ in range(2))
        launch = {"prologue": "glu", "seed": seed}
        want = run(library, gate, group, np.int8, up=up, **launch)
        both = np.concatenate([gate, up], 1)
        got = run(library, both, group, np.int8, halves=True, width=want[0].shape[1], **launch)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(library, activation):
    x = np.concatenate([np.linspace(-30, 30, 1000), [0.0, -0.0, 1e-6, -1e4, 1e4]]).astype(
        np.float32
    )[None]
    check_prologue(library, "activation", x[:, :1000], 8, np.int8, activation=activation)
    check_prologue(library, "activation", x[:, :1000], 8, E4M3, activation=activation)
    _, scale = run(library, x, 8, np.int8, prologue="activation", activation=activation)
    np.testing.assert_allclose(scale, np.float32(1e4 / 127), rtol=1e-6)


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_broken_rows_stay_apart(library, prologue):
    rng = np.random.default_rng(0)
    for columns in (512, 515):
        x = rng.standard_normal((5, columns)).astype(BF16)
        x[1, 3], x[3, columns - 1] = np.nan, np.inf
        codes, scale = run(
            library, x, 8, np.int8, prologue=prologue, **arguments_of(prologue, x, rng)
        )
        assert np.isnan(scale).tolist() == [False, True, False, True, False]
        assert (codes[[1, 3]] == 0).all() and (codes[[0, 2, 4]] != 0).any()


@pytest.mark.parametrize(("shared", "capability"), [(H100, "9.0"), (A100, "8.0"), (SMALL, "8.6")])
def test_the_longest_rows_of_each_gpu(library, shared, capability):
    """`prologues.longest_row` promises that they fit."""
    limit = prologues.longest_row(capability)
    rng = np.random.default_rng(0)
    for prologue, sources in (("rms_norm", 1), ("glu", 2)):
        for x_dtype in (BF16, np.float32):
            columns = limit // np.dtype(x_dtype).itemsize // sources
            for seed, group in enumerate(GROUPS):
                x = rng.standard_normal((2, columns - seed)).astype(x_dtype)
                run(
                    library,
                    x,
                    group,
                    np.int8,
                    prologue=prologue,
                    shared=shared,
                    seed=seed,
                    **arguments_of(prologue, x, rng),
                )

"""The Hopper kernel run on the CPU, thread by thread, under random schedules: hopper_on_cpu/emulator.h says how.

Its source is compiled as it is, but for hopper/ptx.cuh and hopper/wgmma.cuh, whose instructions the emulator has its own versions
of. So layouts, edges, barriers and waits are tested here; what ptxas makes of the kernel, and speed, are not.
"""

import ctypes
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import cuda_formulas as formulas
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCES = Path(__file__).parents[2] / "cuda"
EMULATOR = Path(__file__).parent / "hopper_on_cpu"
INPUT = (ml_dtypes.float8_e4m3fn, np.int8)  # in the order of HopperInput, HopperOutput
OUTPUT = (ml_dtypes.bfloat16, np.float16, np.float32, np.int32)
MULTIPROCESSORS = 12
POISON = 0xA7


class Arguments(ctypes.Structure):
    """HopperArgs."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "lifted",
                "scale_x",
                "values",
                "zeros",
                "meta",
                "scale_w",
                "bias",
                "y",
                "workspace",
            )
        ),
        ("workspace_bytes", ctypes.c_size_t),
        *(
            (name, ctypes.c_int32)
            for name in (
                "M",
                "out",
                "groups",
                "group",
                "input",
                "output",
                "config",
                "token_group",
                "split",
                "parts",
                "abreast",
            )
        ),
        ("after_lift", ctypes.c_bool),
    )


class Counters(ctypes.Structure):
    """HopperCounters."""

    _fields_ = (("first", ctypes.c_void_p), ("count", ctypes.c_int))


class Tile(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        *(
            (name, ctypes.c_int32)
            for name in ("rows", "tokens", "cluster", "warp_groups", "stages")
        ),
    )


def cuda_headers():
    """The folder of cuda.h, or None."""
    nvcc = shutil.which("nvcc")
    beside = [Path(nvcc).resolve().parents[1]] if nvcc else []
    roots = [
        *map(Path, filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")))),
        *beside,
        Path("/usr/local/cuda"),
        Path("/opt/cuda"),
    ]
    return next((root / "include" for root in roots if (root / "include/cuda.h").exists()), None)


def build(directory):
    """Compiles the kernel for the emulator into a folder; skips without a compiler or CUDA's headers."""
    include = cuda_headers()
    if include is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and the headers of the CUDA toolkit")
    library = directory / "hopper_emulated.so"
    with open(
        directory / "hopper_emulated.lock", "w"
    ) as lock:  # one worker of pytest builds for all
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            command = [
                "g++",
                "-std=c++20",
                "-O2",
                "-w",
                "-fPIC",
                "-shared",
                f"-I{EMULATOR}",  # first: its headers take the place of those of the same name
                f"-I{SOURCES}",
                f"-I{include}",
                "-o",
                str(library),
            ]
            done = subprocess.run(
                [*command, "-x", "c++", SOURCES / "hopper/launch.cu", EMULATOR / "emulator.cc"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[:3000]
    return library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    library = ctypes.CDLL(build(base.parent if base.name.startswith("popen-") else base))
    library.slidejax_hopper_check.restype = ctypes.c_char_p
    library.slidejax_hopper_check.argtypes = [ctypes.POINTER(Arguments)]
    library.slidejax_hopper_workspace.restype = library.slidejax_hopper_metadata_bytes.restype = (
        ctypes.c_size_t
    )
    library.slidejax_hopper_workspace.argtypes = [ctypes.POINTER(Arguments), ctypes.c_int]
    library.slidejax_hopper_tile.restype = Tile
    library.slidejax_hopper_before_lift.argtypes = [
        ctypes.POINTER(Arguments),
        ctypes.c_void_p,
        ctypes.POINTER(Counters),
    ]
    library.slidejax_hopper_plan.argtypes = [ctypes.POINTER(Arguments), ctypes.c_int]
    library.emulator_lift.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    library.slidejax_hopper_sparse_matmul.argtypes = [ctypes.POINTER(Arguments), ctypes.c_void_p]
    library.slidejax_hopper_expand_metadata.argtypes = (
        [ctypes.c_void_p] * 2 + [ctypes.c_int] * 3 + [ctypes.c_void_p]
    )
    return library


def buffer(count):
    """Poisoned bytes, aligned as the kernel wants them."""
    raw = np.full(count + 128, POISON, np.uint8)
    start = -raw.ctypes.data % 128
    return raw[start : start + count]


def copied(array):
    to = buffer(array.nbytes)
    to[:] = np.ascontiguousarray(array).view(np.uint8).ravel()
    return to


def random_problem(M, out, groups, group, dtype, bias, seed):
    """A weight of random values and zero positions, lifted activations, and the exact accumulators."""
    rng = np.random.default_rng(seed)

    def codes(*shape):
        if dtype == np.int8:
            return rng.integers(-127, 128, shape).astype(np.int8)
        return (8 * rng.standard_normal(shape)).astype(np.float32).astype(dtype)

    pairs = np.array([(first, second) for second in range(group) for first in range(second)])
    z = pairs[rng.integers(len(pairs), size=(out, groups))]
    arrays = {
        "lifted": formulas.lift(codes(M, groups * group), group),
        "scale_x": (rng.random(M) + 0.5).astype(np.float32),
        "values": codes(out, groups, group - 2),
        "zeros": (z[..., 0] | z[..., 1] << 4).astype(np.uint8),
        "scale_w": ((rng.random(out) + 0.5) * 1e-3).astype(np.float32),
    }
    if bias:
        arrays["bias"] = rng.standard_normal(out).astype(np.float32)
    return arrays, formulas.accumulate(
        arrays["lifted"], formulas.lifted_weight(arrays["values"], arrays["zeros"])
    )


def run(
    emulated,
    M,
    out,
    groups,
    group=8,
    dtype=np.int8,
    y_dtype=OUTPUT[0],
    bias=True,
    config=-1,
    split=-1,
    parts=0,
    abreast=0,
    token_group=0,
    prepared=True,
    after_lift=False,
    seed=0,
    resident=MULTIPROCESSORS,
    chance=50,
):
    """Runs the kernel with a sparse weight and compares: int8 bit for bit."""
    arrays, acc = random_problem(M, out, groups, group, dtype, bias, seed)
    arguments = Arguments(
        groups=groups,
        group=group,
        config=config,
        split=split,
        parts=parts,
        abreast=abreast,
        token_group=token_group,
        after_lift=after_lift,
    )
    metadata = buffer(emulated.slidejax_hopper_metadata_bytes(out, groups, group))
    if prepared:
        zeros = copied(arrays["zeros"])
        done = emulated.slidejax_hopper_expand_metadata(
            zeros.ctypes.data, metadata.ctypes.data, out, groups, group, None
        )
        assert done == 0
        arguments.meta = metadata.ctypes.data
    compare(emulated, arguments, arrays, acc, dtype, y_dtype, seed, resident, chance)


def run_dense(
    emulated,
    M,
    out,
    K,
    dtype=np.int8,
    y_dtype=OUTPUT[0],
    bias=True,
    config=-1,
    split=-1,
    parts=0,
    abreast=0,
    after_lift=False,
    seed=0,
    resident=MULTIPROCESSORS,
    chance=50,
):
    """The same with a dense weight `[out, K]`."""
    arrays, _ = random_problem(M, out, 8, 8, dtype, bias, seed)
    del arrays["zeros"]
    rng = np.random.default_rng(seed)
    for name, rows in (("lifted", M), ("values", out)):
        codes = (
            rng.integers(-127, 128, (rows, K))
            if dtype == np.int8
            else (8 * rng.standard_normal((rows, K))).astype(np.float32)
        )
        arrays[name] = codes.astype(dtype)
    acc = formulas.accumulate(arrays["lifted"], arrays["values"])
    compare(
        emulated,
        Arguments(
            groups=K,
            group=0,
            config=config,
            split=split,
            parts=parts,
            abreast=abreast,
            after_lift=after_lift,
        ),
        arrays,
        acc,
        dtype,
        y_dtype,
        seed,
        resident,
        chance,
    )


def compare(emulated, arguments, arrays, acc, dtype, y_dtype, seed, resident, chance):
    """Fills in the arguments, runs the kernel, and compares with what follows from the exact accumulators `acc`."""
    M, out = acc.shape
    want = formulas.finish(acc, arrays["scale_x"], arrays["scale_w"], arrays.get("bias"))
    want = (acc if y_dtype == np.int32 else want).astype(y_dtype)
    buffers = {name: copied(array) for name, array in arrays.items()}
    y = buffer(want.nbytes + 64)
    emulated.emulator_configure(MULTIPROCESSORS, resident, chance, seed)
    for name, array in buffers.items():
        setattr(arguments, name, array.ctypes.data)
    arguments.y, arguments.M, arguments.out = y.ctypes.data, M, out
    arguments.input, arguments.output = INPUT.index(dtype), OUTPUT.index(y_dtype)
    arguments.workspace_bytes = emulated.slidejax_hopper_workspace(arguments, MULTIPROCESSORS)
    workspace = buffer(max(arguments.workspace_bytes, 1))
    arguments.workspace = workspace.ctypes.data
    assert emulated.slidejax_hopper_check(arguments) is None
    if arguments.after_lift:
        begin_lift(emulated, arguments, buffers)
    assert emulated.slidejax_hopper_sparse_matmul(arguments, None) == 0, (
        "the kernel hangs: standard error says where"
    )
    got = y[: want.nbytes].view(y_dtype).reshape(M, out)
    if dtype == np.int8:
        np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))
    else:  # float32 sums in another order, and now and then another rounding of y
        error = got.astype(np.float64) - want.astype(np.float64)
        assert np.linalg.norm(error) <= (1e-5 if y_dtype == np.float32 else 1e-3) * np.linalg.norm(
            want.astype(np.float64)
        )
    assert (y[want.nbytes :] == POISON).all(), "the kernel writes beyond y"


def begin_lift(emulated, arguments, buffers):
    """What the lift writes is not there yet: it will be at some moment after the launch."""
    counters = Counters()
    assert emulated.slidejax_hopper_before_lift(arguments, None, counters) == 0
    zeros = buffer(8 * counters.count + 1)
    zeros[:] = 0
    emulated.emulator_lift(counters.first, zeros.ctypes.data, 8 * counters.count)
    for name in ("lifted", "scale_x"):
        emulated.emulator_lift(
            buffers[name].ctypes.data, buffers[name].ctypes.data, buffers[name].nbytes
        )
        buffers[name][:] = POISON


TILES = (
    "256x192",
    "128x256",
    "256x160",
    "256x128",
    "128x128",
    "128x128 in fours",
    "128x64",
    "128x32",
    "128x16",
)
DENSE = (
    "dense 256x192",
    "dense 128x256",
    "dense 128x128",
    "dense 128x64",
    "dense 128x16",
)  # after the others


@pytest.mark.parametrize("config", range(len(TILES)), ids=TILES)
@pytest.mark.parametrize("dtype", INPUT, ids=("e4m3", "int8"))
def test_every_tile(emulated, config, dtype):
    """More than one tile for every cluster, so that what is left of one could disturb the next; whole and cut along K."""
    assert emulated.slidejax_hopper_tile(config).name.decode() == TILES[config]
    tile = emulated.slidejax_hopper_tile(config)
    rows, tokens = tile.rows, tile.tokens
    run(emulated, tokens + 9, 5 * rows + 8, 16, dtype=dtype, config=config, split=0, seed=config)
    run(
        emulated,
        2 * tokens - 3,
        2 * rows + 40,
        48,
        dtype=dtype,
        config=config,
        split=4,
        bias=False,
        chance=20,
    )


@pytest.mark.parametrize("config", range(len(TILES), len(TILES) + len(DENSE)), ids=DENSE)
@pytest.mark.parametrize("dtype", INPUT, ids=("e4m3", "int8"))
def test_every_tile_of_dense_weights(emulated, config, dtype):
    name = emulated.slidejax_hopper_tile(config).name.decode()
    assert name == DENSE[config - len(TILES)]
    rows, tokens = (int(n) for n in name.removeprefix("dense ").split("x"))
    run_dense(
        emulated, tokens + 9, 5 * rows + 8, 144, dtype=dtype, config=config, split=0, seed=config
    )
    run_dense(
        emulated,
        2 * tokens - 3,
        2 * rows + 40,
        592,
        dtype=dtype,
        config=config,
        split=4,
        bias=False,
        chance=20,
    )


@given(
    M=st.integers(1, 300),
    out=st.integers(1, 700),
    K=st.integers(1, 60).map(lambda n: 16 * n),
    dtype=st.sampled_from(INPUT),
    y_dtype=st.sampled_from(OUTPUT[:3]),
    bias=st.booleans(),
    split=st.sampled_from([-1, 0, 2, 3]),
    parts=st.sampled_from([0, 0, 1, 2, 3, 8]),
    abreast=st.sampled_from([0, 1, 2]),
    after_lift=st.booleans(),
    resident=st.sampled_from([2, MULTIPROCESSORS]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=8)
def test_any_dense_problem(emulated, M, out, K, **how):
    run_dense(emulated, M, out, K, **how)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 24}, b"multiple of 16"),
        ({"groups": 0}, b"multiple of 16"),
        ({"config": 0}, b"no such config"),
        ({"group": 8, "groups": 16, "zeros": 16, "config": len(TILES)}, b"no such config"),
        ({"group": 2}, b"or 0 for a dense weight"),
    ],
)
def test_what_a_dense_weight_may_be(emulated, changes, message):
    arguments = Arguments(**{"M": 1, "out": 1, "groups": 32, "group": 0, "config": -1, **changes})
    assert message in emulated.slidejax_hopper_check(arguments)


def test_all_tiles_are_tested(emulated):
    assert emulated.slidejax_hopper_tile_count() == len(TILES) + len(DENSE)


@pytest.mark.parametrize("dtype", INPUT, ids=("e4m3", "int8"))
@pytest.mark.parametrize("config", [0, TILES.index("128x64")], ids=["256x192", "128x64"])
def test_split_sums_do_not_need_the_whole_grid_to_run(emulated, config, dtype):
    """As if other kernels held most of the device: a cluster may not wait for one that begins only when it has left."""
    tile = emulated.slidejax_hopper_tile(config)
    run(
        emulated,
        tile.tokens,
        tile.rows * tile.cluster,
        96,
        dtype=dtype,
        config=config,
        split=4,
        resident=2,
    )


@pytest.mark.parametrize("dtype", INPUT, ids=("e4m3", "int8"))
@pytest.mark.parametrize(
    ("tile", "parts"),
    [
        ("128x16", 2),
        ("128x32", 3),
        ("128x64", 4),
        ("128x16", 6),
        ("128x32", 8),
        ("128x256", 2),
        ("256x128", 2),
        ("128x128", 4),
        ("128x128 in fours", 2),
    ],
)
def test_teams_of_a_cluster_divide_k(emulated, tile, parts, dtype):
    """All tiles, and the last one behind whole ones."""
    shape = emulated.slidejax_hopper_tile(TILES.index(tile))
    rows, tokens, cluster = shape.rows, shape.tokens, shape.cluster
    how = {"dtype": dtype, "config": TILES.index(tile), "parts": parts, "seed": parts}
    run(emulated, tokens - 3, rows * cluster, 96, **how, chance=30)
    teams = MULTIPROCESSORS // cluster
    if parts * cluster > 2:  # such clusters do not fill a device
        teams = teams * (10 if parts * cluster % 3 else 9) // 11 // parts * parts
    if teams:
        run(emulated, tokens, (teams + 1) * rows * cluster - 24, 24, **how, bias=False)


@pytest.mark.parametrize("resident", [MULTIPROCESSORS, 4])
@pytest.mark.parametrize("dtype", INPUT, ids=("e4m3", "int8"))
@pytest.mark.parametrize("tile", TILES[:5])
def test_two_teams_share_the_weights(emulated, tile, dtype, resident):
    """In clusters of four, and the rest of the teams in pairs; whole tiles, then tiles cut along K, of which a last one is not there."""
    shape = emulated.slidejax_hopper_tile(TILES.index(tile))
    rows, tokens = shape.rows, shape.tokens
    how = {"dtype": dtype, "config": TILES.index(tile), "abreast": 2, "resident": resident}
    run(emulated, tokens + 9, 7 * rows + 8, 16, **how, split=0)
    run(
        emulated,
        3 * tokens - 3,
        3 * rows + 40,
        48,
        **how,
        split=-1,
        bias=False,
        chance=20,
        token_group=2,
    )
    run(emulated, 2 * tokens, 2 * rows, 48, **how, split=3, y_dtype=np.float32, seed=1)


@pytest.mark.parametrize("dtype", INPUT, ids=("e4m3", "int8"))
@pytest.mark.parametrize("tile", DENSE[:3])
def test_two_teams_share_dense_weights(emulated, tile, dtype):
    rows, tokens = (int(n) for n in tile.removeprefix("dense ").split("x"))
    run_dense(
        emulated,
        3 * tokens - 3,
        3 * rows + 40,
        592,
        dtype=dtype,
        config=len(TILES) + DENSE.index(tile),
        abreast=2,
    )


@pytest.mark.parametrize(("want", "rows"), [(2, 1024), (1, 1023)])
def test_teams_share_weights_where_there_are_many_rows(emulated, want, rows):
    """A tile for every team either way: what decides is that sharing saves energy."""
    arguments = Arguments(
        M=rows, out=38400, groups=448, group=8, input=1, meta=16, config=-1, split=-1
    )
    emulated.slidejax_hopper_plan(arguments, 132)
    assert arguments.abreast == want


@pytest.mark.parametrize("dtype", INPUT, ids=("e4m3", "int8"))
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_teams_divide_k_of_a_dense_weight(emulated, parts, dtype):
    run_dense(
        emulated,
        5,
        128,
        2048,
        dtype=dtype,
        parts=parts,
        config=len(TILES) + 3,
        y_dtype=np.float32,
        bias=False,
        seed=parts,
    )


def test_scales_of_a_sum_stay_until_every_lane_has_read_them(emulated):
    problem = {
        "y_dtype": np.float32,
        "bias": False,
        "config": TILES.index("128x128"),
        "split": 3,
        "token_group": 1,
    }
    run(emulated, 203, 728, 24, 16, **problem, seed=298655, resident=2, chance=30)


def test_int32_results_are_of_int8_operands(emulated):
    run(emulated, 37, 70, 24, y_dtype=np.int32, split=3)
    arguments = Arguments(
        M=1,
        out=1,
        groups=8,
        group=8,
        zeros=16,
        output=OUTPUT.index(np.int32),
        input=INPUT.index(INPUT[0]),
    )
    assert b"int8" in emulated.slidejax_hopper_check(arguments)


@given(
    M=st.integers(1, 300),
    out=st.integers(1, 700),
    blocks=st.integers(1, 8),
    group=st.sampled_from([4, 6, 8, 10, 12, 14, 16]),
    dtype=st.sampled_from(INPUT),
    y_dtype=st.sampled_from(OUTPUT),
    bias=st.booleans(),
    config=st.integers(-1, len(TILES) - 1),
    split=st.sampled_from([-1, 0, 2, 3]),
    parts=st.sampled_from([0, 0, 1, 2, 3, 8]),
    abreast=st.sampled_from([0, 1, 2]),
    after_lift=st.booleans(),
    token_group=st.integers(0, 2),
    prepared=st.booleans(),
    resident=st.sampled_from([2, MULTIPROCESSORS]),
    chance=st.sampled_from([5, 30, 90]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20)
def test_any_problem_under_any_schedule(emulated, M, out, blocks, group, **how):
    if how["y_dtype"] == np.int32:
        how["dtype"] = np.int8
    run(emulated, M, out, 8 * blocks, group, **how)

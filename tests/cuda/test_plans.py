"""The plans of the kernels (cuda/{decode,hopper}/plan.h, cuda/lift/geometry.h), compiled with the
host's C++ compiler alone: no nvcc, no CUDA headers, no GPU."""

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hopper_emulator import Schedule, Shape, make_schedule

import slidejax as sj
from slidejax.ops.implementations import decode
from slidejax.ops.implementations.hopper import HOPPER

ROOT = Path(__file__).parents[2]
H200 = 132  # multiprocessors


class Plan(ctypes.Structure):
    _fields_ = [
        ("tile", ctypes.c_char_p),
        *(
            (name, ctypes.c_int32)
            for name in (
                "rows",
                "tokens",
                "ctas",
                "token_group",
                "whole",
                "stream_k_tiles",
                "stream_k_workers",
                "cluster_groups",
                "cluster_split_tiles",
                "share_w",
                "makes_metadata",
            )
        ),
        ("workspace_bytes", ctypes.c_uint64),
    ]


class DecodePlan(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int) for name in ("warps", "grid", "slices", "slice_steps", "tile_slots")
    ] + [
        ("cached", ctypes.c_bool),
        ("own", ctypes.c_bool),
        ("sums_bytes", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
    ]


class GemvPlan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("grid", "steps", "block_rows", "shared_bytes")]


class SkinnyPlan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("rows", "groups", "grid", "warps", "steps")),
        *(("block_rows", ctypes.c_int), ("staged", ctypes.c_bool)),
        ("shared_bytes", ctypes.c_int),
    ]


class RowShape(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("n", "steps", "tiles")),
        *((name, ctypes.c_bool) for name in ("x_aligned", "out_aligned", "normed")),
    ]


class Limits(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in ("multiprocessors", "shared_of_block", "shared_of_multiprocessor")
    ]


class Geometry(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("warps", "blocks", "depth", "bytes")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    target = tmp_path_factory.mktemp("plans") / "plans.so"
    sources = ["tests/cuda/plans/plans.cc", "cuda/hopper/plan.cc", "cuda/lift/geometry.cc"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'cuda'}"]
    command = ["g++", *flags, *(ROOT / source for source in sources), "-o", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(target))
    pointer = ctypes.POINTER
    for name, result, *arguments in (
        ("hopper_plan", Plan, pointer(Shape), pointer(Schedule), ctypes.c_bool, ctypes.c_int),
        ("hopper_counters", ctypes.c_int, pointer(Shape), ctypes.c_bool, ctypes.c_int),
        ("hopper_counter_bytes", ctypes.c_uint64),
        ("hopper_metadata_bytes", ctypes.c_uint64, pointer(Shape)),
        ("hopper_check", ctypes.c_char_p, pointer(Shape), pointer(Schedule)),
        ("decode_most_rows", ctypes.c_int),
        ("decode_plan", DecodePlan, *[ctypes.c_int] * 8),
        ("decode_workspace", ctypes.c_int64, *[ctypes.c_int] * 4),
        ("gemv_most_rows", ctypes.c_int),
        ("gemv_ring_bytes", ctypes.c_int, ctypes.c_int),
        ("gemv_plan", GemvPlan, ctypes.c_int, ctypes.c_bool, *[ctypes.c_int] * 7),
        ("skinny_most_rows", ctypes.c_int),
        ("skinny_ring_bytes", ctypes.c_int, ctypes.c_int),
        ("skinny_token_bytes", ctypes.c_int64, ctypes.c_int, ctypes.c_int),
        ("skinny_plan", SkinnyPlan, ctypes.c_int, ctypes.c_bool, *[ctypes.c_int] * 7),
        ("lift_geometry", Geometry, pointer(RowShape), *[ctypes.c_int] * 3, pointer(Limits)),
        ("lift_steps", ctypes.c_int, ctypes.c_int),
        ("lift_columns", ctypes.c_int64, ctypes.c_int64, ctypes.c_int),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def sparse(rows, columns, out, group=8):
    """A product of `columns` columns of x, before they are lifted."""
    return Shape(M=rows, out=out, columns=columns // group * 2 * (group - 2), group=group)


def plan(library, shape, prepared=True, multiprocessors=H200, **schedule):
    return library.hopper_plan(shape, make_schedule(**schedule), prepared, multiprocessors)


# --- the Hopper kernel ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "out", "tile", "share_w", "way"),
    [
        (1, 3584, 4608, "64x16", False, "whole tiles"),
        (1, 3584, 3584, "64x16", False, "2 groups"),
        (1, 3584, 37888, "64x16", False, "2 groups"),
        (1, 18944, 3584, "64x16", False, "2 groups"),
        (16, 3584, 4608, "64x16", False, "whole tiles"),
        (16, 3584, 3584, "64x16", False, "2 groups"),
        (16, 3584, 37888, "64x16", False, "2 groups"),
        (16, 18944, 3584, "64x16", False, "2 groups"),
        (64, 3584, 4608, "64x64", False, "whole tiles"),
        (64, 3584, 3584, "64x64", False, "whole tiles"),
        (64, 3584, 37888, "64x64", False, "2 groups"),
        (64, 18944, 3584, "64x64", False, "2 groups"),
        (128, 3584, 4608, "64x128", False, "whole tiles"),
        (128, 18944, 3584, "64x128", False, "2 groups"),
        (256, 3584, 4608, "128x128 (1 CTA)", False, "whole tiles"),
        (256, 3584, 3584, "128x128 (1 CTA)", False, "whole tiles"),
        (256, 3584, 37888, "128x128 (1 CTA)", False, "2 groups"),
        (256, 18944, 3584, "128x128 (1 CTA)", False, "2 groups"),
        (1024, 3584, 4608, "256x160", False, "whole tiles"),
        (1024, 3584, 3584, "128x256", True, "whole tiles"),
        (1024, 3584, 37888, "128x256", True, "whole tiles"),
        (1024, 18944, 3584, "128x256", True, "whole tiles"),
        (4096, 3584, 4608, "256x192", True, "whole tiles"),
        (4096, 3584, 3584, "256x160", True, "whole tiles"),
        (4096, 3584, 37888, "256x192", True, "whole tiles"),
        (4096, 18944, 3584, "256x192", True, "stream-K"),
    ],
)
def test_what_runs_on_an_h200(library, rows, columns, out, tile, share_w, way):
    """Layers of Qwen2.5-7B at 6:8. A change of the cost model shows here. Only measurements show
    whether the change is good."""
    chosen = plan(library, sparse(rows, columns, out))
    taken = (
        "stream-K"
        if chosen.stream_k_tiles
        else f"{chosen.cluster_groups} groups"
        if chosen.cluster_groups > 1
        else "whole tiles"
    )
    assert (chosen.tile.decode(), bool(chosen.share_w), taken) == (tile, share_w, way)


@pytest.mark.parametrize(("want", "rows"), [(1, 1024), (0, 1023)])
def test_cta_pairs_share_w_where_there_are_many_rows(library, want, rows):
    """Every CTA group has one tile either way. Sharing is chosen because it saves energy."""
    assert plan(library, sparse(rows, 3584, 38400)).share_w == want


def random_shape(rng):
    group = rng.choice([0, 4, 6, 8, 10, 12, 14, 16])
    columns = 16 * rng.randint(1, 1300) if group == 0 else 16 * rng.randint(1, 300) * (group - 2)
    rows, out = int(2 ** rng.uniform(0, 14)), rng.randint(1, 40000)
    return Shape(M=rows, out=out, columns=columns, group=group)


def test_every_tile_of_y_is_computed_once(library):
    """The whole tiles and the tiles cut along K are together all tiles."""
    rng = random.Random(0)
    kinds = set()
    for _ in range(2000):
        shape = random_shape(rng)
        chosen = plan(library, shape, multiprocessors=rng.choice([H200, 114, 78, 12]))
        pair = 2 if chosen.share_w else 1
        row_tiles = -(-shape.out // (chosen.rows * chosen.ctas))
        tiles = row_tiles * -(-shape.M // (chosen.tokens * pair)) * pair
        cut = chosen.stream_k_tiles * pair + chosen.cluster_split_tiles
        assert chosen.whole + cut == tiles
        kinds.add((bool(chosen.share_w), chosen.stream_k_tiles > 0, chosen.cluster_groups > 1))
    assert len(kinds) == 5  # with shared W no cluster divides K


def test_counters_fit_in_their_part_of_the_workspace(library):
    rng = random.Random(1)
    for _ in range(2000):
        shape = random_shape(rng)
        for prepared in (True, False):
            counters = library.hopper_counters(shape, prepared, H200)
            assert 8 * counters <= library.hopper_counter_bytes()


def test_workspace_holds_metadata_that_is_not_prepared(library):
    rng = random.Random(2)
    makers = set()
    for _ in range(200):
        shape = random_shape(rng)
        tile = rng.randint(0, 10) if shape.group else -1  # of the sparse tiles
        prepared, made = (plan(library, shape, prepared=p, tile=tile) for p in (True, False))
        metadata = 0 if made.makes_metadata else library.hopper_metadata_bytes(shape)
        assert made.workspace_bytes - prepared.workspace_bytes == metadata
        whole = plan(library, shape, stream_k=0)
        assert whole.workspace_bytes == 0 and whole.stream_k_tiles == 0
        if shape.group >= 6:
            makers.add((made.tile.decode(), bool(made.makes_metadata)))
    assert {tile for tile, makes in makers if makes} == {
        "128x128 (1 CTA)",
        "64x128",
        "64x64",
        "64x32",
        "64x16",
    }
    assert not {tile for tile, makes in makers if not makes} & {tile for tile, m in makers if m}


@pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "14:16"])
@pytest.mark.parametrize(("columns", "out"), [(64, 7), (600, 520), (3584, 1000)])
def test_python_knows_the_size_of_metadata(library, pattern, columns, out):
    kernel = jax.ShapeDtypeStruct((columns, out), jnp.float32)
    w = jax.eval_shape(lambda k: sj.pack(k, pattern, dtype="int8"), kernel)
    shape = Shape(M=1, out=out, columns=w.lifted_columns, group=w.pattern.group)
    assert jax.eval_shape(HOPPER.form.make, w).shape == (library.hopper_metadata_bytes(shape),)


@pytest.mark.parametrize(
    ("shape", "schedule", "message"),
    [
        ({"columns": 24}, {}, b"multiple of 16"),
        ({"columns": 0}, {}, b"multiple of 16"),
        ({}, {"tile": 0}, b"no such tile"),
        ({"group": 8, "columns": 192}, {"tile": 14}, b"no such tile"),
        ({"group": 8, "columns": 96}, {"tile": 11}, b"groups of eight"),
        ({}, {"tile": 99}, b"no such tile"),
        ({"group": 8, "columns": 36}, {}, b"multiple of 8"),
        ({"group": 2}, {}, b"or 0 for a dense weight"),
        ({"M": 0}, {}, b"at least 1"),
    ],
)
def test_what_is_refused(library, shape, schedule, message):
    given = Shape(**{"M": 1, "out": 1, "columns": 32, "group": 0, **shape})
    assert message in library.hopper_check(given, make_schedule(**schedule))


# --- the decode kernel ----------------------------------------------------------------------------

SHARED = {H200: 232448, 108: 166912, 46: 101376}  # bytes of a block, by multiprocessors


def decode_blocks(windows, columns):
    return -(-columns // (32 if windows == 0 else 16 * (windows + 1)))


def test_python_knows_how_many_rows_decode_takes(library):
    assert library.decode_most_rows(2) == library.skinny_most_rows() == decode.ROWS
    assert library.gemv_most_rows() == decode.GEMV_ROWS


def test_decode_reads_every_step_of_k_once_and_fits(library):
    rng = random.Random(4)
    kinds = set()
    for _ in range(3000):
        shape = rng.randint(0, 7), rng.choice([1, 2])  # windows, bytes of a value
        windows, rows = shape[0], rng.randint(1, library.decode_most_rows(shape[1]))
        out, columns = rng.randint(1, 160000), int(2 ** rng.uniform(0, 17))
        blocks, multiprocessors = decode_blocks(windows, columns), rng.choice(list(SHARED))
        limit = SHARED[multiprocessors]
        row_bytes = rng.choice([0, 2, 4]) * columns if rows <= 4 else 0
        chosen = library.decode_plan(*shape, rows, out, blocks, row_bytes, multiprocessors, limit)
        steps, tiles = -(-blocks // 4), -(-out // 16)
        if chosen.warps == 0:  # a call then halves the rows, or the outputs of one row
            assert multiprocessors == 46 or rows > 1
            one = library.decode_plan(*shape, 1, 16, blocks, 0, multiprocessors, limit)
            assert one.warps > 0
            continue
        assert chosen.warps in (2, 4, 8, 16) and chosen.shared_bytes <= limit
        assert chosen.grid == min(multiprocessors, tiles)
        assert (chosen.slices - 1) * chosen.slice_steps < steps
        assert chosen.slices * chosen.slice_steps >= steps
        # The sums of a tile must last until all slices of K have added to them.
        block_tiles = -(-tiles // chosen.grid)
        assert chosen.slices == 1 or chosen.tile_slots == block_tiles
        assert 1 <= chosen.tile_slots <= block_tiles
        # x itself lies where the sums will lie.
        assert chosen.sums_bytes >= chosen.tile_slots * chosen.warps * 64 * rows
        assert not chosen.own or chosen.slices == 1
        assert not chosen.own or chosen.sums_bytes >= rows * row_bytes > 0
        kinds.add((chosen.warps, chosen.slices > 1, chosen.own))
    assert len(kinds) >= 7


@pytest.mark.parametrize("out", [2048 * H200, 2048 * H200 + 1, 271000, 2048 * H200 + 16 * H200])
def test_all_blocks_of_decode_keep_scales_or_none_does(library, out):
    """Some thread blocks have a tile less than others. They must not lay out more memory."""
    chosen = library.decode_plan(3, 1, 1, out, decode_blocks(3, 3584), 2 * 3584, H200, SHARED[H200])
    other = library.decode_plan(
        3, 1, 1, 2048 * H200, decode_blocks(3, 3584), 2 * 3584, H200, SHARED[H200]
    )
    assert chosen.cached == (out <= 2048 * H200)
    assert other.shared_bytes - chosen.shared_bytes == (0 if chosen.cached else 8 * 2048)


@pytest.mark.parametrize(
    ("value_bytes", "rows", "columns", "out", "own"),
    [
        (1, 1, 4096, 6144, True),  # Llama-3-8B
        (1, 1, 4096, 28672, True),
        (1, 1, 14336, 4096, True),
        (1, 4, 4096, 28672, True),
        (1, 8, 4096, 28672, False),
        (1, 1, 3584, 37888, True),  # Qwen2.5-7B
        (1, 1, 18944, 3584, True),
        (2, 1, 3584, 37888, True),
        (2, 1, 18944, 3584, True),
    ],
)
def test_where_decode_converts_the_rows_itself_on_an_h100(
    library, value_bytes, rows, columns, out, own
):
    blocks = decode_blocks(3, columns)
    row_bytes = 2 * columns if rows <= 4 else 0
    shape = 3, value_bytes, rows, out, blocks, row_bytes
    chosen = library.decode_plan(*shape, H200, SHARED[H200])
    assert chosen.warps == 16 // value_bytes and chosen.slices == 1
    assert chosen.own == own


def test_one_or_two_rows_fit_or_go_to_the_other_kernel(library):
    rng = random.Random(5)
    most, taken = library.gemv_most_rows(), set()
    for _ in range(2000):
        windows, rows = rng.randint(0, 7), rng.randint(1, most + 1)
        outputs, columns = rng.randint(1, 160000), int(2 ** rng.uniform(0, 17))
        blocks, multiprocessors = decode_blocks(windows, columns), rng.choice(list(SHARED))
        row_bytes, norm_bytes = rng.choice([0, 2, 4]) * columns, rng.choice([0, 4]) * columns
        chosen = library.gemv_plan(
            *(windows, floats := rng.random() < 0.5),
            *(rows, outputs, blocks, row_bytes, norm_bytes),
            *(multiprocessors, SHARED[multiprocessors]),
        )
        taken.add((chosen.grid > 0, rows > most, row_bytes > 0))
        if chosen.grid == 0:
            continue
        assert rows <= most and row_bytes > 0
        assert chosen.grid == min(multiprocessors, -(-outputs // 4))
        assert chosen.grid * chosen.block_rows >= outputs > (chosen.grid - 1) * 4
        step = 8 * (64 if windows == 0 else 16 * (windows + 1))  # columns
        assert chosen.steps * step >= columns > (chosen.steps - 1) * step - 32
        sums = 4 * rows * chosen.block_rows * (16 if floats else 1)
        lying = library.gemv_ring_bytes(windows) + rows * (row_bytes + columns) + norm_bytes + sums
        assert lying < chosen.shared_bytes <= SHARED[multiprocessors]
    assert (False, True, True) in taken and (False, False, True) in taken


def test_a_few_rows_fit_or_go_to_the_other_kernel(library):
    rng = random.Random(6)
    most, taken = library.skinny_most_rows(), set()
    for _ in range(2000):
        windows, rows = rng.randint(0, 7), rng.randint(1, most + 1)
        tiles, columns = rng.randint(1, 10000), int(2 ** rng.uniform(0, 17))
        blocks, multiprocessors = decode_blocks(windows, columns), rng.choice(list(SHARED))
        row_bytes, norm_bytes = rng.choice([0, 2, 4]) * columns, rng.choice([0, 4]) * columns
        chosen = library.skinny_plan(
            *(windows, floats := rng.random() < 0.5, rows, tiles, blocks, row_bytes, norm_bytes),
            *(multiprocessors, SHARED[multiprocessors]),
        )
        taken.add((chosen.grid > 0, chosen.grid > 0 and chosen.staged, row_bytes > 0))
        if chosen.grid == 0:
            continue
        assert rows <= most and row_bytes > 0 and 1 <= chosen.warps <= 16
        assert (chosen.groups - 1) * chosen.rows < rows <= chosen.groups * chosen.rows
        assert chosen.rows <= most // 2 and chosen.groups * chosen.grid <= max(2, multiprocessors)
        assert chosen.grid * chosen.block_rows >= 16 * tiles > (chosen.grid - 1) * 16
        assert chosen.steps == -(-blocks // 4)
        sums = 4 * chosen.rows * chosen.block_rows * (chosen.warps if floats else 1)
        codes = chosen.rows * library.skinny_token_bytes(windows, chosen.steps)
        x = chosen.rows * row_bytes if chosen.staged else 0
        lying = chosen.warps * library.skinny_ring_bytes(windows) + codes + x + norm_bytes + sums
        assert lying < chosen.shared_bytes <= SHARED[multiprocessors]
    assert taken == {(True, True, True), (True, False, True), (False, False, True), (False,) * 3}


@pytest.mark.parametrize("windows", range(8))
@pytest.mark.parametrize("rows", [3, 8, 16])
@pytest.mark.parametrize(("out", "columns"), [(576, 1536), (3072, 576), (896, 4864), (9728, 896)])
def test_small_models_have_room_for_their_rows(library, windows, rows, out, columns):
    """SmolLM2-135M and Qwen2.5-0.5B on an H100."""
    sizes = decode_blocks(windows, columns), 2 * columns, 4 * columns if columns < 1000 else 0
    assert library.skinny_plan(windows, False, rows, out // 16, *sizes, H200, SHARED[H200]).grid > 0


@pytest.mark.parametrize("windows", range(8))
@pytest.mark.parametrize("columns", [4096, 14336, 3584, 18944])
def test_one_row_of_llama_and_qwen_has_no_use_for_tensor_cores(library, windows, columns):
    blocks, memory = decode_blocks(windows, columns), (H200, SHARED[H200])
    norm = 4 * columns if columns < 5000 else 0
    chosen = library.gemv_plan(windows, True, 1, 28672, blocks, 2 * columns, norm, *memory)
    assert chosen.grid == H200
    assert 50_000 < library.gemv_ring_bytes(windows) < 130_000


@pytest.mark.parametrize("pattern", ["dense", "2:4", "4:6", "6:8", "14:16"])
@pytest.mark.parametrize("columns", [64, 600, 3584])
@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_python_knows_the_workspace_of_decode(library, pattern, columns, rows, dtype):
    kernel = jax.ShapeDtypeStruct((columns, 48), jnp.float32)
    w = jax.eval_shape(lambda k: sj.pack(k, pattern, dtype=dtype), kernel)
    windows = w.pattern.group // 2 - 1 if w.pattern.prunes else 0
    wanted = library.decode_workspace(
        windows, w.dtype.itemsize, rows, decode_blocks(windows, columns)
    )
    # The call aligns what it is given to 16 bytes.
    assert decode.workspace_bytes(w, rows) == wanted


# --- the lift -------------------------------------------------------------------------------------

H100 = Limits(132, 232448, 233472)
A100 = Limits(108, 166912, 167936)
SMALL = Limits(46, 101376, 102400)


def row_shape(library, rows, columns, group=8, aligned=True, normed=False):
    n = max(1, group // 2)
    lifted = library.lift_columns(columns, group) if group else columns
    padded = lifted if n == 1 else lifted // (4 * (n - 1)) * 2 * n
    steps = library.lift_steps(n)
    tiles = max(1, -(-padded // (256 * steps)))
    return RowShape(rows, n, steps, tiles, aligned, aligned, normed)


@pytest.mark.parametrize("device", [H100, A100, SMALL], ids=["h100", "a100", "small"])
def test_what_is_chosen_fits(library, device):
    rng = random.Random(3)
    fitted = 0
    for _ in range(3000):
        group = rng.choice([0, 4, 6, 8, 10, 12, 14, 16])
        rows, columns = int(2 ** rng.uniform(0, 16)), int(2 ** rng.uniform(0, 17))
        sources, in_bytes = rng.choice([1, 2]), rng.choice([2, 4])
        shape = row_shape(
            library, rows, columns, group, rng.random() < 0.5, sources == 1 and rng.random() < 0.3
        )
        chosen = library.lift_geometry(shape, sources, in_bytes, 1, device)
        if chosen.warps == 0:
            continue
        fitted += 1
        own = -(-shape.tiles // chosen.warps)  # tiles of a row that a warp has
        assert 1 <= chosen.warps <= min(32, shape.tiles)
        assert own <= chosen.depth <= own + 7
        assert chosen.bytes <= device.shared_of_block
        assert chosen.blocks * (chosen.bytes + 1024) <= device.shared_of_multiprocessor
    assert fitted > 2000


@pytest.mark.parametrize(
    ("rows", "columns", "want"),
    [
        (1, 3584, (4, 8, 1)),
        (1, 18944, (19, 2, 1)),
        (16, 3584, (4, 8, 1)),
        (16, 18944, (19, 2, 1)),
        (1024, 3584, (4, 8, 1)),
        (1024, 18944, (10, 2, 4)),
        (4096, 3584, (4, 8, 1)),
        (4096, 18944, (10, 1, 4)),
        (16384, 3584, (4, 8, 1)),
        (16384, 18944, (10, 1, 4)),
    ],
)
def test_how_rows_are_shared_out_on_an_h100(library, rows, columns, want):
    """Warps of a block, blocks of a multiprocessor, tiles in a warp's ring: bfloat16 to int8."""
    chosen = library.lift_geometry(row_shape(library, rows, columns), 1, 2, 1, H100)
    assert (chosen.warps, chosen.blocks, chosen.depth) == want

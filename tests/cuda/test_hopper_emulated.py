"""The Hopper kernel on the CPU, thread by thread, under random schedules (hopper_emulator.py).

Layouts, edges, barriers and waits are tested here. What ptxas makes of the kernel, and speed, are
not.
"""

import dataclasses

import numpy as np
import pytest
from cases import pairs
from hopper_emulator import INPUT, MULTIPROCESSORS, OUTPUT, Problem, make_schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from slidejax.ops.implementations.hopper import HOPPER

TILES = (
    "256x192",
    "128x256",
    "256x160",
    "256x128",
    "128x128",
    "128x128 (4 CTAs)",
    "128x128 (1 CTA)",
    "64x128",
    "64x64",
    "64x32",
    "64x16",
    "128x256 (zeros)",
    "128x128 (zeros)",
    "128x128 (1 CTA, zeros)",
)
DENSE = ("dense 256x192", "dense 128x256", "dense 128x128", "dense 128x64", "dense 128x16")

both_inputs = pytest.mark.parametrize("dtype", INPUT, ids=("e4m3", "int8"))


def test_all_tiles_are_tested(emulated):
    assert emulated.names == [*TILES, *DENSE]


@pytest.mark.parametrize("tile", TILES)
@both_inputs
def test_every_tile(emulated, tile, dtype):
    """More than one tile for every CTA group, so remains of one tile could disturb the next one.

    The tiles are whole at first, with prepared metadata. Then they are cut along K, and the call
    makes the metadata.
    """
    index, shape = emulated.tile(tile)
    rows, tokens = shape.rows, shape.tokens
    whole = Problem(tokens + 9, 5 * rows + 8, 16, dtype=dtype, seed=index)
    emulated.check(whole, tile=index, stream_k=0)
    cut = Problem(2 * tokens - 3, 2 * rows + 40, 48, dtype=dtype, bias=False, prepared=False)
    emulated.check(cut, tile=index, stream_k=4, chance=20)


@pytest.mark.parametrize("group", [4, 6, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("tile", ["128x128 (1 CTA)", "64x128", "64x64", "64x16", "256x160"])
def test_metadata_is_made_of_zeros_in_every_phase(emulated, tile, group):
    """A stage of 64 windows begins anywhere in a group, and K cuts the last one off."""
    index, shape = emulated.tile(tile)
    for blocks in (1, 7, 16):  # of eight groups
        problem = Problem(5, shape.rows + 24, 8 * blocks, group, prepared=False, seed=blocks)
        emulated.check(problem, tile=index, stream_k=0)


@pytest.mark.parametrize("group", [4, 8, 16])
def test_the_metadata_of_some_outputs_is_a_part_of_it(emulated, group):
    """So it can be cut over a mesh, by as many outputs as the form says."""
    whole = Problem(1, 384, 24, group)
    zeros = whole.operands()[0]["zeros"]
    metadata = emulated.metadata(zeros, whole.shape())
    for parts in (2, 3, 6):
        assert HOPPER.form.bears(whole.out, parts, 1)
        part = dataclasses.replace(whole, out=whole.out // parts).shape()
        each = [emulated.metadata(some, part) for some in np.split(zeros, parts)]
        np.testing.assert_array_equal(np.concatenate(each), metadata)
    assert not HOPPER.form.bears(whole.out, 4, 1) and not HOPPER.form.bears(whole.out, 1, 2)


@pytest.mark.parametrize("tile", [name for name in TILES if "zeros" in name])
@pytest.mark.parametrize("groups", [16, 32, 48, 112])
def test_consumers_make_metadata_in_every_phase(emulated, tile, groups):
    """Stages begin within a group. K is whole, or cut anywhere; W ends within a stage."""
    index, shape = emulated.tile(tile)
    for stream_k, chance in ((0, 50), (3, 20), (5, 60)):
        problem = Problem(
            shape.tokens + 3, 2 * shape.rows + 24, groups, prepared=False, seed=stream_k + groups
        )
        emulated.check(problem, tile=index, stream_k=stream_k, chance=chance)


def test_where_consumers_cannot_make_metadata(emulated):
    tile = make_schedule(tile=emulated.names.index("128x256 (zeros)"))
    given = {"zeros": 16, "operand": emulated.dtype(np.int8), "result": emulated.dtype(np.float32)}
    assert emulated.refusal(Problem(1, 8, 16).shape(), tile, **given) is None
    assert b"eight" in emulated.refusal(Problem(1, 8, 8).shape(), tile, **given)
    assert b"eight" in emulated.refusal(Problem(1, 8, 16, 6).shape(), tile, **given)
    assert b"zeros" in emulated.refusal(Problem(1, 8, 16).shape(), tile, **{**given, "zeros": 8})


@pytest.mark.parametrize("tile", DENSE)
@both_inputs
def test_every_tile_of_dense_weights(emulated, tile, dtype):
    index, shape = emulated.tile(tile)
    rows, tokens = shape.rows, shape.tokens
    whole = Problem(tokens + 9, 5 * rows + 8, K=144, dtype=dtype, seed=index)
    emulated.check(whole, tile=index, stream_k=0)
    cut = Problem(2 * tokens - 3, 2 * rows + 40, K=592, dtype=dtype, bias=False)
    emulated.check(cut, tile=index, stream_k=4, chance=20)


def test_int32_results_are_of_int8_operands(emulated):
    emulated.check(Problem(37, 70, 24, y_dtype=np.int32), stream_k=3)
    wrong = {"operand": emulated.dtype(INPUT[0]), "result": emulated.dtype(np.int32)}
    assert b"int8" in emulated.refusal(Problem(1, 1, 8).shape(), zeros=16, **wrong)


# Whole tiles, tiles that are cut through memory, and tiles cut within a cluster.
CUTS = [{"stream_k": 0}, {"stream_k": 4, "chance": 20}, {"cluster_split": 2}]
# Tiles that can add a residual.
ADDING = tuple(name for name in TILES if not name.startswith("256"))


residuals = pytest.mark.parametrize(("residual", "i", "cut"), pairs(OUTPUT[:3], range(3), CUTS))


def check_residual(emulated, tile, residual, i, cut, M, **weight):
    """The `i`-th problem of a tile."""
    index, shape = emulated.tile(tile)
    problem = Problem(
        M,
        2 * shape.rows + 40 + i,
        y_dtype=OUTPUT[i],
        bias=i != 1,
        residual=residual,
        over_residual=True,
        after_lift=i != 1,
        seed=i,
        **weight,
    )
    emulated.check(problem, tile=index, **cut)


@pytest.mark.parametrize("tile", ADDING)
@residuals
def test_a_residual_in_every_tile(emulated, tile, residual, i, cut):
    M = min(emulated.tile(tile)[1].tokens - 3 + 2 * i, 256)
    check_residual(emulated, tile, residual, i, cut, M, groups=48, prepared=False)


@pytest.mark.parametrize("tile", ["dense 128x64", "dense 128x16"])
@residuals
def test_a_residual_of_a_dense_weight(emulated, tile, residual, i, cut):
    M = emulated.tile(tile)[1].tokens - 3 + i
    check_residual(emulated, tile, residual, i, cut, M, K=592)


def test_where_a_residual_is_refused(emulated):
    residual = {"residual": 16, "zeros": 16, "operand": emulated.dtype(np.int8)}
    result = {"result": emulated.dtype(np.float32)}
    assert emulated.refusal(Problem(256, 8, 8).shape(), **residual, **result) is None
    assert b"256 rows" in emulated.refusal(Problem(257, 8, 8).shape(), **residual, **result)
    assert emulated.refusal(Problem(64, 8, K=32).shape(), **residual, **result) is None
    assert b"64 of a dense" in emulated.refusal(Problem(65, 8, K=32).shape(), **residual, **result)
    large = make_schedule(tile=emulated.names.index("256x192"))
    assert b"tiles" in emulated.refusal(Problem(1, 8, 8).shape(), large, **residual, **result)
    sums = {"result": emulated.dtype(np.int32)}
    assert b"int32" in emulated.refusal(Problem(1, 8, 8).shape(), **residual, **sums)


any_schedule = {
    "stream_k": st.sampled_from([-1, 0, 2, 3]),
    "cluster_split": st.sampled_from([-1, -1, 1, 2, 3, 8]),
    "share_w": st.sampled_from([-1, 0, 1]),
}


@given(
    problem=st.builds(
        Problem,
        M=st.integers(1, 300),
        out=st.integers(1, 700),
        groups=st.integers(1, 8).map(lambda blocks: 8 * blocks),
        group=st.sampled_from([4, 6, 8, 10, 12, 14, 16]),
        dtype=st.sampled_from(INPUT),
        y_dtype=st.sampled_from(OUTPUT),
        bias=st.booleans(),
        after_lift=st.booleans(),
        prepared=st.booleans(),
        seed=st.integers(0, 1000),
    ),
    schedule=st.fixed_dictionaries(
        {
            "tile": st.integers(-1, len(TILES) - 1),
            "token_group": st.sampled_from([-1, 1, 2]),
            **any_schedule,
        }
    ),
    resident=st.sampled_from([2, MULTIPROCESSORS]),
    chance=st.sampled_from([5, 30, 90]),
)
@settings(max_examples=20)
def test_any_problem_under_any_schedule(emulated, problem, schedule, resident, chance):
    if problem.y_dtype == np.int32:
        problem = dataclasses.replace(problem, dtype=np.int8)
    if "zeros" in TILES[schedule["tile"]] and schedule["tile"] >= 0:
        problem = dataclasses.replace(problem, group=8, groups=-(-problem.groups // 16) * 16)
    emulated.check(problem, resident=resident, chance=chance, **schedule)


@given(
    problem=st.builds(
        Problem,
        M=st.integers(1, 300),
        out=st.integers(1, 700),
        K=st.integers(1, 60).map(lambda n: 16 * n),
        dtype=st.sampled_from(INPUT),
        y_dtype=st.sampled_from(OUTPUT[:3]),
        bias=st.booleans(),
        after_lift=st.booleans(),
        seed=st.integers(0, 1000),
    ),
    schedule=st.fixed_dictionaries(any_schedule),
    resident=st.sampled_from([2, MULTIPROCESSORS]),
)
@settings(max_examples=8)
def test_any_dense_problem(emulated, problem, schedule, resident):
    emulated.check(problem, resident=resident, **schedule)

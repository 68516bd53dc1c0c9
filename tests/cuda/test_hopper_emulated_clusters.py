"""The Hopper kernel on the CPU (hopper_emulator.py): CTA groups that share tiles along K, and CTA
pairs that share W."""

import numpy as np
import pytest
from cases import pairs
from hopper_emulator import INPUT, MULTIPROCESSORS, Problem

both_inputs = pytest.mark.parametrize("dtype", INPUT, ids=("e4m3", "int8"))


@both_inputs
@pytest.mark.parametrize("tile", ["256x192", "64x64"])
def test_split_sums_do_not_need_the_whole_grid_to_run(emulated, tile, dtype):
    """Other kernels seem to hold most of the device. A CTA may not wait for another one that begins
    only when the first has left."""
    index, shape = emulated.tile(tile)
    problem = Problem(shape.tokens, shape.rows * shape.ctas, 96, dtype=dtype)
    emulated.check(problem, tile=index, stream_k=4, resident=2)


def test_scales_of_a_sum_stay_until_every_lane_has_read_them(emulated):
    problem = Problem(203, 728, 24, 16, y_dtype=np.float32, bias=False, seed=298655)
    tile, _ = emulated.tile("128x128")
    emulated.check(problem, tile=tile, stream_k=3, token_group=1, resident=2, chance=30)


@both_inputs
@pytest.mark.parametrize(
    ("tile", "parts"),
    [
        ("64x16", 2),
        ("64x32", 3),
        ("64x64", 4),
        ("64x16", 6),
        ("64x32", 8),
        ("128x256", 2),
        ("256x128", 2),
        ("128x128", 4),
        ("128x128 (4 CTAs)", 2),
        ("128x128 (1 CTA)", 4),
        ("128x256 (zeros)", 2),
        ("128x128 (1 CTA, zeros)", 3),
    ],
)
def test_cta_groups_of_a_cluster_divide_k(emulated, tile, parts, dtype):
    """First all tiles are divided, then the last one behind whole ones."""
    index, shape = emulated.tile(tile)
    rows, tokens, ctas = shape.rows, shape.tokens, shape.ctas
    divided = {"tile": index, "cluster_split": parts}
    problem = Problem(tokens - 3, rows * ctas, 96, dtype=dtype, seed=parts)
    emulated.check(problem, **divided, chance=30)
    groups = MULTIPROCESSORS // ctas
    if parts * ctas > 2:  # such clusters do not fill a device
        groups = groups * (10 if parts * ctas % 3 else 9) // 11 // parts * parts
    if groups:
        out = (groups + 1) * rows * ctas - 24
        problem = Problem(tokens, out, 32, dtype=dtype, seed=parts, bias=False)
        emulated.check(problem, **divided)


@both_inputs
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_cta_groups_divide_k_of_a_dense_weight(emulated, parts, dtype):
    problem = Problem(5, 128, K=2048, dtype=dtype, y_dtype=np.float32, bias=False, seed=parts)
    tile, _ = emulated.tile("dense 128x64")
    emulated.check(problem, cluster_split=parts, tile=tile)


@pytest.mark.parametrize(
    ("tile", "dtype", "resident"),
    pairs(
        [
            "256x192",
            "128x256",
            "256x160",
            "256x128",
            "128x128",
            "128x256 (zeros)",
            "128x128 (zeros)",
        ],
        INPUT,
        [MULTIPROCESSORS, 4],
    ),
)
def test_two_cta_pairs_share_the_weights(emulated, tile, dtype, resident):
    """2x2 clusters share W, and the other CTA groups run in pairs. Tiles are whole at first, then
    cut along K, where one of the last pair of tiles lies beyond M."""
    index, shape = emulated.tile(tile)
    rows, tokens = shape.rows, shape.tokens
    shared = {"tile": index, "share_w": 1, "resident": resident}
    emulated.check(Problem(tokens + 9, 7 * rows + 8, 16, dtype=dtype), **shared, stream_k=0)
    problem = Problem(3 * tokens - 3, 3 * rows + 40, 48, dtype=dtype, bias=False)
    emulated.check(problem, **shared, stream_k=-1, chance=20, token_group=2)
    problem = Problem(2 * tokens, 2 * rows, 48, dtype=dtype, y_dtype=np.float32, seed=1)
    emulated.check(problem, **shared, stream_k=3)


@both_inputs
@pytest.mark.parametrize("tile", ["dense 256x192", "dense 128x256", "dense 128x128"])
def test_two_cta_pairs_share_dense_weights(emulated, tile, dtype):
    index, shape = emulated.tile(tile)
    problem = Problem(3 * shape.tokens - 3, 3 * shape.rows + 40, K=592, dtype=dtype)
    emulated.check(problem, tile=index, share_w=1)

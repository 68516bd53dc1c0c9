"""cuSPARSELt's metadata in any order that is a sum over bits (cuda/cusparselt/order.h).

It is compiled with the host's C++ compiler alone.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import cuda_formulas as formulas
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BITS = 24


class Layout(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_int64),
        ("of_row", ctypes.c_int64 * BITS),
        ("of_window", ctypes.c_int64 * BITS),
        ("run", ctypes.c_int64),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    target = tmp_path_factory.mktemp("order") / "order.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'cuda'}"]
    command = ["g++", *flags, ROOT / "tests/cuda/plans/order.cc", "-o", target]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.run_of.restype = ctypes.c_int64
    return library


def layout_of(library, order, rows, windows, neighbours):
    """A layout in which the bits of the address are those of row and window, in a random order.

    The lowest bits of the window stay lowest, so that `neighbours` windows are neighbours.
    """
    fixed = neighbours.bit_length() - 1
    places = [("window", i) for i in range(fixed)]
    free = [("row", i) for i in range((rows - 1).bit_length())]
    free += [("window", i) for i in range(fixed, (windows - 1).bit_length())]
    places += [free[i] for i in order.permutation(len(free))]
    layout = Layout()
    for place, (of, bit) in enumerate(places):
        (layout.of_row if of == "row" else layout.of_window)[bit] = 1 << place
    layout.run = library.run_of(ctypes.byref(layout))
    return layout, 1 << len(places)


def addresses(layout, rows, windows):
    def term(terms, numbers):
        return sum(terms[bit] * (numbers >> bit & 1) for bit in range(BITS))

    return layout.base + term(layout.of_row, rows)[:, None] + term(layout.of_window, windows)[None]


@pytest.mark.parametrize("neighbours", [2, 4, 8, 16])
@pytest.mark.parametrize("group", [4, 6, 8, 10, 12, 14, 16])
def test_every_nibble_is_in_its_place(library, group, neighbours):
    order = np.random.default_rng(group * neighbours)
    rows, blocks, windows_of_group = 9, 5, group // 2 - 1
    windows = 8 * blocks * windows_of_group
    pairs = np.array([(a, b) for a in range(group) for b in range(a + 1, group)])
    chosen = pairs[order.integers(0, len(pairs), (rows, 8 * blocks))]
    zeros = (chosen[..., 0] | chosen[..., 1] << 4).astype(np.uint8)
    layout, size = layout_of(library, order, rows, windows, neighbours)
    assert layout.run == min(neighbours, 8)

    metadata = np.zeros(size // 2, np.uint8)
    library.pack(
        ctypes.byref(layout),
        zeros.ctypes.data_as(ctypes.c_void_p),
        windows_of_group,
        rows,
        blocks,
        metadata.ctypes.data_as(ctypes.c_void_p),
    )
    nibbles = np.stack([metadata & 15, metadata >> 4], -1).reshape(-1)
    got = nibbles[addresses(layout, np.arange(rows), np.arange(windows))]

    # The places of the non-zeros in the weight itself.
    weight = formulas.lifted_weight(np.ones((rows, 8 * blocks, group - 2), np.int8), zeros)
    first = weight.reshape(rows, windows, 4).argmax(-1)
    second = 3 - weight.reshape(rows, windows, 4)[..., ::-1].argmax(-1)
    np.testing.assert_array_equal(got, first | second << 2)


def test_nibbles_that_are_no_neighbours_make_no_run(library):
    layout = Layout()
    layout.of_window[0], layout.of_window[1] = 2, 1
    assert library.run_of(ctypes.byref(layout)) == 1
    # Neighbours, but rows begin at odd nibbles.
    layout.of_window[0], layout.of_window[1], layout.of_row[0] = 1, 2, 5
    assert library.run_of(ctypes.byref(layout)) == 1
    layout.of_row[0], layout.of_window[2], layout.of_window[3] = 64, 4, 12
    assert library.run_of(ctypes.byref(layout)) == 4

"""The attention kernels, compiled for the CPU and run thread by thread (cuda_on_cpu/).

Each case draws another order of the threads, and asynchronous copies arrive as early or as late as
they may. Reads beyond the arrays are found, and so are writes beyond a block's shared memory. There
are no clusters here: the partial results of a row's thread blocks meet in the second kernel.
"""

import ctypes
import random

import cuda_emulator
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problem import Problem

from slidejax.ops.decode_attention import workspace_bytes

FLOATS = ["bfloat16", "float16", "float32"]
DEVICES = [(132, 232448), (108, 166912), (46, 101376), (2, 49152)]  # multiprocessors, bytes
AROUND = 64  # bytes on both sides of what is written


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_emulator.load(tmp_path_factory, "attention")


class Memory:
    """The bytes of an array with others around them, aligned to 64."""

    def __init__(self, array):
        array = np.ascontiguousarray(array)
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.nbytes
        whole = np.full(array.nbytes + 2 * AROUND + 64, 0xCD, np.uint8)
        begin = AROUND + -(whole.ctypes.data + AROUND) % 64
        self.around = whole[begin - AROUND : begin + self.size + AROUND]
        self.around[AROUND : AROUND + self.size] = array.view(np.uint8).reshape(-1)

    @property
    def pointer(self):
        return ctypes.c_void_p(self.around.ctypes.data + AROUND)

    def array(self):
        assert (self.around[:AROUND] == 0xCD).all()
        assert (self.around[AROUND + self.size :] == 0xCD).all()
        return self.around[AROUND : AROUND + self.size].view(self.dtype).reshape(self.shape)


def run(library, problem, together, device, lazy, seed):
    """y, keys and values of one call."""
    of = problem.arrays()
    if together:
        of["q"] = np.concatenate([of["q"], of["k"], of["v"]], 1)
    y = np.full((problem.rows, problem.heads, problem.head_dim), 7, problem.dtype)
    held = {name: Memory(x) for name, x in {**of, "y": y}.items()}
    at = {name: memory.pointer for name, memory in held.items()}
    if together:
        at["k"] = at["v"] = None
    name_of = lambda dtype: str(jnp.dtype(dtype)).encode()  # noqa: E731
    status = library.attention(
        *(at["q"], at["k"], at["v"], name_of(problem.dtype), at["keys"], at["values"]),
        *(name_of(problem.cache_dtype), at["positions"], at["cosines"], at["sines"], at["y"]),
        *(problem.rows, problem.heads, problem.kv_heads, problem.length, problem.head_dim),
        *(ctypes.c_float(problem.scale), problem.window or 0, *device, lazy, seed),
    )
    assert status == 0
    return [held[name].array() for name in ("y", "keys", "values")]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", FLOATS)
def test_any_order_of_threads(library, dtype, cache_dtype):
    rng = random.Random(f"{dtype} {cache_dtype}")
    for group in (rng.randint(1, 4), rng.randint(5, 8)):
        problem = Problem(
            rows=rng.choice([1, 1, 2]),
            kv_heads=1,
            group=group,
            length=rng.choice([rng.randint(1, 40), rng.randint(100, 200)]),
            head_dim=16 * rng.randint(1, 16),
            dtype=jnp.dtype(dtype),
            cache_dtype=jnp.dtype(cache_dtype),
            window=rng.choice([None, None, rng.randint(1, 100)]),
            seed=rng.randint(0, 99),
        )
        together = rng.random() < 0.5
        device, lazy = rng.choice(DEVICES), rng.randint(0, 1)
        problem.compare(*run(library, problem, together, device, lazy, rng.randint(0, 10**6)))


@pytest.mark.parametrize("length", [1, 13, 150])
@pytest.mark.parametrize("device", [DEVICES[0], DEVICES[3]])
def test_a_ring_of_slots(library, length, device):
    """Before it is full, when it is just full, and after many turns; the old token is not seen."""
    rng = random.Random(f"ring {length} {device}")
    for positions in ((length - 1, length), (length + rng.randrange(length), 7 * length - 1)):
        problem = Problem(
            rows=2,
            kv_heads=1,
            group=rng.choice([1, 3, 5, 11]),
            length=length,
            window=length,
            head_dim=16 * rng.randint(1, 8),
            positions=positions,
            cache_dtype=jnp.dtype(rng.choice(FLOATS)),
        )
        problem.compare(*run(library, problem, False, device, rng.randint(0, 1), length))


def test_more_heads_than_a_thread_block_takes(library):
    problem = Problem(rows=1, kv_heads=1, group=11, length=50, head_dim=32, positions=(47,))
    problem.compare(*run(library, problem, True, DEVICES[0], 1, 0))


def test_many_rows_are_not_split(library):
    problem = Problem(rows=33, kv_heads=4, group=1, length=20, head_dim=16)
    assert workspace_bytes(33, 4, 4, 16) == 16
    problem.compare(*run(library, problem, False, DEVICES[3], 0, 1))


def test_a_nan_in_the_cache_is_seen(library):
    """A row that sees a nan gives nan, and a row that does not gives none."""
    problem = Problem(rows=1, kv_heads=1, group=1, positions=(20,), window=8)
    of = problem.arrays()
    for at, bad in ((15, True), (5, False), (22, False)):

        class Changed(Problem):
            def arrays(self, at=at):
                values = of["values"].copy()
                values[:, :, at] = np.nan
                return {**of, "values": values}

        changed = Changed(rows=1, kv_heads=1, group=1, positions=(20,), window=8)
        y, _, _ = run(library, changed, False, DEVICES[0], 0, 0)
        assert np.isnan(y).all() == bad and np.isnan(y).any() == bad


@pytest.mark.parametrize(
    "shape", [(1, 32, 8, 128), (1, 7, 1, 256), (3, 12, 4, 64), (64, 32, 8, 80)]
)
def test_python_knows_the_size_of_the_workspace(library, shape):
    library.attention_workspace.restype = ctypes.c_int64
    assert workspace_bytes(*shape) == 16 + library.attention_workspace(*shape)

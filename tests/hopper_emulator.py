"""The Hopper kernel run on the CPU, thread by thread, under random schedules.

cuda/hopper/launch.cu is compiled for the host as it is. Only its headers with instructions, ptx.cuh
and wgmma.cuh, are replaced by those of tests/cuda/hopper_on_cpu, whose emulator.h says how the
emulator works.
"""

import ctypes
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import cuda_emulator
import cuda_formulas as formulas
import ml_dtypes
import numpy as np
import pytest

SOURCES = cuda_emulator.KERNELS
EMULATOR = cuda_emulator.TESTS / "hopper_on_cpu"
INPUT = (ml_dtypes.float8_e4m3fn, np.int8)
OUTPUT = (ml_dtypes.bfloat16, np.float16, np.float32, np.int32)
MULTIPROCESSORS = 12
POISON = 0xFF  # nan in every dtype of floats
AUTO = -1


def _fields(ctype, *names):
    return [(name, ctype) for name in names]


class Shape(ctypes.Structure):
    """hopper::Problem."""

    _fields_ = _fields(ctypes.c_int32, "M", "out", "columns", "group")


class Schedule(ctypes.Structure):
    """hopper::Schedule."""

    _fields_ = _fields(
        ctypes.c_int32, "tile", "token_group", "stream_k", "cluster_split", "share_w"
    )


class Arguments(ctypes.Structure):
    """hopper::Args."""

    _fields_ = [
        ("problem", Shape),
        ("schedule", Schedule),
        *_fields(ctypes.c_int32, "operand", "result"),
        *_fields(ctypes.c_void_p, "lifted", "scale_x", "values", "zeros", "metadata", "scale_w"),
        *_fields(ctypes.c_void_p, "bias", "residual"),
        ("residual_type", ctypes.c_int32),
        *_fields(ctypes.c_void_p, "y", "workspace"),
        ("workspace_bytes", ctypes.c_size_t),
        ("after_lift", ctypes.c_bool),
    ]


class Counters(ctypes.Structure):
    """hopper::Counters."""

    _fields_ = [("first", ctypes.c_void_p), ("count", ctypes.c_int)]


class Tile(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), *_fields(ctypes.c_int32, "rows", "tokens", "ctas")]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product of random operands. The weight is sparse with `groups`, or dense with `K`."""

    M: int
    out: int
    groups: int = 0
    group: int = 8
    K: int = 0
    dtype: Any = np.int8
    y_dtype: Any = OUTPUT[0]
    bias: bool = True
    residual: Any = None  # the dtype of one, or None
    over_residual: bool = False  # y is written over it, where their dtypes are the same
    prepared: bool = True  # the metadata is expanded before the call
    after_lift: bool = False
    seed: int = 0

    def operands(self):
        """The operands by the names of Arguments, and the exact accumulators."""
        rng = np.random.default_rng(self.seed)

        def codes(*shape):
            if self.dtype == np.int8:
                return rng.integers(-127, 128, shape).astype(np.int8)
            return (8 * rng.standard_normal(shape)).astype(np.float32).astype(self.dtype)

        arrays = {
            "scale_x": (rng.random(self.M) + 0.5).astype(np.float32),
            "scale_w": ((rng.random(self.out) + 0.5) * 1e-3).astype(np.float32),
        }
        if self.bias:
            arrays["bias"] = rng.standard_normal(self.out).astype(np.float32)
        if self.residual is not None:
            residual = 4 * rng.standard_normal((self.M, self.out)).astype(np.float32)
            arrays["residual"] = residual.astype(self.residual)
        if self.K:
            arrays |= {"lifted": codes(self.M, self.K), "values": codes(self.out, self.K)}
            return arrays, formulas.accumulate(arrays["lifted"], arrays["values"])
        pairs = np.array(
            [(first, second) for second in range(self.group) for first in range(second)]
        )
        z = pairs[rng.integers(len(pairs), size=(self.out, self.groups))]
        arrays |= {
            "lifted": formulas.lift(codes(self.M, self.groups * self.group), self.group),
            "values": codes(self.out, self.groups, self.group - 2),
            "zeros": (z[..., 0] | z[..., 1] << 4).astype(np.uint8),
        }
        weight = formulas.lifted_weight(arrays["values"], arrays["zeros"])
        return arrays, formulas.accumulate(arrays["lifted"], weight)

    def shape(self):
        group = 0 if self.K else self.group
        columns = self.K or 2 * self.groups * (self.group - 2)
        return Shape(M=self.M, out=self.out, columns=columns, group=group)


def buffer(count):
    """Poisoned bytes, aligned as the kernel wants them."""
    raw = np.full(count + 128, POISON, np.uint8)
    start = -raw.ctypes.data % 128
    return raw[start : start + count]


def copied(array):
    to = buffer(array.nbytes)
    to[:] = np.ascontiguousarray(array).view(np.uint8).ravel()
    return to


class Emulated:
    """The compiled kernel."""

    def __init__(self, path):
        self.library = library = ctypes.CDLL(path)
        pointer = ctypes.POINTER
        for name, result, *arguments in (
            ("dtype", ctypes.c_int, ctypes.c_char_p),
            ("tile_count", ctypes.c_int),
            ("tile", Tile, ctypes.c_int),
            ("check", ctypes.c_char_p, pointer(Arguments)),
            ("metadata_bytes", ctypes.c_size_t, pointer(Shape)),
            ("workspace_bytes", ctypes.c_size_t, pointer(Arguments), ctypes.c_int),
            ("expand_metadata", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, pointer(Shape)),
            ("before_lift", ctypes.c_int, pointer(Arguments), pointer(Counters)),
            ("sparse_matmul", ctypes.c_int, pointer(Arguments)),
        ):
            function = getattr(library, f"hopper_{name}")
            function.restype, function.argtypes = result, arguments
        library.emulator_lift.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.tiles = [library.hopper_tile(i) for i in range(library.hopper_tile_count())]
        self.names = [tile.name.decode() for tile in self.tiles]

    def dtype(self, dtype):
        """Its number in the kernel."""
        return self.library.hopper_dtype(np.dtype(dtype).name.encode())

    def tile(self, name):
        """A tile's index and its shape."""
        index = self.names.index(name)
        return index, self.tiles[index]

    def refusal(self, shape, schedule=None, **arguments):
        """The kernel's complaint about a call, as bytes, or None."""
        given = Arguments(problem=shape, schedule=schedule or make_schedule(), **arguments)
        return self.library.hopper_check(given)

    def check(self, problem, *, resident=MULTIPROCESSORS, chance=50, **schedule):
        """Runs a product and compares it with the exact one: int8 bit for bit.

        Args:
          problem: the product.
          resident: multiprocessors that are free, of all MULTIPROCESSORS.
          chance: the chance, in percent, that an event which could happen next does happen.
          **schedule: fields of Schedule; the cost model chooses the others.
        """
        arrays, acc = problem.operands()
        want = formulas.finish(acc, arrays["scale_x"], arrays["scale_w"], arrays.get("bias"))
        if "residual" in arrays:
            want = want + arrays["residual"].astype(np.float32)
        want = (acc if problem.y_dtype == np.int32 else want).astype(problem.y_dtype)
        got = self._run(problem, arrays, want.nbytes, resident, chance, make_schedule(**schedule))
        got = got.view(want.dtype).reshape(want.shape)
        if problem.dtype == np.int8:
            np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))
        else:  # float32 sums in another order, and now and then another rounding of y
            want = want.astype(np.float64)
            error = np.linalg.norm(got.astype(np.float64) - want)
            bound = 1e-5 if problem.y_dtype == np.float32 else 1e-3
            assert error <= bound * np.linalg.norm(want)

    def _run(self, problem, arrays, y_bytes, resident, chance, schedule):
        """The bytes of y."""
        self.library.emulator_configure(MULTIPROCESSORS, resident, chance, problem.seed)
        buffers = {name: copied(array) for name, array in arrays.items()}
        y = buffer(y_bytes + 64)
        if problem.over_residual and problem.residual == problem.y_dtype:
            y[:y_bytes] = buffers["residual"]
            buffers["residual"] = y[:y_bytes]
        shape = problem.shape()
        arguments = Arguments(
            problem=shape,
            schedule=schedule,
            operand=self.dtype(problem.dtype),
            result=self.dtype(problem.y_dtype),
            residual_type=self.dtype(problem.residual or OUTPUT[0]),
            after_lift=problem.after_lift,
            y=y.ctypes.data,
            **{name: array.ctypes.data for name, array in buffers.items()},
        )
        if problem.prepared and not problem.K:
            metadata = self.metadata(buffers["zeros"], shape)
            arguments.metadata = metadata.ctypes.data
        bytes_ = self.library.hopper_workspace_bytes(arguments, MULTIPROCESSORS)
        workspace = buffer(max(bytes_, 1))
        arguments.workspace, arguments.workspace_bytes = workspace.ctypes.data, bytes_
        assert self.library.hopper_check(arguments) is None
        if problem.after_lift:
            self._begin_lift(arguments, buffers)
        assert self.library.hopper_sparse_matmul(arguments) == 0, (
            "the kernel hangs: standard error says where"
        )
        assert (y[y_bytes:] == POISON).all(), "the kernel writes beyond y"
        return y[:y_bytes]

    def metadata(self, zeros, shape):
        """The metadata of a weight with these zeros `[out, groups]`, in the kernel's order."""
        zeros, metadata = copied(zeros), buffer(self.library.hopper_metadata_bytes(shape))
        to = metadata.ctypes.data
        assert self.library.hopper_expand_metadata(zeros.ctypes.data, to, shape) == 0
        return metadata

    def _begin_lift(self, arguments, buffers):
        """Poisons the results of the lift. They are written at some moment after the launch."""
        counters = Counters()
        assert self.library.hopper_before_lift(arguments, counters) == 0
        zeros = buffer(8 * counters.count + 1)
        zeros[:] = 0
        self.library.emulator_lift(counters.first, zeros.ctypes.data, 8 * counters.count)
        for name in {"lifted", "scale_x", "residual"} & buffers.keys():
            written = buffers[name]
            self.library.emulator_lift(written.ctypes.data, written.ctypes.data, written.nbytes)
            written[:] = POISON


def make_schedule(**chosen):
    """A Schedule. The cost model chooses the fields that are not given."""
    names = [name for name, _ in Schedule._fields_]
    return Schedule(**{**dict.fromkeys(names, AUTO), **chosen})


def cuda_headers():
    """The folder of cuda.h, or None."""
    nvcc = shutil.which("nvcc")
    beside = [Path(nvcc).resolve().parents[1]] if nvcc else []
    named = filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")))
    roots = [*map(Path, named), *beside, Path("/usr/local/cuda"), Path("/opt/cuda")]
    return next((root / "include" for root in roots if (root / "include/cuda.h").exists()), None)


def build(tmp_path_factory):
    """Compiles the kernel for the emulator; skips without a compiler or the headers of CUDA."""
    include = cuda_headers()
    if include is None:
        pytest.skip("needs the headers of the CUDA toolkit")
    # The emulator's headers come first, in place of the kernel's of the same name.
    flags = ["-std=c++20", "-Og", "-w", *(f"-I{folder}" for folder in (EMULATOR, SOURCES, include))]
    sources = [SOURCES / "hopper/launch.cu", SOURCES / "hopper/plan.cc"]
    sources += [EMULATOR / "api.cc", EMULATOR / "emulator.cc"]
    return cuda_emulator.compiled(tmp_path_factory, "hopper", flags, sources)

"""`linear` in NumPy, written from docs/contract.md alone, and random cases for it.

Nothing of slidejax takes part but the pattern's two numbers. Numbers are float32 throughout.
"""

import dataclasses

import ml_dtypes
import numpy as np

QMAX = {"int8": 127.0, "float8_e4m3fn": 448.0}
TINY = np.finfo(np.float32).tiny


@dataclasses.dataclass(frozen=True)
class Program:
    """The facts of one compiled program: sizes, dtypes, whether bias and residual are added."""

    rows: int
    columns: int
    outputs: int
    pattern: str
    dtype: str
    x_dtype: str = "float32"
    out_dtype: str = "float32"
    adds: bool = False


@dataclasses.dataclass
class Case:
    """The arguments of one product."""

    program: Program
    x: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray | None = None
    residual: np.ndarray | None = None

    @property
    def group(self):
        pattern = self.program.pattern
        return 4 if pattern == "dense" else int(pattern.split(":")[1])


PATTERNS = ("2:4", "4:6", "6:8", "8:10", "10:12", "12:14", "14:16", "dense")
FLOATS = ("float32", "bfloat16", "float16")
# Sizes are few, so that programs are compiled once for many cases.
SIZES = {"rows": (1, 2, 3, 8, 17), "columns": (1, 7, 64, 96, 130), "outputs": (1, 5, 16, 33)}
GPU_SIZES = {
    "rows": (1, 2, 3, 8, 17, 40, 100, 200, 300),
    "columns": (1, 7, 64, 96, 130, 600, 1000),
    "outputs": (1, 5, 16, 33, 77, 264),
}


def random_programs(number, count, sizes):
    """`count` programs that read weights of one shape; 16 numbers give every pattern and dtype."""
    rng = np.random.default_rng([number, 7])
    weight = {name: int(rng.choice(sizes[name])) for name in ("columns", "outputs")}
    weight["pattern"] = PATTERNS[number % len(PATTERNS)]
    weight["dtype"] = list(QMAX)[number // len(PATTERNS) % len(QMAX)]
    return [
        Program(
            rows=int(rng.choice(sizes["rows"])),
            x_dtype=str(rng.choice(FLOATS)),
            out_dtype=str(rng.choice(FLOATS)),
            adds=bool(rng.integers(2)),
            **weight,
        )
        for _ in range(count)
    ]


def random_case(seed, program):
    """A case with rows and columns of all magnitudes, some zero, subnormal, infinite or nan."""
    rng = np.random.default_rng(seed)
    rows, columns, outputs = program.rows, program.columns, program.outputs
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    x *= np.exp(rng.standard_normal((rows, 1)) * rng.choice([0, 3])).astype(np.float32)
    kernel = rng.standard_normal((columns, outputs)).astype(np.float32)
    kernel *= np.exp(rng.standard_normal(outputs) * rng.choice([0, 3])).astype(np.float32)
    if rng.random() < 0.3:  # equal magnitudes: the first column is pruned
        kernel = np.round(kernel)
    for array in (x, kernel.T):
        if rng.random() < 0.3:
            line = rng.integers(len(array))
            value = rng.choice([0, 1e-37, 1e-42, np.inf, -np.inf, np.nan])
            array[line, rng.integers(columns) if value != 0 else slice(None)] = value
    with np.errstate(over="ignore"):
        case = Case(program, x.astype(program.x_dtype), kernel)
    if program.adds:
        case.bias = rng.standard_normal(outputs).astype(np.float32)
        case.residual = (rng.standard_normal((rows, outputs)) * 3).astype(program.x_dtype)
    return case


def _quantised(lines, dtype):
    """Codes and scales of lines `[n, k]`, each with a scale of its own."""
    lines, qmax = lines.astype(np.float32), np.float32(QMAX[dtype])
    with np.errstate(all="ignore"):
        largest = np.abs(lines).max(-1, keepdims=True, initial=0)  # NumPy's maximum keeps nan
        scale = largest * np.float32(1 / QMAX[dtype])
        idle, broken = scale < TINY, ~np.isfinite(largest)
        scale = np.where(idle, np.float32(1), scale)
        # On every device numbers below the smallest normal one count as zeros.
        lines = np.where(np.abs(lines) < TINY, np.float32(0), lines)
        scaled = np.clip(lines * (np.float32(1) / scale), -qmax, qmax)
        scaled = np.where(idle | broken, np.float32(0), scaled)
    codes = np.rint(scaled) if dtype == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float32), np.where(broken, np.float32(np.nan), scale)


def _kept(case):
    """The kernel with zeros where its two smallest magnitudes of each group were."""
    if case.program.pattern == "dense":
        return case.kernel
    columns, outputs = case.kernel.shape
    score = np.abs(case.kernel).astype(np.float32)
    score = np.where(np.isnan(score), np.inf, score)
    missing = -columns % case.group
    score = np.concatenate([score, np.full((missing, outputs), -1, np.float32)])  # pruned first
    groups = score.reshape(-1, case.group, outputs)
    order = np.argsort(groups, axis=1, kind="stable")  # of equal ones the first
    mask = np.ones(groups.shape, bool)
    np.put_along_axis(mask, order[:, :2], False, axis=1)
    return np.where(mask.reshape(-1, outputs)[:columns], case.kernel, np.float32(0))


def expected(case):
    """The result of `linear` in float32, before the one rounding to its dtype.

    Returns:
      `(y, products, terms)`, all `[rows, outputs]`: the result, the part of it that is products,
      and the sum of the magnitudes of all terms.
    """
    codes_x, scale_x = _quantised(case.x, case.program.dtype)
    codes_w, scale_w = _quantised(_kept(case).T, case.program.dtype)
    with np.errstate(all="ignore"):
        products, terms = (
            ((x.astype(np.float64) @ w.T.astype(np.float64)).astype(np.float32) * scale_x)
            * scale_w.T
            for x, w in ((codes_x, codes_w), (np.abs(codes_x), np.abs(codes_w)))
        )
        y = products
        for term in (case.bias, case.residual):
            if term is not None:
                term = term.astype(np.float32)
                y, terms = y + term, terms + np.abs(term)
    return y, products, terms


def check(case, y, float8=1e-6, exact=True, twice=False):
    """Asserts that a result is the right one.

    int8 sums are exact, so that results are right bit for bit: float32 of the int32 sums, scaled
    twice, bias and residual added, rounded once to the result's dtype. Where not `exact`, a
    multiplication may be fused with the addition behind it. Where `twice`, bfloat16 is rounded
    twice, as the contract says of cuSPARSELt. Sums of float8 products have no fixed order. Their
    error is at most `float8` of the sum of their terms' magnitudes.
    """
    out_dtype = ml_dtypes.finfo(case.program.out_dtype)
    right, products, terms = expected(case)
    y = np.asarray(y)
    assert y.dtype == case.program.out_dtype and y.shape == right.shape
    y = y.astype(np.float32)
    with np.errstate(all="ignore"):
        rounded = right.astype(case.program.out_dtype).astype(np.float32)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(rounded))
        twice = twice and case.program.out_dtype == "bfloat16"
        if case.program.dtype == "int8" and not twice and (exact or not case.program.adds):
            np.testing.assert_array_equal(y, rounded)
            return
        half = float(out_dtype.eps) / 2
        bound = terms * (2.0**-22 if case.program.dtype == "int8" else float8)
        if twice:
            bound = bound + half * np.abs(products)
        bound = bound + half * (np.abs(right) + bound) + float(out_dtype.smallest_subnormal)
        far = np.abs(y - right) > np.where(np.isfinite(rounded), bound, np.inf)
        same = np.isfinite(rounded) | (y == rounded) | np.isnan(rounded)
        largest = float(out_dtype.max)
        near = np.abs(right) + bound >= largest  # it may round to infinity or not
    assert (~far | near).all() and (same | near).all()

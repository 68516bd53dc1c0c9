"""`linear` in NumPy, written from docs/contract.md alone, and random cases for it.

Nothing of slidejax takes part but the pattern's two numbers. Numbers are float32 throughout.
"""

import dataclasses

import ml_dtypes
import numpy as np

QMAX = {"int8": 127.0, "float8_e4m3fn": 448.0}
TINY = np.finfo(np.float32).tiny


@dataclasses.dataclass
class Case:
    """The arguments of one product."""

    pattern: str
    dtype: str
    x: np.ndarray
    kernel: np.ndarray

    @property
    def group(self):
        return 4 if self.pattern == "dense" else int(self.pattern.split(":")[1])


PATTERNS = ("2:4", "4:6", "6:8", "8:10", "10:12", "12:14", "14:16", "dense")
SIZES = {"rows": (1, 2, 3, 8, 17), "columns": (1, 7, 64, 96, 130), "outputs": (1, 5, 16, 33)}


def random_case(seed, dtype=None):
    """A case with rows and columns of all magnitudes, some zero, subnormal, infinite or nan.

    Sizes are few, so that programs are compiled once for many cases.
    """
    rng = np.random.default_rng(seed)
    rows, columns, outputs = (rng.choice(SIZES[name]) for name in SIZES)
    x_dtype = rng.choice(["float32", "bfloat16", "float16"])
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
    dtype = dtype or str(rng.choice(list(QMAX)))
    return Case(str(rng.choice(PATTERNS)), dtype, x.astype(x_dtype), kernel)


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
    if case.pattern == "dense":
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
    """What `linear` gives in float32.

    Returns:
      `(y, terms)`: both `[rows, outputs]`, the result, and the sum of the magnitudes of its terms.
    """
    codes_x, scale_x = _quantised(case.x, case.dtype)
    codes_w, scale_w = _quantised(_kept(case).T, case.dtype)
    with np.errstate(all="ignore"):
        sums, terms = (
            ((x.astype(np.float64) @ w.T.astype(np.float64)).astype(np.float32) * scale_x)
            * scale_w.T
            for x, w in ((codes_x, codes_w), (np.abs(codes_x), np.abs(codes_w)))
        )
    return sums, terms


def check(case, y, float8=1e-6):
    """Asserts that a result is the right one.

    int8 sums are exact, so that results are right bit for bit: float32 of the int32 sums, scaled
    twice, rounded nowhere else. Sums of float8 products have no fixed order. Their error is at most
    `float8` of the sum of their terms' magnitudes.
    """
    right, terms = expected(case)
    y = np.asarray(y)
    assert y.dtype == np.float32 and y.shape == right.shape
    np.testing.assert_array_equal(np.isnan(y), np.isnan(right))
    if case.dtype == "int8":
        np.testing.assert_array_equal(y, right)
    else:
        assert (~(np.abs(y - right) > float8 * terms)).all()

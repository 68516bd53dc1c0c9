"""The formulas of docs/contract.md in NumPy, independent of slidejax's own reference.

The kernels are compared with them. Beside them stand rows to try them on.
"""

import ml_dtypes
import numpy as np

import slidejax as sj

QMAX = {np.dtype(np.int8): 127.0, np.dtype(ml_dtypes.float8_e4m3fn): 448.0}


def values(rows, columns, dtype, seed=0):
    """Rows of very different sizes, with ties and zeros among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-6, 7, (rows, 1)))
    x[rng.random(x.shape) < 0.02] = 0
    # Half of these values are ties at scale 1. The magnitude 127 makes 1 the row's scale.
    x[rows // 2, :] = rng.integers(-254, 255, columns) / 2
    x[rows // 2, 0] = 127
    return x.astype(dtype)


def quantize(x, dtype, absmax=None):
    """Codes and float32 scales of the rows of x, each step rounded once, as IEEE has it."""
    x = np.asarray(x).astype(np.float32)
    dtype = np.dtype(dtype)
    if absmax is None:
        with np.errstate(invalid="ignore"):
            absmax = np.abs(x).max(1, initial=0)
    absmax = np.asarray(absmax, np.float32)
    finite = np.isfinite(absmax)
    if dtype not in QMAX:
        return x.astype(dtype), np.where(finite, np.float32(1), np.float32(np.nan))
    qmax = np.float32(QMAX[dtype])
    with np.errstate(all="ignore"):
        scale = absmax * np.float32(1.0 / qmax)
        silent = ~(scale >= np.finfo(np.float32).tiny) | ~finite
        inverse = np.float32(1) / np.where(silent, np.float32(1), scale)
        v = np.where(silent[:, None], np.float32(0), x * inverse[:, None])
    v = np.clip(v, -qmax, qmax)
    codes = np.rint(v).astype(dtype) if dtype == np.int8 else v.astype(dtype)
    return codes, np.where(
        finite, np.where(silent, np.float32(1), scale), np.float32(np.nan)
    ).astype(np.float32)


def lift(codes, group):
    """[M, K] -> [M, K'], whole blocks of 8 groups."""
    if group == 0:
        return codes
    block = 8 * group
    padded = -(-codes.shape[1] // block) * block
    x = np.zeros((codes.shape[0], padded), codes.dtype)
    x[:, : codes.shape[1]] = codes
    x = x.reshape(codes.shape[0], padded // group, group)
    windows = [x[..., 2 * w : 2 * w + 4] for w in range(group // 2 - 1)]
    lifted = padded // group * 4 * len(windows)
    return np.concatenate(windows, -1).reshape(codes.shape[0], lifted)


def lifted_weight(values, zeros):
    """The packed form as a dense 2:4 matrix [out, K'], with pair w of a group's kept values in
    window w."""
    out, groups, kept = values.shape
    columns = np.arange(kept)
    z1, z2 = (zeros & 15)[..., None], (zeros >> 4)[..., None]
    at = columns + (columns >= z1)
    at = at + (at >= z2)
    lane = at - 2 * (columns // 2)
    dense = np.zeros((out, groups, kept // 2, 4), values.dtype)
    index = np.broadcast_to((columns // 2)[None, None], at.shape)
    o, g = np.indices(at.shape[:2])
    dense[o[..., None], g[..., None], index, lane] = values
    return dense.reshape(out, -1)


def pack(kernel, pattern, dtype):
    """`slidejax.pack` of a float32 kernel without ties, as a weight of NumPy arrays.

    JAX would compile a few programs for each shape.
    """
    pattern, (columns, out) = sj.Pattern.parse(pattern), kernel.shape
    group = pattern.group
    values = np.zeros((out, -(-columns // (8 * group)) * 8 * group), np.float32)
    values[:, :columns] = kernel.T
    values, zeros = values.reshape(out, -1, group), np.zeros((out, 0), np.uint8)
    if pattern.prunes:  # of equal magnitudes, which are the missing columns, the last ones go
        order = group - 1 - np.argsort(np.abs(values[..., ::-1]), -1, kind="stable")
        z = np.sort(order[..., :2], -1).astype(np.uint8)
        zeros = z[..., 0] | z[..., 1] << 4
        values = np.take_along_axis(values, np.sort(order[..., 2:], -1), -1)
    codes, scale = quantize(values.reshape(out, -1), dtype)
    return sj.SlideWeight(codes.reshape(values.shape), zeros, scale, pattern, columns)


def accumulate(lifted, weight):
    """Exact products and sums, in float64 or int64."""
    sums = lifted.astype(np.float64) @ weight.astype(np.float64).T
    return sums.astype(np.int64) if lifted.dtype == np.int8 else sums  # float64 has all of them


def finish(acc, scale_x, scale_w, bias=None, residual=None):
    """float32(acc) * scale_x * scale_w + bias + residual, in float32."""
    with np.errstate(invalid="ignore"):
        y = acc.astype(np.float32) * scale_x[:, None] * scale_w[None]
        for term in (bias, residual):
            if term is not None:
                y = y + np.asarray(term).astype(np.float32)
    return y


def operands(x, w):
    """The operands: lifted codes [M, K'], the weight [out, K'], and the rows' scales."""
    values = np.asarray(w.values)
    codes, scale = quantize(np.asarray(x), values.dtype)
    if w.pattern.prunes:
        weight, codes = lifted_weight(values, np.asarray(w.zeros)), lift(codes, w.pattern.group)
    else:
        weight = values.reshape(w.out_features, -1)
        codes = np.pad(codes, ((0, 0), (0, weight.shape[1] - codes.shape[1])))
    return codes, weight, scale


def linear(x, w, bias, out_dtype, residual=None):
    """The whole of `slidejax.linear` of rows of x `[M, in]` and an 8-bit weight."""
    codes, weight, scale = operands(x, w)
    y = finish(accumulate(codes, weight), scale, np.asarray(w.scale), bias, residual)
    with np.errstate(over="ignore"):
        return y.astype(out_dtype)


def bits(a):
    """The array's bits, for comparisons that tell nan from nan and +0 from -0."""
    a = np.asarray(a)
    return a.view(f"u{a.dtype.itemsize}")


def twice_rounded(acc, scale_x, scale_w, bias=None, residual=None):
    """The bfloat16 results of cuSPARSELt's kernel and slidejax's after it, from exact sums."""
    f32 = np.float32
    y = np.asarray(acc).astype(f32).astype(ml_dtypes.bfloat16).astype(f32)
    return finish(y, scale_x, scale_w, bias, residual).astype(ml_dtypes.bfloat16)


def twice_rounded_bound(acc, scale_x, scale_w, bias=None, residual=None):
    """The exact results in float64, and how far `twice_rounded` may be from them.

    bfloat16 rounds by at most u = 2**-8 of a value: once the sum, and once the result. float32
    rounds a few times between.
    """
    u, between = 2.0**-8, 2.0**-22
    wide = np.float64
    z = np.asarray(acc, wide) * scale_x[:, None].astype(wide) * scale_w[None].astype(wide)
    b, r = (0.0 if term is None else np.asarray(term).astype(wide) for term in (bias, residual))
    exact = z + b + r
    moved = u * np.abs(z) + between * (np.abs(z) + np.abs(b) + np.abs(r))
    return exact, moved + u * (np.abs(exact) + moved)

"""The implementation "cusparselt": products by cuSPARSELt, NVIDIA's library for 2:4 weights.

The library knows no scale of a row of x. A result in bfloat16 is therefore rounded twice: the
library rounds its sums, and a kernel applies scales, bias and residual and rounds again. Compared
with one rounding of exact sums, less memory is moved between the two kernels. Results in float32
and float16 are made from the library's int32 or float32 sums, and are rounded once.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops import estimates
from slidejax.ops.cuda import calls, cusparselt, library
from slidejax.ops.implementations.base import (
    Form,
    Implementation,
    cuda_refusal,
    lift_input,
    nothing_to_skip,
)
from slidejax.ops.problem import Problem
from slidejax.ops.rates import rates_of
from slidejax.weights.numerics import is_quantized
from slidejax.weights.packed import SlideWeight

__all__ = ["CUSPARSELT", "compressed", "matmul_call"]


# Seconds that the library itself takes to compress a weight, for each lifted weight: the least that
# was measured on an H100 (4608 x 3584 to 37888 x 3584 and 3584 x 18944, 6:8 int8, 2026-11-26).
_COMPRESSION = 8e-12
# Bytes that could be moved in the time that writing the metadata takes beside its bytes, for each
# lifted weight: 168 us for 37888 x 3584 on an H100 (6:8 int8, 2026-11-26).
_SCATTERED = 2.5


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _multiple(dtype) -> int:
    """Rows and outputs must be multiples of this number for the library."""
    return 32 if is_quantized(dtype) else 16


def _compressed_bytes(w: SlideWeight) -> int:
    out, columns = _round_up(w.out_features, _multiple(w.dtype)), w.lifted_columns
    if library.on_gpu() and cusparselt.missing() is None:
        return library.load()[0].cusparselt_compressed_bytes(w.dtype.name, out, columns)
    # Ahead of time: half of the values, and a nibble for each window of whole 128 columns, as in
    # version 0.8. The call checks this.
    return out * columns // 2 * w.dtype.itemsize + out * _round_up(columns, 128) // 8


def compressed(w: SlideWeight) -> jax.Array:
    """The library's own form of a weight, uint8."""
    out_type = jax.ShapeDtypeStruct((_compressed_bytes(w),), jnp.uint8)
    layout = cusparselt.layout(w.dtype.name, w.out_features, w.lifted_columns)
    return calls.call(
        "slidejax_compress_cusparselt",
        out_type,
        w.values,
        w.zeros,
        layout=np.asarray(layout, np.int64),
    )


def matmul_call(
    lifted: jax.Array,
    scale_x: jax.Array,
    compressed: jax.Array,
    scale_w: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None = None,
    *,
    dtype,
    workspace_bytes: int,
    raw: bool = False,
    algorithm: int = -1,
    split_k: int = 1,
    split_k_mode: int = 0,
    parts: int = 1,
    beside: int = 1,
) -> jax.Array:
    """The custom call of the product.

    Args:
      lifted: `[M, K']`.
      scale_x: float32 `[M]`.
      compressed: uint8, from `compressed`.
      scale_w: float32 `[out]`.
      bias: float32 `[out]`, or `[0]` if there is none.
      residual: bfloat16, float16 or float32 `[M, out]`, or None.
      dtype: of the result.
      workspace_bytes: bytes that the call may use.
      raw: whether the result is the accumulators, int32 or float32, without scales and bias.
      algorithm, split_k, split_k_mode, parts, beside: what a search found. -1, 1, 0, 1 and 1 are
        the library's default.

    Returns:
      `[M, out]`.
    """
    out_types = (
        jax.ShapeDtypeStruct((lifted.shape[0], scale_w.shape[0]), dtype),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    y, _ = calls.call(
        "slidejax_sparse_matmul_cusparselt", out_types, lifted, scale_x, compressed, scale_w, bias,
        jnp.zeros(0, jnp.float32) if residual is None else residual,
        raw=np.bool_(raw), algorithm=np.int32(algorithm), split_k=np.int32(split_k),
        split_k_mode=np.int32(split_k_mode), parts=np.int32(parts), beside=np.int32(beside),
    )  # fmt: skip
    return y


def _choice(product: cusparselt.Product, rows: int) -> dict[str, int]:
    """The attributes of a call: those of the nearest search, or the library's default.

    If the library refuses them for this number of rows, the call takes the default.
    """
    found = cusparselt.nearest(product, rows)
    chosen = {} if found is None else found[1]
    return {name: int(chosen.get(name, value)) for name, value in cusparselt.DEFAULT.items()}


class Cusparselt(Implementation):
    """16- and 8-bit values of all patterns but "dense"."""

    name = "cusparselt"
    form = Form("cusparselt", compressed)
    cuda_only = True
    takes_residual = True

    def refuses(self, problem):
        reason = nothing_to_skip(problem) or cuda_refusal(problem)
        if reason is None and library.on_gpu():
            reason = cusparselt.missing()
        if reason is None and problem.dtype == jnp.float8_e4m3fn:
            rates = rates_of(problem.device)
            if rates is not None and not rates.float8:
                reason = f"{problem.device} has no sparse products of {problem.dtype.name}"
        if reason is None and problem.dtype == jnp.float32:
            reason = "float32 values are not supported"
        if reason is None and problem.out_dtype is None and not is_quantized(problem.dtype):
            reason = (
                "K is split over a mesh, and the library gives no float32 accumulators of "
                f"{problem.dtype.name} values"
            )
        return reason

    def linear(self, x, prologue, w, bias, out_dtype, platform="default", residual=None):
        lifted, scale_x = lift_input(x, prologue, w)
        return self.matmul(lifted, scale_x, w, bias, out_dtype, platform, residual)

    def matmul(self, lifted, scale_x, w, bias, out_dtype, platform="default", residual=None):
        raw = out_dtype is None
        rows, columns = lifted.shape
        product = cusparselt.Product.of(w.dtype, out_dtype, w.out_features, columns)
        if raw and product.result.itemsize < 4:
            raise NotImplementedError(
                f"cuSPARSELt gives no float32 accumulators of {w.dtype.name} values"
            )
        dtype = product.result if raw else np.dtype(out_dtype)
        form = w.prepared["cusparselt"] if "cusparselt" in w.prepared else compressed(w)
        bias = jnp.zeros(0, jnp.float32) if bias is None or raw else bias.astype(jnp.float32)
        tokens, out = (
            _round_up(rows, _multiple(w.dtype)),
            _round_up(w.out_features, _multiple(w.dtype)),
        )
        choice = _choice(product, rows)
        is_whole = tokens == rows and out == w.out_features
        direct = (
            is_whole and product.result.itemsize == dtype.itemsize
        )  # accumulated where y will be
        sizes = (
            0 if direct else tokens * out * product.result.itemsize,
            0 if tokens == rows else tokens * columns * w.dtype.itemsize,
            choice.pop("workspace_bytes"),
        )
        return matmul_call(
            lifted,
            scale_x[:, 0],
            form,
            w.scale,
            bias,
            residual,
            dtype=dtype,
            workspace_bytes=calls.ALIGN + sum(_round_up(size, calls.ALIGN) for size in sizes),
            raw=raw,
            **choice,
        )

    def estimate(self, problem):
        rates = rates_of(problem.device)
        if rates is None:
            return None
        columns, product = problem.pattern.lifted(problem.in_features), _product_of(problem)
        # Half of the values, and a nibble for each window of four columns.
        weight = columns * problem.out_features * (problem.dtype.itemsize / 2 + 1 / 8)
        sums = product.result.itemsize
        seconds = estimates.lift(rates, problem, columns) + estimates.multiply(
            rates, problem, columns, weight, sums, sparse=True
        )
        if is_quantized(problem.dtype) and problem.out_dtype is not None:
            seconds += estimates.finish(rates, problem, sums)
        if "cusparselt" in problem.prepared:
            return seconds
        if library.on_gpu() and not cusparselt.layout(
            problem.dtype.name, problem.out_features, columns
        ):
            return seconds + _COMPRESSION * columns * problem.out_features
        moved = estimates.packed_bytes(problem) + weight
        scattered = _SCATTERED * columns * problem.out_features
        return seconds + estimates.move(rates, moved + scattered)

    def available(self):
        return cusparselt.missing()

    def facts(self):
        release, shapes = cusparselt.version(), cusparselt.shapes()
        return {
            "cusparselt_version": None if release is None else ".".join(map(str, release)),
            "cusparselt_searched_shapes": None
            if shapes is None
            else f"{shapes}; others run its default algorithm",
        }

    def note(self, problem):
        how = _in_words(_product_of(problem), problem.rows)
        if "cusparselt" in problem.prepared:
            return how
        return f"{how}; its form is made in each call: sj.prepare makes it once"

    def settings(self, w, rows):
        return _in_words(_product(w), rows)

    def search(self, w, rows):
        best = cusparselt.search(_product(w), rows)[0]
        return (
            f"cuSPARSELt's fastest algorithm is {best['algorithm']}: {best['microseconds']:.1f} us"
        )

    def search_missing(self, w, rows=None):
        product = _product(w)
        for m in sorted({*(rows or cusparselt.ROWS)} - cusparselt.searched(product).keys()):
            try:
                cusparselt.search(product, m)
            except RuntimeError as error:
                warnings.warn(
                    f"no search for cuSPARSELt's fastest algorithm at {m} rows: {error}. Its "
                    "default runs there.",
                    stacklevel=2,
                )


def _in_words(product: cusparselt.Product, rows: int) -> str:
    """Says which algorithm a call runs."""
    found = cusparselt.nearest(product, rows)
    if found is None:
        return "the library's default algorithm, without a search: sj.prepare or slidejax tune"
    near, choice = found
    parts = f" in {choice['parts']} parts" if choice.get("parts", 1) > 1 else ""
    return (
        f"algorithm {choice['algorithm']}{parts}, the fastest of a search at M={near} "
        f"({choice['microseconds']:.1f} us without the lift)"
    )


def _product_of(problem: Problem) -> cusparselt.Product:
    """The product of a problem."""
    columns = problem.pattern.lifted(problem.in_features)
    return cusparselt.Product.of(problem.dtype, problem.out_dtype, problem.out_features, columns)


def _product(w: SlideWeight) -> cusparselt.Product:
    """The product of a weight with bfloat16 results, for which searches are made."""
    return cusparselt.Product.of(w.dtype, jnp.bfloat16, w.out_features, w.lifted_columns)


CUSPARSELT = Cusparselt()

"""Rounding a pruned kernel to 8 bit so that the layer's outputs change least.

`pack` rounds each value to the nearest code by itself. Here all codes of an output are chosen
together, by coordinate descent on the layer objective. Each kept value in turn takes the code that
is best given all others, so later columns make up for the rounding of earlier ones (as in GPTQ,
Frantar et al., arXiv 2210.17323). Further sweeps let earlier columns make up for later ones.

The scale is fixed first: of several shares of the largest magnitude, the one with the least
rounding error, weighted by the diagonal of `X^T X`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bounds import COUNT_OR_NONE
from slidejax.prune.arguments import (
    check_codes,
    check_damping,
    check_finite,
    check_layer,
    check_numbers,
)
from slidejax.prune.sparsegpt import EXACT, damped, in_range
from slidejax.weights import numerics
from slidejax.weights.layout import as_shape, check_kernel, check_mask

__all__ = ["clip_search", "round_kernel"]

_SHARES = {
    np.dtype(jnp.int8): tuple(1 - 0.02 * i for i in range(13)),
    np.dtype(jnp.float8_e4m3fn): tuple(2.0 ** (-i / 12) for i in range(12)),
}
_BLOCK = 64  # columns between two updates of the whole residual


def clip_search(kernel: jax.Array, energy: jax.Array, dtype) -> jax.Array:
    """The magnitude of each output that the largest 8-bit code stands for.

    Larger magnitudes are clipped to it. Of several shares of the largest magnitude, it is the one
    with the least rounding error, weighted by `energy`.

    Args:
      kernel: `[in, out]`, floating. It is read as float32.
      energy: float32 `[in]`, the mean square of each input, or any multiple of it.
      dtype: int8 or float8_e4m3fn.

    Returns:
      float32 `[out]`, for `slidejax.weights.numerics.encode`. It is never more than the largest
      magnitude of the output.

    Raises:
      TypeError: naming the argument, if it is no array of numbers.
      ValueError: for another shape or dtype.

    >>> clip_search(jnp.array([[1.0], [0.5]]), jnp.ones(2), "int8").tolist()
    [1.0]
    """
    kernel, dtype = check_kernel(kernel), check_codes(dtype)
    if kernel.ndim != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            f"kernel must be floating [in, out], got {kernel.dtype} of shape {kernel.shape}"
        )
    energy = as_shape(energy, "energy", kernel.shape[:1], "[in]")
    check_numbers(kernel=kernel, energy=energy)
    size = numerics.unit(kernel)
    kernel, energy = size * kernel.astype(jnp.float32), energy * numerics.unit(energy[:, None])[0]
    return _clip_search(kernel, energy, dtype) / size[0]


@functools.partial(jax.jit, static_argnums=2)
def _clip_search(kernel, energy, dtype):
    largest = numerics.absmax(kernel, 0)

    def cost(share):
        codes, scale = numerics.encode(kernel, largest * share, dtype)
        return jnp.sum(energy[:, None] * (codes.astype(jnp.float32) * scale - kernel) ** 2, axis=0)

    shares = jnp.asarray(_SHARES[dtype], jnp.float32)
    costs = jax.lax.map(cost, shares)  # [shares, out]
    return largest[0] * shares[jnp.argmin(costs, axis=0)]


def round_kernel(
    kernel: jax.Array,
    mask: jax.Array,
    gram: jax.Array,
    start: jax.Array,
    dtype,
    *,
    damping: float = 0.01,
    sweeps: int = 3,
) -> tuple[jax.Array, jax.Array]:
    """Rounds the kept weights of a kernel to 8 bit, by coordinate descent on the layer objective.

    It follows GPTQ (Frantar et al., arXiv 2210.17323), with several sweeps over the columns.

    Args:
      kernel: `[in, out]`, floating: the kernel whose outputs are to be matched.
      mask: bool `[in, out]`, True where a weight is kept.
      gram: float32 `[in, in]`, `x^T x` over the calibration inputs.
      start: `[in, out]`, floating: the kept values before rounding, such as those from `refit`.
      dtype: int8 or float8_e4m3fn.
      damping: as in `sparsegpt`.
      sweeps: the number of sweeps over all columns. The objective never rises after the first.

    Returns:
      `(kernel, scale)`. The kernel is float32 `[in, out]`, codes times scale, and zero where not
      kept. The scale is float32 `[out]`. `pack(kernel, pattern, dtype, mask=mask, scale=scale)`
      stores them without another rounding.

    Raises:
      TypeError, ValueError: as `slidejax.prune.exchange`; ValueError for another dtype.

    >>> gram, kernel = jnp.eye(4), jnp.array([[1.0], [0.3], [0.2], [0.1]])
    >>> rounded, scale = round_kernel(kernel, kernel > 0.15, gram, kernel, "int8")
    >>> jnp.round(rounded / scale).ravel().tolist()
    [127.0, 38.0, 25.0, 0.0]
    """
    dtype, sweeps = check_codes(dtype), COUNT_OR_NONE.check(sweeps, "sweeps")
    kernel, gram, start = check_layer(kernel, gram, start=start)
    check_numbers(kernel=kernel, start=start)
    mask, gram = check_mask(mask, kernel), damped(in_range(gram), check_damping(damping))
    size = numerics.unit(kernel, start)
    kernel, start = (size * k.astype(jnp.float32) for k in (kernel, jnp.where(mask, start, 0)))
    rounded, largest = _round_kernel(kernel, mask, gram, start, dtype, sweeps)
    scale = numerics.scale_from_absmax(largest / size[0], dtype)
    return check_finite(rounded / size), scale


@functools.partial(jax.jit, static_argnums=(4, 5))
def _round_kernel(kernel, mask, gram, start, dtype, sweeps):
    columns = len(kernel)
    missing = -columns % _BLOCK
    largest = _clip_search(start, jnp.diagonal(gram), dtype)
    pad = functools.partial(jnp.pad, pad_width=((0, missing), (0, 0)))
    gram = jax.scipy.linalg.block_diag(gram, jnp.eye(missing))
    kernel, mask, start = pad(kernel), pad(mask), pad(start)

    def nearest(row):
        codes, scale = numerics.encode(row, largest, dtype)
        return codes.astype(jnp.float32) * scale

    def block(b, state):
        w, r = state
        at = b * _BLOCK
        rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=_BLOCK)
        h, kept = rows(gram), rows(mask)  # [block, in]
        inner = jax.lax.dynamic_slice_in_dim(h, at, _BLOCK, axis=1)
        before = rows(w)

        def column(k, state):
            w, r = state
            old = w[k]
            new = jnp.where(kept[k], nearest(old + r[k] / inner[k, k]), 0)
            return w.at[k].set(new), r - inner[:, k, None] * (new - old)[None]

        after, _ = jax.lax.fori_loop(0, _BLOCK, column, (before, rows(r)))
        r = r - jnp.matmul(h.T, after - before, precision=EXACT)
        return jax.lax.dynamic_update_slice_in_dim(w, after, at, axis=0), r

    def sweep(_, w):
        # The residual is computed afresh, so that rounding errors do not add up.
        r = jnp.matmul(gram, kernel - w, precision=EXACT)
        return jax.lax.fori_loop(0, len(kernel) // _BLOCK, block, (w, r))[0]

    return jax.lax.fori_loop(0, sweeps, sweep, start)[:columns], largest

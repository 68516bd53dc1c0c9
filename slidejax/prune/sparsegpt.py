"""SparseGPT for (2N-2):2N patterns, with the best pair of every group and an exact refit.

The layer objective is `|| X (W - W') ||^2 = tr((W - W')^T H (W - W'))` with `H = X^T X`. Groups are pruned from left to
right as in SparseGPT (Frantar and Alistarh, arXiv 2301.00774), the columns of a group and all after it making up for what is
lost. Two things differ:

- A group loses exactly two columns, so the best pair is found by trying all of them (28 at 6:8) instead of column by column.
  With `S = (H_FF)^-1` over the columns F that are still free, removing the pair `p` costs `w_p^T (S_pp)^-1 w_p`.
- SparseGPT freezes a column once it is passed. When all masks are known the kept weights are fitted once more, all of them
  together, by conjugate gradients on the masked normal equations.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.pattern import Pattern

__all__ = ["layer_error", "refit", "sparsegpt"]

_EXACT = jax.lax.Precision.HIGHEST


def sparsegpt(
    kernel: jax.Array, pattern: str | Pattern, gram: jax.Array, *, damping: float = 0.01, refit_steps: int = 20
) -> tuple[jax.Array, jax.Array]:
    """Prunes a kernel so that the layer's outputs on the calibration inputs change least.

    Args:
      kernel: `[in, out]`, floating.
      pattern: such as `"6:8"`.
      gram: float32 `[in, in]`, `x^T x` over the calibration inputs.
      damping: added to the diagonal of `gram`, as a share of its mean.
      refit_steps: steps of conjugate gradients at the end; 0 leaves SparseGPT's own weights.

    Returns:
      `(mask, kernel)`: bool `[in, out]`, and the kernel in its dtype with kept weights changed and zeros elsewhere: what
      `pack(kernel, pattern, mask=mask)` takes.

    Raises:
      ValueError: for shapes that do not fit each other, a bad pattern, or a gram that is not finite.

    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jax.random.normal(jax.random.key(1), (8, 8))
    >>> kernel = jax.random.normal(jax.random.key(2), (8, 3))
    >>> mask, new = sparsegpt(kernel, "6:8", x.T @ x)
    >>> int(mask.sum()), bool(jnp.sum((x @ (new - kernel)) ** 2) < jnp.sum((x @ (mask * kernel - kernel)) ** 2))
    (18, True)
    """
    from slidejax.weight import check_kernel

    kernel, gram = check_kernel(kernel), jnp.asarray(gram, jnp.float32)
    if kernel.ndim != 2 or gram.shape != (kernel.shape[0],) * 2:
        raise ValueError(f"gram must be [in, in] for a kernel [in, out], got {gram.shape} for {kernel.shape}")
    if not isinstance(gram, jax.core.Tracer) and not bool(jnp.isfinite(gram).all()):
        raise ValueError("gram holds inf or nan: the calibration inputs are not finite")
    pattern = Pattern.parse(pattern)
    mask, new = _sparsegpt(kernel.astype(jnp.float32), _damped(gram, damping), pattern)
    if refit_steps:
        new = refit(kernel, mask, gram, damping=damping, steps=refit_steps, start=new)
    return mask, jnp.where(mask, new, 0).astype(kernel.dtype)


def layer_error(kernel: jax.Array, other: jax.Array, gram: jax.Array) -> jax.Array:
    """The layer objective `|| X (kernel - other) ||^2`, float32: `[in, out]` twice and `[in, in]`."""
    difference = (kernel - other).astype(jnp.float32)
    return jnp.sum(difference * jnp.matmul(gram, difference, precision=_EXACT))


@jax.jit
def _damped(gram, damping):
    diagonal = jnp.diagonal(gram)
    # an input that is never driven says nothing about its weights: any of them may go
    ridge = jnp.where(diagonal > 0, damping * jnp.mean(diagonal), 1.0)
    return gram + jnp.diag(ridge)


@functools.partial(jax.jit, static_argnums=2)
def _sparsegpt(kernel, gram, pattern: Pattern):
    size, columns = pattern.group, kernel.shape[0]
    missing = -columns % size
    # missing columns have no weight and touch no other: the pairs that hold them cost least
    weights = jnp.pad(kernel.T, ((0, 0), (0, missing)))
    gram = jax.scipy.linalg.block_diag(gram, jnp.eye(missing) * jnp.mean(jnp.diagonal(gram)))
    # (H_FF)^-1 = U_FF^T U_FF for every set F of last columns, with U^T U = H^-1 and U upper triangular
    inverse = jnp.linalg.inv(gram)
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T
    first, second = np.array(list(itertools.combinations(range(size), 2))).T

    def prune_group(g, state):
        weights, mask = state
        start = g * size
        w = jax.lax.dynamic_slice_in_dim(weights, start, size, axis=1)
        rows = jax.lax.dynamic_slice_in_dim(upper, start, size, axis=0)  # [group, K], zero left of the group
        block = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
        s = jnp.matmul(block.T, block, precision=_EXACT)
        saa, sbb, sab = s[first, first], s[second, second], s[first, second]
        a, b = w[:, first], w[:, second]
        determinant = saa * sbb - sab * sab
        ca, cb = (sbb * a - sab * b) / determinant, (saa * b - sab * a) / determinant  # (S_pp)^-1 w_p of every pair
        best = jnp.argmin(a * ca + b * cb, axis=1)[:, None]
        column = jnp.arange(size)
        at_a, at_b = column == jnp.asarray(first)[best], column == jnp.asarray(second)[best]
        pick = functools.partial(jnp.take_along_axis, indices=best, axis=1)
        coefficient = jnp.where(at_a, pick(ca), 0) + jnp.where(at_b, pick(cb), 0)
        spread = jnp.matmul(block.T, rows, precision=_EXACT)  # (H_FF)^-1 from this group to all free columns
        weights = weights - jnp.matmul(coefficient, spread, precision=_EXACT)
        kept = ~(at_a | at_b)
        weights = jax.lax.dynamic_update_slice_in_dim(
            weights, jnp.where(kept, jax.lax.dynamic_slice_in_dim(weights, start, size, axis=1), 0), start, axis=1
        )
        return weights, jax.lax.dynamic_update_slice_in_dim(mask, kept, start, axis=1)

    mask = jnp.ones(weights.shape, bool)
    weights, mask = jax.lax.fori_loop(0, weights.shape[1] // size, prune_group, (weights, mask))
    return mask[:, :columns].T, weights[:, :columns].T


def refit(
    kernel: jax.Array, mask: jax.Array, gram: jax.Array, *, damping: float = 0.01, steps: int = 20, start: jax.Array | None = None
) -> jax.Array:
    """The kept weights that minimise the layer objective for a given mask, by preconditioned conjugate gradients.

    Args:
      kernel: `[in, out]`, the dense kernel that is to be matched.
      mask: bool `[in, out]`.
      gram: float32 `[in, in]`.
      damping: as in `sparsegpt`.
      steps: of conjugate gradients; the objective falls with each.
      start: `[in, out]`, where to start; None: the kept weights as they are.

    Returns:
      float32 `[in, out]`, zero where not kept.
    """
    start = kernel if start is None else start
    return _refit(kernel.astype(jnp.float32), mask, _damped(gram, damping), start.astype(jnp.float32), steps)


@functools.partial(jax.jit, static_argnums=4)
def _refit(kernel, mask, gram, start, steps):
    def apply(v):
        return jnp.where(mask, jnp.matmul(gram, v, precision=_EXACT), 0)

    def dot(a, b):  # each output is a system of its own
        return jnp.sum(a * b, axis=0, keepdims=True)

    def ratio(a, b):
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)

    diagonal = jnp.diagonal(gram)[:, None]
    x = jnp.where(mask, start, 0)
    r = apply(kernel - x)
    z = r / diagonal

    def step(_, state):
        x, r, p, rz = state
        ap = apply(p)
        alpha = ratio(rz, dot(p, ap))
        x, r = x + alpha * p, r - alpha * ap
        z = r / diagonal
        new = dot(r, z)
        return x, r, z + ratio(new, rz) * p, new

    return jax.lax.fori_loop(0, steps, step, (x, r, z, dot(r, z)))[0]

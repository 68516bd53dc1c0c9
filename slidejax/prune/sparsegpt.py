"""SparseGPT for (2N-2):2N patterns, with the best pair of every group and an exact refit.

The layer objective is `|| X (W - W') ||^2 = tr((W - W')^T H (W - W'))` with `H = X^T X`. Groups are
pruned from left to right, as in SparseGPT (Frantar and Alistarh, arXiv 2301.00774). The kept
columns of a group, and all columns after it, make up for the loss. Two things differ:

- A group loses exactly two columns. The best pair is found by trying all pairs (28 at 6:8), where
  SparseGPT goes column by column. Let F be the columns that are still free, and `S = (H_FF)^-1`.
  Then the removal of a pair `p` costs `w_p^T (S_pp)^-1 w_p`.
- SparseGPT freezes a column once it is passed. Here all kept weights are fitted again when the
  whole mask is known, by conjugate gradients on the masked normal equations.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bounds import COUNT_OR_NONE
from slidejax.prune.arguments import (
    check_damping,
    check_finite,
    check_layer,
    check_numbers,
)
from slidejax.weights.layout import check_mask
from slidejax.weights.numerics import all_finite, known, unit
from slidejax.weights.pattern import BLOCK_GROUPS, Pattern

__all__ = ["layer_error", "refit", "sparsegpt"]

# Gram matrices and what is solved from them need all bits of float32. By default GPUs and TPUs
# multiply with fewer.
EXACT = jax.lax.Precision.HIGHEST
_SWEEPS = 2  # sweeps of `exchange` in each round


def sparsegpt(
    kernel: jax.Array,
    pattern: str | Pattern,
    gram: jax.Array,
    *,
    damping: float = 0.01,
    rounds: int = 1,
    refit_steps: int = 16,
) -> tuple[jax.Array, jax.Array]:
    """Prunes a kernel so that the layer's outputs on the calibration inputs change little.

    SparseGPT (Frantar and Alistarh, arXiv 2301.00774) finds a first mask. Then rounds of `exchange`
    and `refit` improve the mask and the kept weights.

    Args:
      kernel: `[in, out]`, floating.
      pattern: such as `"6:8"`. With "dense" the kernel stays as it is.
      gram: float32 `[in, in]`, `x^T x` over the calibration inputs.
      damping: this share of the mean of `gram`'s diagonal is added to the diagonal.
      rounds: the number of rounds of `exchange` and `refit`. 0 leaves SparseGPT's own weights.
      refit_steps: steps of conjugate gradients in each round.

    Returns:
      `(mask, kernel)`, as `pack(kernel, pattern, mask=mask)` takes them. The mask is bool
      `[in, out]`, True where a weight is kept. The returned kernel has the dtype of `kernel`,
      new values where a weight is kept, and zeros elsewhere.

    Raises:
      ValueError: for shapes that do not fit each other, a bad pattern, a gram or a kernel that is
        not finite, or a damping so small that the gram cannot be factorised. Under tracing the
        last three give nan.

    >>> x = jax.random.normal(jax.random.key(0), (64, 8))
    >>> x = x @ jax.random.normal(jax.random.key(1), (8, 8))
    >>> kernel = jax.random.normal(jax.random.key(2), (8, 3))
    >>> mask, new = sparsegpt(kernel, "6:8", x.T @ x)
    >>> loss, plain = (jnp.sum((x @ (k - kernel)) ** 2) for k in (new, mask * kernel))
    >>> int(mask.sum()), bool(loss < plain)
    (18, True)
    """
    kernel, gram = check_layer(kernel, gram)
    pattern, damping = Pattern.parse(pattern), check_damping(damping)
    rounds, refit_steps = (
        COUNT_OR_NONE.check(rounds, "rounds"),
        COUNT_OR_NONE.check(refit_steps, "refit_steps"),
    )
    if not pattern.prunes:
        return jnp.ones(kernel.shape, bool), kernel
    size = unit(kernel)
    exact, full = _driven(size * kernel.astype(jnp.float32), gram), damped(in_range(gram), damping)
    mask, new = _sparsegpt(exact, full, pattern)
    for _ in range(rounds):
        mask, new = _exchange(exact, mask, full, new, pattern, _SWEEPS)
        new = _refit(exact, mask, full, new, refit_steps)
    new = _with_idle(new / size, kernel, gram)
    new = jnp.where(mask, new, 0).astype(kernel.dtype)
    if known(all_finite, new) is False:
        if known(all_finite, kernel) is False:
            raise ValueError("kernel holds inf or nan")
        raise ValueError(
            f"damping {float(damping):g} is too small: with it gram has no Cholesky factor (there "
            "are fewer calibration inputs than columns, or they depend on each other)"
        )
    return mask, new


def exchange(
    kernel: jax.Array,
    mask: jax.Array,
    gram: jax.Array,
    start: jax.Array,
    pattern: str | Pattern,
    *,
    damping: float = 0.01,
    sweeps: int = 2,
) -> tuple[jax.Array, jax.Array]:
    """Improves a mask, one group at a time, while all other groups stay.

    Each step finds the pair of a group whose removal costs least, and the best weights for the kept
    columns of the group. This is the exact minimum of the layer objective over that group, and the
    present pair is one of the choices. So the objective never rises.

    Args:
      kernel: `[in, out]`, floating: the kernel whose outputs are to be matched.
      mask: bool `[in, out]`, True where a weight is kept. It has the pattern.
      gram: float32 `[in, in]`, `x^T x` over the calibration inputs.
      start: `[in, out]`, floating: the kept weights.
      pattern: such as `"6:8"`.
      damping: as in `sparsegpt`.
      sweeps: the number of sweeps over all groups.

    Returns:
      `(mask, kernel)`, as `sparsegpt` returns them, but the kernel is float32.

    Raises:
      TypeError: naming the argument, if it is of another kind.
      ValueError: for shapes and dtypes that do not fit each other, arrays that are not finite, a
        number out of range, a bad pattern, or "dense".
    """
    kernel, gram, start = check_layer(kernel, gram, start=start)
    mask, damping = check_mask(mask, kernel), check_damping(damping)
    check_numbers(kernel=kernel, start=start)
    pattern, sweeps = Pattern.parse(pattern), COUNT_OR_NONE.check(sweeps, "sweeps")
    if not pattern.prunes:
        raise ValueError(
            f"pattern {pattern} has no pairs to exchange: refit changes the weights alone"
        )
    size, full = unit(kernel, start), damped(in_range(gram), damping)
    exact, first = (_driven(size * k.astype(jnp.float32), gram) for k in (kernel, start))
    mask, new = _exchange(exact, mask, full, first, pattern, sweeps)
    return mask, check_finite(jnp.where(mask, _with_idle(new / size, start, gram), 0))


@jax.jit
def in_range(gram: jax.Array) -> jax.Array:
    """A Gram matrix with the largest number of its diagonal, and so of all of it, near 1.

    The solution does not depend on its unit, nor one output on the units of others.
    """
    return gram * unit(jnp.diagonal(gram)[:, None])


# An input that is always zero puts no constraint on its weights. They count as zeros while columns
# are chosen, so that they are pruned first. Those that are kept nevertheless stay as they were.


@jax.jit
def _driven(kernel, gram):
    return jnp.where(jnp.diagonal(gram)[:, None] > 0, kernel.astype(jnp.float32), 0)


@jax.jit
def _with_idle(new, kernel, gram):
    return jnp.where(jnp.diagonal(gram)[:, None] > 0, new, kernel.astype(jnp.float32))


def _best_pair(w, s, first, second):
    """Finds the pair of columns of a group whose removal costs least.

    Args:
      w: float32 `[out, group]`, the weights.
      s: float32 `[group, group]`, the group's part of the inverse of the Hessian over the columns
        that may make up for the loss.
      first: the first column of every pair, int `[pairs]`.
      second: the second column of every pair, int `[pairs]`.

    Returns:
      `(coefficient, kept)`, both `[out, group]`. The coefficient is float32: `(S_pp)^-1 w_p` at the
      pair and zero elsewhere. `kept` is bool.
    """
    saa, sbb, sab = (row[None] for row in (s[first, first], s[second, second], s[first, second]))
    a, b = w[:, first], w[:, second]
    determinant = saa * sbb - sab * sab
    ca, cb = (sbb * a - sab * b) / determinant, (saa * b - sab * a) / determinant  # of every pair
    best = jnp.argmin(a * ca + b * cb, axis=1)[:, None]
    column = jnp.arange(w.shape[1])[None]
    at_a, at_b = column == jnp.asarray(first)[best], column == jnp.asarray(second)[best]
    pick = functools.partial(jnp.take_along_axis, indices=best, axis=1)
    return jnp.where(at_a, pick(ca), 0) + jnp.where(at_b, pick(cb), 0), ~(at_a | at_b)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _exchange(kernel, mask, gram, start, pattern: Pattern, sweeps):
    size, columns, width = pattern.group, kernel.shape[0], pattern.block
    target, weights, mask, gram = _padded(kernel, pattern, gram, jnp.where(mask, start, 0), mask)
    groups = len(gram) // size
    inverses = _inverses(
        gram.reshape(groups, size, groups, size)[jnp.arange(groups), :, jnp.arange(groups)]
    )
    first, second = _pairs(size)

    def block(b, state):
        weights, mask, residual = state
        rows = jax.lax.dynamic_slice_in_dim(gram, b * width, width, axis=0)
        inner = _columns(rows, b, width)

        def group(g, state):
            weights, mask, residual = state
            inverse = inverses[b * BLOCK_GROUPS + g]
            old = _columns(weights, g, size)
            # the group's best weights if it had no mask
            free = old + _dot(_columns(residual, g, size), inverse)
            coefficient, kept = _best_pair(free, inverse, first, second)
            new = jnp.where(kept, free - _dot(coefficient, inverse), 0)
            residual = residual - _dot(
                new - old, jax.lax.dynamic_slice_in_dim(inner, g * size, size, axis=0)
            )
            return _put(weights, new, g), _put(mask, kept, g), residual

        before = _columns(weights, b, width)
        inside = before, _columns(mask, b, width), _columns(residual, b, width)
        after, kept, _ = jax.lax.fori_loop(0, BLOCK_GROUPS, group, inside)
        return _put(weights, after, b), _put(mask, kept, b), residual - _dot(after - before, rows)

    def sweep(_, state):
        weights, mask = state
        state = weights, mask, _dot(target - weights, gram)
        return jax.lax.fori_loop(0, len(gram) // width, block, state)[:2]

    weights, mask = jax.lax.fori_loop(0, sweeps, sweep, (weights, mask))
    return mask[:, :columns].T, weights[:, :columns].T


def _inverses(matrices):
    """The inverses of small positive definite matrices `[..., n, n]`, by Gauss-Jordan steps.

    A LAPACK call would take longer to compile than all of these steps take to run.
    """
    place = jnp.arange(matrices.shape[-1])

    def step(k, a):
        here = place == k
        row, column = (jax.lax.dynamic_index_in_dim(a, k, axis) for axis in (-2, -1))
        pivot = jax.lax.dynamic_index_in_dim(row, k, -1)
        row, column = jnp.where(here, 1, row) / pivot, jnp.where(here[:, None], 0, column)
        return jnp.where(here[:, None], row, jnp.where(here, 0, a) - column * row)

    return jax.lax.fori_loop(0, len(place), step, matrices)


def _pairs(size: int):
    return np.array(list(itertools.combinations(range(size), 2))).T


def _dot(a, b):
    return jnp.matmul(a, b, precision=EXACT)


def _columns(x, index, width: int):
    """The piece number `index` of the last axis, `width` columns wide."""
    return jax.lax.dynamic_slice_in_dim(x, index * width, width, axis=1)


def _put(x, piece, index):
    """`x` with the piece number `index` of the last axis replaced by `piece`."""
    return jax.lax.dynamic_update_slice_in_dim(x, piece, index * piece.shape[1], axis=1)


def _padded(kernel, pattern: Pattern, gram, *others):
    """Kernels as `[out, in]`, and `gram`, padded to whole blocks of groups.

    The added columns have zero weights, and no product with other columns in `gram`.
    """
    missing = pattern.padded(len(gram)) - len(gram)
    mean = jnp.mean(jnp.diagonal(gram))
    gram = jax.scipy.linalg.block_diag(gram, jnp.eye(missing, dtype=gram.dtype) * mean)
    return (*(jnp.pad(k.T, ((0, 0), (0, missing))) for k in (kernel, *others)), gram)


def layer_error(kernel: jax.Array, other: jax.Array, gram: jax.Array) -> jax.Array:
    """The layer objective `|| X (kernel - other) ||^2`.

    Args:
      kernel: `[in, out]`, floating.
      other: `[in, out]`, floating.
      gram: float32 `[in, in]`, `X^T X`.

    Returns:
      float32 `[]`.

    Raises:
      TypeError: naming the argument, if it is no array of numbers.
      ValueError: for shapes and dtypes that do not fit each other, or a gram that is not finite.
    """
    kernel, gram, other = check_layer(kernel, gram, other=other)
    difference = (kernel - other).astype(jnp.float32)
    return jnp.sum(difference * jnp.matmul(gram, difference, precision=EXACT))


@jax.jit
def damped(gram: jax.Array, damping: float) -> jax.Array:
    """`gram` with `damping` times the mean of its diagonal added to the diagonal.

    Where an input is always zero, a thousandth of the mean is added at least.
    """
    diagonal = jnp.diagonal(gram)
    mean = jnp.mean(diagonal)
    # The ridge keeps the matrix invertible there. It has the unit of the others.
    ridge = jnp.where(diagonal > 0, damping, jnp.maximum(damping, 1e-3)) * mean
    return gram + jnp.diag(jnp.where(mean > 0, ridge, 1.0))


@functools.partial(jax.jit, static_argnums=2)
def _sparsegpt(kernel, gram, pattern: Pattern):
    size, columns, width = pattern.group, kernel.shape[0], pattern.block
    weights, gram = _padded(kernel, pattern, gram)
    # Let U be upper triangular with U^T U = H^-1. Then (H_FF)^-1 = U_FF^T U_FF for every set F of
    # last columns. With rows and columns reversed, U is the inverse of the Cholesky factor of H.
    lower = jnp.linalg.cholesky(gram[::-1, ::-1])
    upper = jax.scipy.linalg.solve_triangular(
        lower, jnp.eye(len(gram), dtype=gram.dtype), lower=True
    )
    upper = upper[::-1, ::-1]
    first, second = _pairs(size)

    def block(b, state):
        """Prunes the groups of one block, then changes the columns after the block once for all."""
        weights, mask = state
        # these rows are zero left of the block
        rows = jax.lax.dynamic_slice_in_dim(upper, b * width, width, axis=0)
        inner = _columns(rows, b, width)

        def group(g, state):
            weights, mask, spread = state
            own = jax.lax.dynamic_slice_in_dim(inner, g * size, size, axis=0)
            corner = _columns(own, g, size)
            # this group's part of the inverse over the columns that are still free
            s = _dot(corner.T, corner)
            coefficient, kept = _best_pair(_columns(weights, g, size), s, first, second)
            through = _dot(coefficient, corner.T)
            weights = weights - _dot(through, own)
            weights = _put(weights, jnp.where(kept, _columns(weights, g, size), 0), g)
            return weights, _put(mask, kept, g), _put(spread, through, g)

        before = _columns(weights, b, width)
        inside = before, jnp.ones(before.shape, bool), jnp.zeros_like(before)
        after, kept, spread = jax.lax.fori_loop(0, BLOCK_GROUPS, group, inside)
        return _put(weights - _dot(spread, rows), after, b), _put(mask, kept, b)

    mask = jnp.ones(weights.shape, bool)
    weights, mask = jax.lax.fori_loop(0, len(gram) // width, block, (weights, mask))
    return mask[:, :columns].T, weights[:, :columns].T


def refit(
    kernel: jax.Array,
    mask: jax.Array,
    gram: jax.Array,
    *,
    damping: float = 0.01,
    steps: int = 20,
    start: jax.Array | None = None,
) -> jax.Array:
    """Fits the kept weights to the layer objective for a given mask.

    It runs conjugate gradients on the masked normal equations, preconditioned with their diagonal.

    Args:
      kernel: `[in, out]`, floating: the kernel whose outputs are to be matched.
      mask: bool `[in, out]`, True where a weight is kept.
      gram: float32 `[in, in]`, `x^T x` over the calibration inputs.
      damping: as in `sparsegpt`.
      steps: the number of steps of conjugate gradients. The objective falls with each.
      start: `[in, out]`, floating: the weights to start from. None starts from those of `kernel`.

    Returns:
      float32 `[in, out]`, zero where not kept.

    Raises:
      TypeError, ValueError: as `exchange`.
    """
    start = kernel if start is None else start
    kernel, gram, start = check_layer(kernel, gram, start=start)
    mask, damping = check_mask(mask, kernel), check_damping(damping)
    check_numbers(kernel=kernel, start=start)
    steps = COUNT_OR_NONE.check(steps, "steps")
    size = unit(kernel, start)
    kernel, start = (size * k.astype(jnp.float32) for k in (kernel, start))
    new = _refit(kernel, mask, damped(in_range(gram), damping), start, steps)
    return check_finite(new / size)


@functools.partial(jax.jit, static_argnums=4)
def _refit(kernel, mask, gram, start, steps):
    def apply(v):
        return jnp.where(mask, jnp.matmul(gram, v, precision=EXACT), 0)

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

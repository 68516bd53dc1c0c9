"""Pruning a whole model in the order of its program, each layer with the inputs that the pruned layers before it give.

For a layer with kernel `W`, input `X` in the dense model and `Z` in the model pruned so far (with its rounding to 8 bit),
the new kernel `W'` is to give what the dense layer gave, from inputs that are no longer those of the dense model:
`min || X W - Z W' ||^2` over kernels of the pattern (the asymmetry that GPTAQ, arXiv 2504.02692, corrects). Without the
pattern the optimum is `T = (Z^T Z)^-1 Z^T X W`, and up to a constant the objective is `|| Z (T - W') ||^2`: so a method
for one kernel is given the target `T` in place of `W`, and the Gram matrix `Z^T Z`.

A layer whose result is added to a stream (the residual stream of a transformer) can make up for what earlier layers lost
there, too. With the stream `R` in the dense and `S` in the pruned model: `min || (R + X W) - (S + Z W') ||^2`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.contraction import from_matrix, to_matrix
from slidejax.prune.inputs import as_rows, rounded
from slidejax.prune.sparsegpt import damped
from slidejax.prune.stages import Stages, Tap, named_leaves
from slidejax.prune.store import Store

__all__ = ["Pruned", "Solve", "prune_in_order"]

_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What a method makes of one kernel.

    Attributes:
      mask: bool `[in, out]`.
      kernel: float32 `[in, out]`, zero where not kept.
      scale: float32 `[out]`: 8-bit values are `kernel / scale`; None: they are yet to be rounded.
    """

    mask: jax.Array
    kernel: jax.Array
    scale: jax.Array | None = None


# (kernel [in, out], target [in, out], gram [in, in], path of the first of the layers that they are of) -> Pruned
Solve = Callable[[jax.Array, jax.Array, jax.Array, str], Pruned]


def prune_in_order(
    stages: Stages,
    params: Any,
    batches: Sequence[Any],
    solve: Solve,
    alike: Callable[[str], Any],
    *,
    correct: float = 0.75,
    damping: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
    store: Store | None = None,
) -> dict[str, Pruned]:
    """Prunes the layers that `stages` has taps for.

    Args:
      stages: the traced model.
      params: the dense parameters.
      batches: what to calibrate on; the values between stages are kept for each, twice.
      solve: the method.
      alike: layers with the same input for which this is equal are pruned together, as one kernel.
      correct: how far the target goes from the kernel (0) to what makes up for all that earlier layers lost, as far as
        can be told from these inputs (1). Some of that is chance, so that less than all does better on other text.
      damping: as in `sparsegpt`.
      progress: called with the numbers of stages done and of all.
      store: keeps finished stages on disk; those that it has are not computed again.

    Returns:
      Path of the kernel -> `Pruned`.
    """
    leaves = named_leaves(params)
    new = dict(leaves)
    states = [(stages.start(batch), stages.start(batch)) for batch in batches]
    done: dict[str, Pruned] = {}
    for at, taps in enumerate(stages.taps):
        groups: dict[Any, list[Tap]] = {}
        for tap in taps:
            groups.setdefault((tap.value, tap.axes.x_in, alike(tap.path)), []).append(tap)
        found = None if store is None else store.load(at)
        sums: list[Any] = [None] * len(groups)
        for i, (dense, pruned) in enumerate(states):
            xs: dict[int, Any] = {}
            if correct:
                dense, xs = stages.advance(at, dense, leaves)
            pruned, zs = stages.advance(at, pruned, new, round_inputs=True)
            states[i] = dense, pruned
            for g, members in enumerate(groups.values() if found is None else ()):
                kernels, streams = _kernels(leaves, members), [stages.streams[tap.path] for tap in members]
                value, first = members[0].value, members[0]
                lost = tuple(None if v is None or not correct else (dense[v], pruned[v]) for v in streams)
                moments = _moments(xs.get(value), zs[value], kernels, lost, first.axes, stages.qdtypes[first.path])
                sums[g] = moments if sums[g] is None else jax.tree.map(jnp.add, sums[g], moments)
        if found is None:
            found = {}
            for members, moments in zip(groups.values(), sums, strict=True):
                found |= _solve_together(members, _kernels(leaves, members), moments, solve, correct, damping)
            if store is not None:
                store.save(at, found)
        done |= found
        for tap in taps:
            leaf = leaves[tap.path]
            new[tap.path] = from_matrix(done[tap.path].kernel, leaf.shape, tap.axes.kernel).astype(leaf.dtype)
        if progress is not None:
            progress(at + 1, len(stages.taps))
    return done


def _kernels(leaves: Mapping[str, Any], taps: list[Tap]) -> tuple[jax.Array, ...]:
    return tuple(to_matrix(jnp.asarray(leaves[tap.path]), tap.axes.kernel).astype(jnp.float32) for tap in taps)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _moments(x, z, kernels, lost, axes, dtype):
    """`(Z^T Z, Z^T X, [Z^T Y])`: what one batch adds to the normal equations; None where it is not needed.

    `Y` are the outputs of the layers that make up for what the stream lost; for all others `Z^T X` is enough, and less.
    """
    z = as_rows(rounded(z, axes, dtype) if dtype is not None and dtype.itemsize == 1 else z, axes)
    dot = functools.partial(jnp.matmul, precision=_EXACT)
    gram = dot(z.T, z)
    if x is None:
        return gram, None, [None for _ in kernels]
    x = as_rows(x, axes)
    wanted: list[Any] = []
    for kernel, pair in zip(kernels, lost, strict=True):
        if pair is None:
            wanted.append(None)
        else:
            dense, pruned = (stream.reshape(len(x), kernel.shape[1]).astype(jnp.float32) for stream in pair)
            wanted.append(dot(z.T, dot(x, kernel) + dense - pruned))
    return gram, dot(z.T, x) if None in wanted else None, wanted


def _solve_together(taps, kernels, moments, solve: Solve, correct: float, damping: float) -> dict[str, Pruned]:
    gram, cross, wanted = moments
    kernel = jnp.concatenate(kernels, axis=1)
    target = kernel
    if cross is not None or any(w is not None for w in wanted):
        parts = [jnp.matmul(cross, k, precision=_EXACT) if w is None else w for k, w in zip(kernels, wanted, strict=True)]
        target = kernel + correct * (_target(gram, jnp.concatenate(parts, axis=1), kernel, damping) - kernel)
    result = solve(kernel, target, gram, taps[0].path)
    done, start = {}, 0
    for tap, k in zip(taps, kernels, strict=True):
        part = slice(start, start := start + k.shape[1])
        done[tap.path] = Pruned(result.mask[:, part], result.kernel[:, part], None if result.scale is None else result.scale[part])
    return done


@jax.jit
def _target(gram, wanted, kernel, damping):
    """The least-squares kernel without the pattern; damping pulls it to the dense kernel."""
    full = damped(gram, damping)
    ridge = (jnp.diagonal(full) - jnp.diagonal(gram))[:, None]
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(full), wanted + ridge * kernel)

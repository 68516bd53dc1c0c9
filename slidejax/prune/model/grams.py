"""The inputs of a model's layers, summed up: their Gram matrices in the original model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slidejax.contraction import Contraction
from slidejax.functional import watching_inputs
from slidejax.prune.model.inputs import as_rows
from slidejax.prune.model.program import Program, named_leaves
from slidejax.prune.model.stacked import joined
from slidejax.weights.numerics import unit

__all__ = ["collect", "collect_all"]

# Inputs whose largest magnitude is within this factor of 1 are taken as they are. Squares of others
# might not be in the range of float32.
_RANGE = 2.0**40


class _Sum(NamedTuple):
    """The Gram matrix, or its diagonal, of inputs that were multiplied by a power of two."""

    gram: jax.Array
    factor: jax.Array

    @classmethod
    def of(cls, x: jax.Array, axes: Contraction, diagonal: bool) -> _Sum:
        rows = as_rows(x, axes)
        factor = unit(rows.reshape(-1, 1))[0, 0]
        factor = jnp.where((factor > _RANGE) | (factor < 1 / _RANGE), factor, jnp.float32(1))
        rows = rows * factor
        if diagonal:
            return cls(jnp.sum(rows * rows, 0), factor)
        return cls(jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST), factor)

    def plus(self, other: _Sum) -> _Sum:
        factor = jnp.minimum(self.factor, other.factor)
        gram, more = (one.gram * (factor / one.factor) ** 2 for one in (self, other))
        return _Sum(gram + more, factor)


def collect(
    run: Callable[..., Any],
    params: Any,
    batches: Any,
    progress: Callable[[int], None] | None = None,
    *,
    diagonal: bool = False,
) -> dict[str, jax.Array]:
    """Runs a model over batches and sums up the Gram matrix of the inputs of each linear layer.

    Args:
      run: `(params, batch) -> anything`, which calls the model
        (`slidejax.functional.Functional.run`). It is jitted.
      params: the model's parameters.
      batches: batches of one shape, so that one program serves all.
      progress: called with the number of batches that are done.
      diagonal: whether only the diagonal of each matrix is wanted.

    Returns:
      Path of the layer's kernel -> float32 `[in, in]`, or `[in]` for the diagonal: `x^T x`, summed
      over all rows of all batches. Layers whose kernel is not a matrix (batched einsums) are left
      out. Inputs beyond 2**40 or below 2**-40 are multiplied by a power of two first, the same for
      all of a layer: pruning does not depend on it, and their squares stay finite and do not
      vanish.

    Raises:
      NotImplementedError: if layers run inside loops or under `vmap`, where each kernel would need
        its own matrix: `collect_all` has them.
      ValueError: if there is no batch.
    """

    @jax.jit
    def grams(params, batch):
        found: dict[str, _Sum] = {}

        def watch(path, x, axes):
            if not axes.kernel_batch:
                _add(found, path, _Sum.of(x, axes, diagonal))
            return x

        with watching_inputs(watch):
            run(params, batch)
        return found

    return _summed(lambda batch: grams(params, batch), batches, progress)


def collect_all(
    run: Callable[..., Any],
    params: Any,
    batches: Sequence[Any],
    progress: Callable[[int], None] | None = None,
    *,
    diagonal: bool = False,
    paths: Collection[str] | None = None,
) -> dict[str, jax.Array]:
    """As `collect`, also for layers inside `nn.scan` and under `vmap`, and for batched einsums.

    Args:
      run, params, batches, progress, diagonal: as in `collect`.
      paths: the kernels that are wanted. None: all.

    Returns:
      As `collect`. A parameter that holds several kernels has `[..., in, in]` or `[..., in]`: the
      matrix of each.

    Raises:
      NotImplementedError: as `slidejax.prune.model.program.Program`.
      ValueError: if there is no batch.
    """
    if not batches:
        raise ValueError("there is nothing to calibrate on: no batches")
    program = Program(run, params, batches[0], paths)

    @jax.jit
    def grams(params, batch):
        found: dict[str, _Sum] = {}
        leaves = program.elements(named_leaves(params))
        program.watch(
            leaves, batch, lambda tap, x: _add(found, tap.path, _Sum.of(x, tap.axes, diagonal))
        )
        return found

    found = _summed(lambda batch: grams(params, batch), batches, progress)
    return joined(found, program.stacks)


def _add(found: dict[str, _Sum], path: str, more: _Sum) -> None:
    found[path] = more.plus(found[path]) if path in found else more


def _summed(
    grams: Callable[[Any], dict[str, _Sum]],
    batches: Any,
    progress: Callable[[int], None] | None,
) -> dict[str, jax.Array]:
    """The sums over all batches."""
    total: dict[str, _Sum] | None = None
    for done, batch in enumerate(batches, start=1):
        try:
            found = grams(batch)
        except jax.errors.UnexpectedTracerError as error:
            raise NotImplementedError(
                "slidejax.prune.mixed cannot look into layers inside nn.scan, vmap or a loop: choose "
                "one pattern, which slidejax.prune.convert calibrates there"
            ) from error
        total = found if total is None else {path: total[path].plus(found[path]) for path in found}
        if progress is not None:
            jax.block_until_ready(total)
            progress(done)
    if total is None:
        raise ValueError("there is nothing to calibrate on: no batches")
    return {path: one.gram for path, one in total.items()}

"""The inputs of a model's layers, summed up: their Gram matrices in the original model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.functional import watching_inputs
from slidejax.prune.model.inputs import as_rows
from slidejax.prune.model.program import Program, named_leaves
from slidejax.prune.model.stacked import joined

__all__ = ["collect", "collect_all"]


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
      out.

    Raises:
      NotImplementedError: if layers run inside loops or under `vmap`, where each kernel would need
        its own matrix: `collect_all` has them.
      ValueError: if there is no batch.
    """

    @jax.jit
    def grams(params, batch):
        found: dict[str, jax.Array] = {}

        def watch(path, x, axes):
            if not axes.kernel_batch:
                _add(found, path, x, axes, diagonal)
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
        found: dict[str, jax.Array] = {}
        leaves = program.elements(named_leaves(params))
        program.watch(leaves, batch, lambda tap, x: _add(found, tap.path, x, tap.axes, diagonal))
        return found

    found = _summed(lambda batch: grams(params, batch), batches, progress)
    return joined(found, program.stacks)


def _add(found: dict[str, jax.Array], path: str, x, axes, diagonal: bool) -> None:
    """Adds the Gram matrix of an input."""
    rows = as_rows(x, axes)
    gram = (
        jnp.sum(rows * rows, 0)
        if diagonal
        else jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    )
    found[path] = gram + found[path] if path in found else gram


def _summed(
    grams: Callable[[Any], dict[str, jax.Array]],
    batches: Any,
    progress: Callable[[int], None] | None,
) -> dict[str, jax.Array]:
    """The sums over all batches."""
    total: dict[str, jax.Array] | None = None
    for done, batch in enumerate(batches, start=1):
        try:
            found = grams(batch)
        except jax.errors.UnexpectedTracerError as error:
            raise NotImplementedError(
                "slidejax.prune.mixed cannot look into layers inside nn.scan, vmap or a loop: choose "
                "one pattern, which slidejax.prune.convert calibrates there"
            ) from error
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        if progress is not None:
            jax.block_until_ready(total)
            progress(done)
    if total is None:
        raise ValueError("there is nothing to calibrate on: no batches")
    return total

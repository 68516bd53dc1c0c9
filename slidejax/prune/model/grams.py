"""The inputs of a model's layers, summed up: their Gram matrices in the original model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.functional import watching_inputs
from slidejax.prune.model.inputs import as_rows

__all__ = ["collect"]


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
      NotImplementedError: if layers run inside `nn.scan` or `jax.lax` loops. Each step of a loop
        would need its own matrix.
      ValueError: if there is no batch.
    """

    @jax.jit
    def grams(params, batch):
        found: dict[str, jax.Array] = {}

        def watch(path, x, axes):
            if not axes.kernel_batch:
                rows = as_rows(x, axes)
                gram = (
                    jnp.sum(rows * rows, 0)
                    if diagonal
                    else jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
                )
                found[path] = gram + found[path] if path in found else gram
            return x

        with watching_inputs(watch):
            run(params, batch)
        return found

    total: dict[str, jax.Array] | None = None
    for done, batch in enumerate(batches, start=1):
        try:
            found = grams(params, batch)
        except jax.errors.UnexpectedTracerError as error:
            raise NotImplementedError(
                "calibration cannot look into layers inside nn.scan or a loop"
            ) from error
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        if progress is not None:
            jax.block_until_ready(total)
            progress(done)
    if total is None:
        raise ValueError("there is nothing to calibrate on: no batches")
    return total

"""Calibration: what the inputs of every linear layer look like on some text, as Gram matrices `x^T x`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slidejax import linen
from slidejax.pattern import Pattern
from slidejax.prune.sparsegpt import sparsegpt
from slidejax.prune.wanda import wanda
from slidejax.rules import LeftDense, Prune

__all__ = ["CALIBRATED", "collect", "pruner"]

# The methods that need calibration: (kernel, pattern, gram) -> mask, or (mask, kernel).
CALIBRATED: dict[str, Callable[..., Any]] = {"wanda": wanda, "sparsegpt": sparsegpt}


def collect(run: Callable[..., Any], params: Any, batches: Iterable[Any], progress: Callable[[int], None] | None = None) -> dict[str, jax.Array]:
    """Runs a Linen model over batches and adds up the Gram matrix of the inputs of each linear layer.

    Args:
      run: `(params, batch) -> anything`, which calls the model; it is jitted.
      params: its parameters.
      batches: of equal shape, so that one program serves all.
      progress: called with the number of batches done.

    Returns:
      Path of the layer's kernel -> float32 `[in, in]`, `x^T x` summed over all rows of all batches. Layers whose kernel is
      not a matrix (batched einsums) are left out.

    Raises:
      NotImplementedError: if layers run inside `nn.scan` or `jax.lax` loops, where each step would need a matrix of its own.
      ValueError: if there is no batch.
    """

    @jax.jit
    def grams(params, batch):
        found: dict[str, jax.Array] = {}

        def record(next_fun, args, kwargs, context):
            gram = _gram(context, args, kwargs)
            if gram is not None:
                path = "/".join((*context.module.path, "kernel"))
                found[path] = gram + found[path] if path in found else gram
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(record):
            run(params, batch)
        return found

    total: dict[str, jax.Array] | None = None
    for done, batch in enumerate(batches, start=1):
        try:
            found = grams(params, batch)
        except jax.errors.UnexpectedTracerError as error:
            raise NotImplementedError("calibration cannot look into layers inside nn.scan or a loop") from error
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        if progress is not None:
            jax.block_until_ready(total)
            progress(done)
    if total is None:
        raise ValueError("there is nothing to calibrate on: no batches")
    return total


def _gram(context, args, kwargs) -> jax.Array | None:
    layer = linen.layer_of(context)
    if layer is None or linen.own_kernel(context.module) is None:
        return None
    x, args, kwargs = linen.split_input(args, kwargs)
    try:
        axes, _ = layer(context.module, x, *args, **kwargs)
    except LeftDense:
        return None
    if axes.kernel_batch:
        return None
    rest = tuple(a for a in range(x.ndim) if a not in axes.x_in)
    rows = jnp.transpose(x, (*rest, *axes.x_in)).reshape(-1, math.prod(x.shape[a] for a in axes.x_in)).astype(jnp.float32)
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


def pruner(method: str, grams: dict[str, jax.Array], **options: Any) -> Prune:
    """The `prune=` of `slidejax.linen.convert` for a calibrated method.

    Raises:
      ValueError: for an unknown method; when called for a kernel that was not calibrated.
    """
    if method not in CALIBRATED:
        raise ValueError(f"method must be one of {', '.join(CALIBRATED)}, got {method!r}")

    def prune(kernel: jax.Array, pattern: Pattern, path: str):
        if path not in grams:
            raise ValueError(f"no calibration inputs reached this layer; {method} needs them")
        if kernel.ndim != 2:
            raise ValueError(f"{method} prunes one kernel [in, out], got shape {kernel.shape}")
        return CALIBRATED[method](kernel, pattern, grams[path], **options)

    return prune

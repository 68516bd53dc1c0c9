"""One step of a training as a program: the loss in float32, its gradient by parts, the update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.prune.model.divergence import scalar
from slidejax.variants.trainable import combine

__all__ = ["loss_in_float32", "make_update", "mean_loss"]


def loss_in_float32(loss_fn: Callable[..., jax.Array], dtypes: Any) -> Callable[..., jax.Array]:
    """`loss_fn` as a function `(train, rest, batch, args) -> loss` in float32.

    `dtypes` is a tree like the trained one: the dtypes in which the model computes.
    """

    def loss_of(train, rest, batch, args):
        cast = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), train, dtypes)
        loss = loss_fn(combine(cast, rest), batch, *args)
        return scalar(loss, "loss_fn").astype(jnp.float32)

    return loss_of


def make_update(
    loss_of: Callable[..., jax.Array], transform: Any, accumulate: int, scheduled: bool
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """The jitted step.

    Args:
      loss_of: `(train, rest, batch, args) -> loss`.
      transform: the optax transformation.
      accumulate: the number of parts that a batch is cut into.
      scheduled: multiply the change by the learning rate of the step; else the transformation does
        that itself.

    Returns:
      `(train, memory, rest, batch, args, rate, sizes) -> (train, memory, loss)`; the first two
      arguments are donated.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(train, memory, rest, batch, args, rate, sizes):
        loss, gradient = _gradient(loss_of, train, rest, batch, args, accumulate)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its step counter
            change, memory = transform.update(gradient, memory, train)
        if scheduled:
            change = jax.tree.map(lambda c, size: -rate * size * c, change, sizes)
        return jax.tree.map(jnp.add, train, change), memory, loss

    return update


def mean_loss(loss_of, train, rest, batch, args, parts: int) -> jax.Array:
    """The loss, averaged over parts of the batch that run one after the other."""
    if parts == 1:
        return loss_of(train, rest, batch, args)
    return jax.lax.map(lambda part: loss_of(train, rest, part, args), _cut(batch, parts)).mean()


def _gradient(loss_of, train, rest, batch, args, parts: int):
    """The loss and its gradient, averaged over parts of the batch that run one after the other."""
    value_and_grad = jax.value_and_grad(loss_of)
    if parts == 1:
        return value_and_grad(train, rest, batch, args)

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(train, rest, part, args)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, train))
    total, _ = jax.lax.scan(add, zero, _cut(batch, parts))
    return jax.tree.map(lambda leaf: leaf / parts, total)


def _cut(batch: Any, parts: int) -> Any:
    """The leaves of a batch; the first axis of each is cut into `parts` parts."""

    def cut(leaf):
        if leaf.ndim == 0:
            raise ValueError(
                f"batches must hold arrays [rows, ...] to be cut by accumulate={parts}, got a number"
            )
        if leaf.shape[0] % parts:
            raise ValueError(f"accumulate={parts} does not divide a batch of {leaf.shape[0]}")
        return leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:])

    return jax.tree.map(cut, batch)

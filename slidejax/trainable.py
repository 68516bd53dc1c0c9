"""Splitting a tree into what is trained and the rest, for `jax.grad` and optax.

`jax.grad` raises on integer leaves and optax crashes on their float0 gradients, so a loss is written over the first part:

    train, rest = sj.partition(params)
    grads = jax.grad(lambda train: loss(sj.combine(train, rest)))(train)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from slidejax import numerics
from slidejax.weight import SlideWeight

__all__ = ["combine", "partition"]


def partition(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into `(train, rest)`, both of its structure with None where the other holds the leaf.

    `train` holds floating arrays: biases, norms, dense kernels, and the values of float-packed weights. `rest` holds
    what has no gradient: 8-bit values, zeros, scales, prepared forms, integers and other leaves.

    >>> from slidejax import pack
    >>> train, rest = partition({"kernel": pack(jnp.ones((8, 2)), "6:8"), "step": jnp.int32(3)})
    >>> len(jax.tree.leaves(train)), len(jax.tree.leaves(rest))
    (1, 3)
    """
    trained = jax.tree.map(_trained, tree, is_leaf=_is_weight)
    train = jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, trained)
    rest = jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, trained)
    return train, rest


def combine(train: Any, rest: Any) -> Any:
    """The inverse of `partition`.

    Raises:
      ValueError: if the two do not have the same structure, or both hold a leaf.
    """

    def pick(a, b):
        if a is not None and b is not None:
            raise ValueError("train and rest both hold a leaf: pass the two parts that partition returned")
        return b if a is None else a

    return jax.tree.map(pick, train, rest, is_leaf=lambda node: node is None)


def _is_weight(node) -> bool:
    return isinstance(node, SlideWeight)


def _trained(node):
    """For a leaf whether it is trained; for a packed weight the same for each of its leaves."""
    if _is_weight(node):
        rest = jax.tree.map(lambda _: False, node)
        return rest.replace(values=not numerics.is_quantized(node.dtype))
    return hasattr(node, "dtype") and jnp.issubdtype(node.dtype, jnp.floating)

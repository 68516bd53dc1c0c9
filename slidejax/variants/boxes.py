"""Trees whose packed weights cannot be read: boxed ones, and those of NNX models.

`flax.linen.with_partitioning` and `with_logical_partitioning` put each parameter into a box. In a
packed weight each leaf is in one. `slidejax.linen.convert` and `partition_spec` read boxes; what
computes with a weight needs its arrays.

An NNX layer holds the leaves of its weight as Variables of its own. A function of trees finds no
`SlideWeight` in such a model or its state, and would change nothing and say nothing.
"""

from __future__ import annotations

from typing import Any

import jax

from slidejax.weights.packed import LinearWeight

__all__ = ["HiddenPart", "refuse_boxed", "refuse_hidden"]


def refuse_boxed(tree: Any) -> None:
    """Raises TypeError, naming the path, if a leaf of a packed weight in a tree is boxed."""

    def is_weight(node):
        return isinstance(node, LinearWeight)

    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight):
        if is_weight(node) and node.packed is not None:
            node.packed.check_arrays(jax.tree_util.keystr(path, simple=True, separator="/") or "w")


class HiddenPart:
    """A leaf of a packed weight in a model that holds the leaves one by one."""


def refuse_hidden(tree: Any, name: str, instead: str | None = None) -> None:
    """Raises TypeError if a tree is an NNX model with packed weights, or its state.

    Args:
      tree: what a function of trees was given.
      name: of the function, as users write it after `slidejax.`.
      instead: what to do; by default `slidejax.nnx.map_weights` with the function.
    """

    def is_part(node):
        return isinstance(node, HiddenPart)

    if any(is_part(node) for node in jax.tree.leaves(tree, is_leaf=is_part)):
        instead = instead or f"call slidejax.nnx.map_weights(model, slidejax.{name})"
        raise TypeError(f"{name} finds no packed weights in an NNX model or its state: {instead}")

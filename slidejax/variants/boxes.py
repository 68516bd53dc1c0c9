"""Weights whose leaves are boxed with the names of mesh axes, as Flax boxes parameters.

`flax.linen.with_partitioning` and `with_logical_partitioning` put each parameter into a box. In a
packed weight each leaf is in one. `slidejax.linen.convert` and `partition_spec` read boxes; what
computes with a weight needs its arrays.
"""

from __future__ import annotations

from typing import Any

import jax

from slidejax.weights.packed import LinearWeight

__all__ = ["refuse_boxed"]


def refuse_boxed(tree: Any) -> None:
    """Raises TypeError, naming the path, if a leaf of a packed weight in a tree is boxed."""

    def is_weight(node):
        return isinstance(node, LinearWeight)

    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight):
        if is_weight(node) and node.packed is not None:
            node.packed.check_arrays(jax.tree_util.keystr(path, simple=True, separator="/") or "w")

"""The result of pruning a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.rules import Prune
from slidejax.weights.pattern import Pattern

__all__ = ["Pruned", "lookup", "not_reached"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pruned:
    """The result of pruning one kernel.

    Attributes:
      mask: bool `[in, out]`.
      kernel: float32 `[in, out]`, zero where not kept.
      scale: float32 `[out]`: 8-bit values are `kernel / scale`. None: the values are not rounded
        yet.
    """

    mask: jax.Array
    kernel: jax.Array
    scale: jax.Array | None = None

    def to_pack(self, dtype: Any) -> tuple:
        """`(mask, kernel, scale)` for `slidejax.pack`.

        Args:
          dtype: the dtype of the model's own kernel. A kernel that is not rounded yet gets it back.
        """
        kernel = jnp.asarray(self.kernel, None if self.scale is not None else dtype)
        return jnp.asarray(self.mask), kernel, self.scale


def lookup(done: Mapping[str, Pruned]) -> Prune:
    """The `prune=` of a conversion whose kernels are pruned already, by their paths."""

    def prune(kernel: jax.Array, pattern: Pattern, path: str):
        if path not in done:
            raise not_reached()
        return done[path].to_pack(kernel.dtype)

    return prune


def not_reached() -> ValueError:
    """The error for a kernel whose layer did not run on the calibration text."""
    return ValueError(
        "no calibration inputs reached this layer: skip it with the rule (its path, None)"
    )

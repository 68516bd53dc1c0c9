"""Running layers whose kernels are held together (`slidejax.variants.projections`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slidejax.contraction import Contraction
from slidejax.linen.known import product, run_layer
from slidejax.variants.projections import FusedPart, FusedWeight

__all__ = ["FusedProduct"]


class FusedProduct:
    """The latest product of fused layers in one call of a model.

    Each layer takes its part of it.
    """

    def __init__(self) -> None:
        self._key: Any = None  # the module and its layers, and their dtypes
        self._x: Any = None
        self._y: Any = None

    def part(self, module, w: FusedWeight | FusedPart, axes: Contraction, features, x) -> jax.Array:
        """The result of one layer.

        The first of the layers that is called with `x` computes the product of all.

        Args:
          module: the layer.
          w: the node in the place of the layer's kernel.
          axes: how the layer contracts its input with its kernel.
          features: sizes of the layer's output axes.
          x: the layer's input.
        """
        siblings = module.parent.variables["params"]
        holder = w.holder if isinstance(w, FusedPart) else module.name
        held: FusedWeight = siblings[holder]["kernel"]
        held.fused.check("/".join((*module.parent.path, holder, "kernel")))
        if axes != Contraction.dense(jnp.ndim(x)):
            return run_layer(module, held.part(module.name), axes, features, x)
        key = (
            module.parent.scope,
            holder,
            module.dtype,
            getattr(module, "promote_dtype", None),
        )
        if self._x is not x or self._key != key:
            bias, out = _biases(siblings, held), held.fused.out_features
            self._y = product(module, held.fused, axes, (out,), x, bias)
            self._key, self._x = key, x
        begin, end = held.bounds(module.name)
        return self._y[..., begin:end]


def _biases(modules: Mapping, w: FusedWeight) -> jax.Array | None:
    """The biases of fused layers, one after the other, with zeros for a layer that has none."""
    found = [nn.meta.unbox(modules[layer].get("bias")) for layer in w.layers]
    if all(bias is None for bias in found):
        return None
    dtype = jnp.result_type(*(bias for bias in found if bias is not None))
    return jnp.concatenate(
        [
            jnp.zeros(size, dtype) if b is None else b.astype(dtype)
            for b, size in zip(found, w.sizes, strict=True)
        ]
    )

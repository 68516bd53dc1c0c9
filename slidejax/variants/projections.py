"""Linear layers that read the same input as one product: q, k and v; gate and up.

Three products of few rows cost three launches and lift the same rows three times; one product of the three kernels, one above the
other, costs one. `fuse` puts the packed kernels of such layers together in a tree of parameters, in place of the first one's, and
`slidejax.linen.interceptor` then computes all of them when the first is called, and hands out the parts: a layer that turns
out to be called with something else multiplies with its own part of the weight. So the result is that of the layers, always.

The names are those of diffusers' `fuse_qkv_projections`; servers such as vLLM do the same when they load a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, freeze, unfreeze

from slidejax.variants.prepared import prepare
from slidejax.weights.packed import SlideWeight, WrappedWeight

__all__ = ["GROUPS", "FusedPart", "FusedWeight", "fuse", "unfuse", "unfuse_module"]

# Names of layers in one module that are called with the same array, in the models of transformers and of Flax.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))

_INSTEAD = (
    "run the model with slidejax.linen.apply, or take it apart (slidejax.linen.unfuse_projections)"
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class FusedWeight(WrappedWeight):
    """The packed kernels of several layers, one above the other, in place of the first layer's.

    Attributes:
      fused: `SlideWeight` of all outputs.
      layers: the layers' names, in order. Static.
      sizes: outputs of each. Static.
    """

    fused: SlideWeight
    layers: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def packed(self) -> SlideWeight:
        return self.fused

    @property
    def shape(self) -> tuple[int, ...]:
        return self.fused.shape

    def check(self, name: str = "w") -> FusedWeight:
        self.fused.check(name)
        return self

    def bounds(self, layer: str) -> tuple[int, int]:
        """First output of a layer, and the first of the one after."""
        ends = (0, *accumulate(self.sizes))
        index = self.layers.index(layer)
        return ends[index], ends[index + 1]

    def part(self, layer: str) -> SlideWeight:
        """The kernel of one layer, without prepared forms."""
        begin, end = self.bounds(layer)
        w = self.fused
        return w.replace(
            values=w.values[begin:end],
            zeros=w.zeros[begin:end],
            scale=w.scale[begin:end],
            prepared={},
        )

    def linear(
        self, x, bias, *, implementation=None, out_dtype=None, reduce_axis=None
    ) -> jax.Array:
        raise ValueError(f"this kernel holds those of {', '.join(self.layers)}: {_INSTEAD}")

    def trained(self) -> FusedWeight:
        return jax.tree.map(lambda leaf: False, self)  # it serves

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("fused"), self.fused),), (self.layers, self.sizes)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FusedPart(WrappedWeight):
    """What stands in place of the kernels that were put into another layer's; it holds no arrays.

    Attributes:
      holder: the name of the layer that has the `FusedWeight`.
    """

    holder: str

    @property
    def packed(self) -> SlideWeight:
        raise ValueError(f"this kernel is in the one of {self.holder}: {_INSTEAD}")

    def linear(
        self, x, bias, *, implementation=None, out_dtype=None, reduce_axis=None
    ) -> jax.Array:
        return self.packed  # type: ignore[return-value]  # raises

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape  # raises

    def check(self, name: str = "w") -> FusedPart:
        return self

    def trained(self) -> FusedPart:
        return self


def fuse(params: Any, groups: Sequence[Sequence[str]] = GROUPS) -> Any:
    """Puts the packed kernels of layers that read the same input together.

    Args:
      params: nested mappings, such as the parameters or the variables of a converted Linen or Hugging Face Flax model.
      groups: names of layers of one module that belong together, in any number; a group is fused wherever all of its layers have packed kernels
        `[in, out]` of one pattern, dtype and number of inputs.

    Returns:
      A tree of the same kind for `slidejax.linen.apply`, whose memory is that of `params`: prepared forms are made anew where there were any. What does not fit stays as
      it is. To train, shard or convert it, take it apart first (`unfuse`); `slidejax.checkpoint.save` does so itself.

    Raises:
      ValueError: if a group names a layer twice, or fewer than two.

    >>> from slidejax import pack
    >>> params = {name: {"kernel": pack(jnp.ones((64, 8)), "6:8", dtype="int8")} for name in ("gate_proj", "up_proj", "down_proj")}
    >>> fused = fuse(params)
    >>> fused["gate_proj"]["kernel"].shape, fused["up_proj"]["kernel"], fused["down_proj"]["kernel"].shape
    ((64, 16), FusedPart(holder='gate_proj'), (64, 8))
    """
    for group in groups:
        if len(group) < 2 or len(set(group)) < len(group):
            raise ValueError(f"groups must name two layers or more, each once, got {tuple(group)}")
    return _map_modules(params, lambda module: _fuse_module(module, groups))


def unfuse(params: Any) -> Any:
    """The inverse of `fuse`: every layer has its own kernel again, without prepared forms."""
    return _map_modules(params, unfuse_module)


def _map_modules(tree: Any, change) -> Any:
    """Applies `change` to every mapping of a tree, inner ones first."""
    if isinstance(tree, FrozenDict):
        return freeze(_map_modules(unfreeze(tree), change))
    if not isinstance(tree, Mapping):
        return tree
    return change({name: _map_modules(value, change) for name, value in tree.items()})


def _kernel(module: Mapping, layer: Any) -> Any:
    inner = module.get(layer)
    return inner.get("kernel") if isinstance(inner, Mapping) else None


def _with_kernels(module: Mapping, kernels: Mapping[str, Any]) -> dict:
    return {
        **module,
        **{layer: {**module[layer], "kernel": kernel} for layer, kernel in kernels.items()},
    }


def _fuse_module(module: dict, groups: Sequence[Sequence[str]]) -> dict:
    for group in groups:
        kernels = [_kernel(module, layer) for layer in group]
        if not all(
            isinstance(w, SlideWeight) and w.values.ndim == 3 and not w.is_k_shard for w in kernels
        ):
            continue
        first = kernels[0]
        if any(
            (w.in_features, w.pattern, w.dtype) != (first.in_features, first.pattern, first.dtype)
            for w in kernels
        ):
            continue
        if not all(
            isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))
            for leaf in jax.tree.leaves(kernels)
        ):
            continue  # boxed with the names of mesh axes
        one_above_the_other = {
            name: jnp.concatenate([getattr(w, name) for w in kernels])
            for name in ("values", "zeros", "scale")
        }
        fused = first.replace(prepared={}, **one_above_the_other)
        for form in first.prepared:
            fused = prepare(fused, form)
        holder = FusedWeight(fused, tuple(group), tuple(w.out_features for w in kernels))
        module = _with_kernels(
            module, {group[0]: holder, **{layer: FusedPart(group[0]) for layer in group[1:]}}
        )
    return module


def unfuse_module(module: Mapping) -> Mapping:
    """The parameters of one module with every layer's own kernel; the same object if nothing in it is fused."""
    for layer in tuple(module):
        w = _kernel(module, layer)
        if isinstance(w, FusedWeight):
            module = _with_kernels(module, {name: w.part(name) for name in w.layers})
    return module

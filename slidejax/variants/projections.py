"""Linear layers that read the same input as one product: q, k and v; gate and up.

Three products of few rows cost three launches, and lift the same rows three times. One product with
the three kernels, one above the other, costs one launch and one lift. `fuse` puts the packed
kernels of such layers together in a tree of parameters. This is another layout of the tree: a
`FusedWeight` takes the place of the first kernel, a `FusedPart` the places of the others.

`slidejax.linen.Interceptor` computes the product when the first of these layers is called, and
hands out its parts. A layer that is called with another input computes the product anew. So the
results are always those of the layers.

The names follow diffusers' `fuse_qkv_projections`. Servers such as vLLM do the same when they load
a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict, freeze, unfreeze

from slidejax.kinds import check_list, shown
from slidejax.variants.boxes import refuse_boxed
from slidejax.variants.prepared import prepare
from slidejax.weights.packed import SlideWeight, TreeLayout
from slidejax.weights.registries import register

__all__ = ["GROUPS", "FusedPart", "FusedWeight", "fuse", "unfuse", "unfuse_module"]

# Names of layers in one module that are called with the same array, in models of transformers and
# of Flax.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))

_INSTEAD = (
    "run the model with slidejax.linen.apply, or take it apart (slidejax.linen.unfuse_projections)"
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class FusedWeight(TreeLayout):
    """The packed kernels of several layers, one above the other, in the place of the first kernel.

    Attributes:
      fused: a `SlideWeight` with the outputs of all layers.
      layers: the layers' names, in order. Static.
      sizes: the number of outputs of each layer. Static.
    """

    fused: SlideWeight
    layers: tuple[str, ...]
    sizes: tuple[int, ...]

    def bounds(self, layer: str) -> tuple[int, int]:
        """The first output of a layer, and the first output after it."""
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

    def not_a_weight(self) -> ValueError:
        return ValueError(f"this kernel holds those of {', '.join(self.layers)}: {_INSTEAD}")

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("fused"), self.fused),), (self.layers, self.sizes)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FusedPart(TreeLayout):
    """Takes the place of a kernel that is held in another layer's. It has no arrays.

    Attributes:
      holder: the name of the layer that has the `FusedWeight`.
    """

    holder: str

    def not_a_weight(self) -> ValueError:
        return ValueError(f"this kernel is in the one of {self.holder}: {_INSTEAD}")


register(
    FusedWeight,
    ("fused",),
    lambda w: {"layers": list(w.layers), "sizes": list(w.sizes)},
    dataclasses.replace,
    lambda kept: (tuple(kept["layers"]), tuple(kept["sizes"])),
)
register(FusedPart, (), lambda part: {"holder": part.holder}, lambda part: part)


def fuse(params: Any, groups: Sequence[Sequence[str]] = GROUPS) -> Any:
    """Puts the packed kernels of layers that read the same input together.

    Args:
      params: nested mappings, such as the parameters or the variables of a converted Linen or
        Hugging Face Flax model.
      groups: for each group the names of its layers, which are in one module. A group is fused
        wherever all of its layers have packed kernels `[in, out]` with the same pattern, dtype and
        number of inputs.

    Returns:
      A tree of the same kind for `slidejax.linen.apply`, with the same memory. Kernels that had
      prepared forms get them for the fused kernel. Layers that do not fit together stay as they
      are. To train, shard or convert the tree, take it apart first (`unfuse`);
      `slidejax.checkpoint.save` takes it apart itself.

    Raises:
      ValueError: if a group names a layer twice, or fewer than two.
      TypeError: for groups of another kind; or naming the path, if a weight's leaves are boxed.

    >>> from slidejax import pack
    >>> w = pack(jnp.ones((64, 8)), "6:8", dtype="int8")
    >>> params = {name: {"kernel": w} for name in ("gate_proj", "up_proj", "down_proj")}
    >>> fused = fuse(params)
    >>> fused["gate_proj"]["kernel"].fused.shape, fused["up_proj"]["kernel"]
    ((64, 16), FusedPart(holder='gate_proj'))
    >>> fused["down_proj"]["kernel"].shape
    (64, 8)
    """
    for group in check_list(groups, "groups", "lists of layers' names", empty=True):
        if not all(isinstance(n, str) for n in check_list(group, "groups", "layers' names")):
            raise TypeError(f"groups must be lists of layers' names, got {shown(group)}")
        if len(group) < 2 or len(set(group)) < len(group):
            raise ValueError(f"groups must name two layers or more, each once, got {tuple(group)}")
    refuse_boxed(params)
    return _map_modules(params, lambda module: _fuse_module(module, groups))


def unfuse(params: Any) -> Any:
    """The inverse of `fuse`: each layer has its own kernel again, without prepared forms."""
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
    """The parameters of a module, taken apart; the same object if no layers are fused."""
    for layer in tuple(module):
        w = _kernel(module, layer)
        if isinstance(w, FusedWeight):
            module = _with_kernels(module, {name: w.part(name) for name in w.layers})
    return module

"""Low-rank adapters on packed weights (LoRA, Hu et al., arXiv 2106.09685).

The packed weight is frozen, and a small update of it is trained:

    y = linear(x, weight, bias) + (x @ a) @ b * scaling + residual

with `a` `[in, rank]`, `b` `[rank, out]` and `scaling = alpha / rank`. The packed weight may be
8-bit. It runs as it will serve, and the adapter runs beside it in x's dtype. In a tree of
parameters an `AdaptedWeight` takes the place of a `SlideWeight`, so Linen models, converted Hugging
Face models and NNX layers run it unchanged:

    params = sj.adapters.add(params, rank=8, seed=0)
    train, rest = sj.partition(params, sj.adapters.FACTORS)   # the factors and nothing else
    ...
    params = sj.adapters.merge(params)                        # SlideWeights again, on the same mask

A product of two factors fills the whole kernel, and the mask keeps only a part of it. So merging
changes the result, unless the adapter was trained with `masked=True`. It then multiplies with the
kept entries of `a @ b` only, and computes that kernel in each step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from slidejax.bounds import COUNT, Bound
from slidejax.ops.implementations.base import add_residual
from slidejax.ops.linear import linear
from slidejax.ops.parameters import check_residual
from slidejax.ops.sharding import product_spec, with_automatic_axes
from slidejax.variants.boxes import refuse_boxed, refuse_hidden
from slidejax.variants.trainable import Selection, is_packed, path_of, selector
from slidejax.weights import numerics
from slidejax.weights.layout import kept_values, to_groups
from slidejax.weights.packed import SlideWeight, WrappedWeight, quantize
from slidejax.weights.registries import register

__all__ = ["FACTORS", "AdaptedWeight", "add", "extract", "merge"]

# Given to `slidejax.partition`, it selects the factors of adapters and nothing else.
FACTORS = r".*lora_[ab]"


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class AdaptedWeight(WrappedWeight):
    """A packed weight and a low-rank update of it.

    Attributes:
      base: the `SlideWeight`, of any dtype. It is not trained.
      lora_a: `[..., in, rank]`, floating.
      lora_b: `[..., rank, out]`, floating. It is zero at first, so that nothing changes.
      scaling: the factor of the update. Static.
      masked: whether the update acts on the kept entries only, as it does after merging. Static.

    >>> from slidejax import pack
    >>> w = pack(jnp.ones((64, 4)), "6:8", dtype="int8")
    >>> adapted = add({"kernel": w}, rank=2)["kernel"]
    >>> bool((linear(jnp.ones((1, 64)), adapted) == linear(jnp.ones((1, 64)), w)).all())
    True
    """

    base: SlideWeight
    lora_a: jax.Array
    lora_b: jax.Array
    scaling: float
    masked: bool = False

    @property
    def packed(self) -> SlideWeight:
        return self.base

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def is_k_shard(self) -> bool:
        return self.base.is_k_shard

    def trained(self) -> AdaptedWeight:
        frozen = [False] * len(jax.tree.leaves(self.base))
        return jax.tree.unflatten(jax.tree.structure(self), [*frozen, True, True])

    def check(self, name: str = "w") -> AdaptedWeight:
        self.base.check(name)
        *batch, inputs, outputs = self.base.shape
        rank = jnp.shape(self.lora_a)[-1]
        if jnp.shape(self.lora_a) != (*batch, inputs, rank) or jnp.shape(self.lora_b) != (
            *batch,
            rank,
            outputs,
        ):
            raise ValueError(
                f"{name}: factors of a weight of shape {self.base.shape} must be [..., in, rank] "
                f"and [..., rank, out], got {jnp.shape(self.lora_a)} and {jnp.shape(self.lora_b)}"
            )
        return self

    def linear(
        self, x, bias, *, implementation=None, out_dtype=None, reduce_axis=None, residual=None
    ) -> jax.Array:
        if reduce_axis is not None or self.is_k_shard:
            raise NotImplementedError("an adapted weight needs the whole of K: merge it first")
        self.check()
        x = jnp.asarray(x)
        residual = check_residual(residual, (*x.shape[:-1], self.out_features))
        out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
        operands, tree = jax.tree.flatten((x, self, bias, residual))
        return with_automatic_axes(
            lambda *operands: _product(
                implementation, out_dtype, *jax.tree.unflatten(tree, operands)
            ),
            operands,
            lambda x, values, *_: product_spec(x, values[0]),
        )

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        children = (
            (key("base"), self.base),
            (key("lora_a"), self.lora_a),
            (key("lora_b"), self.lora_b),
        )
        return children, (self.scaling, self.masked)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)


register(
    AdaptedWeight,
    ("base", "lora_a", "lora_b"),
    lambda w: {"scaling": w.scaling, "masked": w.masked},
    dataclasses.replace,
    lambda kept: (kept["scaling"], kept["masked"]),
)


def _product(implementation, out_dtype, x, w: AdaptedWeight, bias, residual) -> jax.Array:
    """The product of an adapted weight."""
    y = linear(x, w.base, bias, implementation, jnp.float32)
    a, b = w.lora_a.astype(x.dtype), w.lora_b.astype(x.dtype)
    if w.masked:
        update = linear(x, _kept(a @ b, w.base), None, implementation, jnp.float32)
    else:
        update = jnp.matmul(x @ a, b, preferred_element_type=jnp.float32)
    y = y + update * w.scaling
    if residual is None:
        return y.astype(out_dtype)
    return add_residual(y, residual, out_dtype)


def _kept(kernel: jax.Array, w: SlideWeight) -> SlideWeight:
    """The entries of a kernel `[..., in, out]` that a weight keeps, packed on the weight's mask."""
    values = kept_values(to_groups(kernel, w.pattern), w.zeros)
    return SlideWeight(
        values, w.zeros, jnp.ones(values.shape[:-2], jnp.float32), w.pattern, w.in_features
    )


def _float_dtype(dtype: Any) -> np.dtype:
    found = numerics.dtype_of(dtype)
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype, got {dtype!r:.60}")
    return found


def add(
    tree: Any,
    rank: int = 8,
    *,
    alpha: float | None = None,
    masked: bool = False,
    adapted: Selection = None,
    dtype: Any = jnp.float32,
    seed: int = 0,
) -> Any:
    """Puts an `AdaptedWeight` in the place of packed weights. At first it computes the same.

    Args:
      tree: any pytree with `SlideWeight`s.
      rank: the rank of the updates.
      alpha: the updates are multiplied by `alpha / rank`. None multiplies them by 1.
      masked: whether the updates act on the kept entries only, so that `merge` changes nothing but
        rounding.
      adapted: which weights to adapt: a regular expression for their '/'-joined path, or a function
        of it. None adapts all.
      dtype: dtype of the factors.
      seed: seed for `lora_a`, which is normal with variance `1 / in`. `lora_b` is zero.

    Returns:
      The tree. Other leaves stay.

    Raises:
      ValueError: naming it, for a number out of range or a dtype that is not floating; or if no
        weight is selected.
      TypeError: naming the path, if a weight's leaves are boxed; or if the tree is an NNX model or
        its state (see `slidejax.nnx.map_weights`).
    """
    refuse_boxed(tree)
    refuse_hidden(tree, "adapters.add")
    rank, dtype = COUNT.check(rank, "rank"), _float_dtype(dtype)
    scaling = 1.0 if alpha is None else Bound(-1e38).check(alpha, "alpha") / rank
    seed = Bound(-(2**63), 2**63 - 1, whole=True).check(seed, "seed")
    selected, found = selector(adapted, "adapted"), 0

    def adapt(keys, w):
        nonlocal found
        if not isinstance(w, SlideWeight) or not selected(path_of(keys)):
            return w
        *batch, inputs, outputs = w.shape
        key = jax.random.fold_in(jax.random.key(seed), found)
        found += 1
        a = jax.random.normal(key, (*batch, inputs, rank), jnp.float32) / math.sqrt(inputs)
        return AdaptedWeight(
            w, a.astype(dtype), jnp.zeros((*batch, rank, outputs), dtype), scaling, masked
        )

    result = jax.tree_util.tree_map_with_path(adapt, tree, is_leaf=is_packed)
    if not found:
        raise ValueError(f"adapted={adapted!r} selects no packed weight")
    return result


def merge(tree: Any) -> Any:
    """Adds each update to the kept values of its weight.

    8-bit weights are quantised again, with new scales.

    The mask stays, so the entries of an update where the weight keeps nothing are lost. With
    `masked=True` there are none.

    Returns:
      The tree with `SlideWeight`s, without prepared forms.

    Raises:
      TypeError: if the tree is an NNX model or its state (see `slidejax.nnx.map_weights`).
    """
    refuse_hidden(tree, "adapters.merge")
    return jax.tree.map(
        lambda w: _merge(w) if isinstance(w, AdaptedWeight) else w, tree, is_leaf=is_packed
    )


def _merge(w: AdaptedWeight) -> SlideWeight:
    """The merged weight, cut over a mesh as its base is."""
    w = dataclasses.replace(w, base=w.base.check().replace(prepared={}))
    operands, tree = jax.tree.flatten(w)
    values, zeros, scale = with_automatic_axes(
        lambda *operands: jax.tree.leaves(_merged(jax.tree.unflatten(tree, operands))),
        operands,
        lambda *specs: [PartitionSpec(*spec) for spec in specs[:3]],
    )
    return w.base.replace(values=values, zeros=zeros, scale=scale)


@jax.jit
def _merged(w: AdaptedWeight) -> SlideWeight:
    base = w.base
    product = jnp.matmul(
        w.lora_a.astype(jnp.float32),
        w.lora_b.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    values = (
        base.values.astype(jnp.float32) * base.scale[..., None, None]
        + _kept(product, base).values * w.scaling
    )
    merged = base.replace(values=values, scale=jnp.ones_like(base.scale))
    if numerics.is_quantized(base.dtype):
        return quantize(merged, base.dtype)
    return merged.replace(values=values.astype(base.dtype))


def extract(tree: Any) -> dict[str, dict[str, jax.Array]]:
    """The factors of all adapters, to save beside the model.

    Returns:
      `{path: {"lora_a": ..., "lora_b": ...}}`.
    """
    return {
        path_of(keys): {"lora_a": w.lora_a, "lora_b": w.lora_b}
        for keys, w in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_packed)
        if isinstance(w, AdaptedWeight)
    }

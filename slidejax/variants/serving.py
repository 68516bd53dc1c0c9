"""What serves a tree of parameters on a device: weights without what its programs do not read.

On a CPU products run from the dense codes. The packed form is not read any more, and with it goes the pattern: `serving` leaves the
codes and scales alone (`ServingWeight`), so that one compiled program serves every pattern.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops.implementations.dense import DENSE
from slidejax.ops.implementations.reference import accumulate, finish
from slidejax.ops.lift_quantize import quantize_rows
from slidejax.ops.primitive import check_input
from slidejax.ops.sparse_matmul import check_result
from slidejax.variants.prepared import map_weights, prepare
from slidejax.weights.numerics import is_quantized
from slidejax.weights.packed import WrappedWeight, check_weight

__all__ = ["DenseWeight", "ServingWeight", "serving"]


def serving(tree: Any) -> Any:
    """What serves a tree of parameters on this device: prepared, and without what the programs do not read.

    Args:
      tree: any pytree, such as a converted model's parameters.

    Returns:
      The tree: on a CPU a `ServingWeight` in place of each `SlideWeight`, so that weights of every pattern run in one
      program; on a GPU as `prepare` makes it, since kernels read the packed form. Wrapped weights and other leaves stay.

    >>> from slidejax import pack
    >>> w = pack(jax.random.normal(jax.random.key(0), (64, 4)), "6:8", dtype="int8")
    >>> jax.tree.structure(serving(w)) == jax.tree.structure(serving(pack(jnp.ones((64, 4)), "2:4", dtype="int8")))
    True
    """
    if jax.default_backend() != "cpu":
        return prepare(tree)
    return map_weights(lambda w: ServingWeight(DENSE.form.of(check_weight(w)), w.scale), tree)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class ServingWeight(WrappedWeight):
    """The "dense" prepared form of a weight, alone: `slidejax.linear` computes with it what the implementation "dense" computes
    in plain JAX with the weight that it was made from, bit for bit. It serves and is neither trained nor saved; layers that
    hold packed weights by themselves (`SlideDense`, `SlideLinear`) do not take it.

    Attributes:
      values: `[..., out, in]`, the codes in the values' dtype, zeros included.
      scale: float32 `[..., out]`.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def packed(self) -> None:
        return None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return np.dtype(self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-2], self.values.shape[-1], self.values.shape[-2])

    @property
    def promoted(self) -> jax.Array | None:
        return None if is_quantized(self.dtype) else self.values

    def with_promoted(self, values: jax.Array) -> ServingWeight:
        return dataclasses.replace(self, values=values)

    def trained(self) -> ServingWeight:
        return ServingWeight(False, False)  # type: ignore[arg-type]

    def check(self, name: str = "w") -> ServingWeight:
        """Returns self if the leaves are what `serving` makes; ValueError otherwise."""
        if self.scale.dtype != jnp.float32 or self.scale.shape != self.values.shape[:-1]:
            raise ValueError(
                f"{name} has leaves values {self.values.dtype} {self.values.shape}, scale {self.scale.dtype} {self.scale.shape}; serving makes "
                f"scale float32 {self.values.shape[:-1]}. A cast of the whole tree ruins packed weights: cast before packing"
            )
        return self

    def linear(
        self, x, bias, *, implementation=None, out_dtype=None, reduce_axis=None
    ) -> jax.Array:
        self.check()
        if implementation not in (None, DENSE.name) or reduce_axis is not None:
            raise NotImplementedError(
                f"a weight made to serve runs dense on one device, not implementation={implementation!r}, {reduce_axis=}"
            )
        x = check_input(x)
        out, k = self.values.shape
        if x.shape[-1] != k:
            raise ValueError(
                f"x must be [..., {k}] for a weight with in_features {k}, got shape {x.shape}"
            )
        bias, out_dtype = check_result(out, bias, x.dtype if out_dtype is None else out_dtype)
        rows = x.reshape(math.prod(x.shape[:-1]), k)
        return _product_of(out_dtype, rows, self.values, self.scale, bias).reshape(
            *x.shape[:-1], out
        )

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("values"), self.values), (key("scale"), self.scale)), None

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children)


@functools.partial(
    jax.jit, static_argnums=0
)  # traced once for each shape, however many layers have it
def _product_of(out_dtype, x, values, scale, bias) -> jax.Array:
    return _dense_product(out_dtype, x, values, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense_product(out_dtype, x, values, scale, bias) -> jax.Array:
    codes, scale_x = quantize_rows(x, values.dtype)
    return finish(accumulate(codes, values), scale_x, scale, bias, out_dtype)


def _dense_forward(out_dtype, x, values, scale, bias):
    return _dense_product(out_dtype, x, values, scale, bias), (x, values, scale, bias)


def _dense_backward(out_dtype, saved, dy):
    """Straight-through, as `linear` has it; the weight has no gradient."""
    x, values, scale, bias = saved
    dy = dy.astype(jnp.float32)
    d_bias = None if bias is None else dy.sum(0).astype(bias.dtype)
    return ((dy * scale) @ values.astype(jnp.float32)).astype(x.dtype), None, None, d_bias


_dense_product.defvjp(_dense_forward, _dense_backward)


DenseWeight = ServingWeight  # its earlier name

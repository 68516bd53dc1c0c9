"""`serving`: parameters for a device, without the parts that its programs do not read.

On a CPU products read the weight with its zeros, and not its packed form. `serving` keeps only
these codes and the scales, in a `ServingWeight`. This no longer depends on the pattern, so that one
compiled program serves every pattern.
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
from slidejax.ops.parameters import check_residual, check_result
from slidejax.ops.primitive import check_input
from slidejax.ops.sharding import product_spec, with_automatic_axes
from slidejax.variants.prepared import map_weights, prepare
from slidejax.weights.numerics import is_quantized
from slidejax.weights.packed import WrappedWeight, check_weight
from slidejax.weights.registries import register

__all__ = ["DenseWeight", "ServingWeight", "serving"]


def serving(tree: Any) -> Any:
    """Turns a tree of parameters into the form that serves on this device.

    Args:
      tree: any pytree, such as a converted model's parameters.

    Returns:
      The tree. On a CPU a `ServingWeight` takes the place of each `SlideWeight`. On a GPU it is the
      tree that `prepare` makes, since kernels read the packed form. Other leaves stay.

    >>> from slidejax import pack
    >>> kernel = jax.random.normal(jax.random.key(0), (64, 4))
    >>> one, other = (serving(pack(kernel, p, dtype="int8")) for p in ("6:8", "2:4"))
    >>> jax.tree.structure(one) == jax.tree.structure(other)
    True
    """
    if jax.default_backend() != "cpu":
        return prepare(tree)
    return map_weights(lambda w: ServingWeight(DENSE.form.of(check_weight(w)), w.scale), tree)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class ServingWeight(WrappedWeight):
    """A weight with its zeros, and nothing else: the form that serves on a CPU.

    `slidejax.linear` computes with it the same bits as the implementation "dense" in plain JAX with
    the weight that it was made from. It is neither trained nor saved. `SlideDense` and
    `SlideLinear` hold packed weights and do not accept it.

    Attributes:
      values: `[..., out, in]`, the codes, zeros included.
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
        """Returns self if the leaves are as `serving` makes them; raises ValueError otherwise."""
        if self.scale.dtype != jnp.float32 or self.scale.shape != self.values.shape[:-1]:
            raise ValueError(
                f"{name} has leaves values {self.values.dtype} {self.values.shape}, scale "
                f"{self.scale.dtype} {self.scale.shape}; serving makes "
                f"scale float32 {self.values.shape[:-1]}. A cast of the whole tree ruins packed "
                "weights: cast before packing"
            )
        return self

    def linear(
        self, x, bias, *, implementation=None, out_dtype=None, reduce_axis=None, residual=None
    ) -> jax.Array:
        self.check()
        if implementation not in (None, DENSE.name) or reduce_axis is not None:
            raise NotImplementedError(
                f"a weight made to serve runs in {DENSE.name!r} on one device, not "
                f"implementation={implementation!r}, {reduce_axis=}"
            )
        x = check_input(x)
        out, k = self.values.shape
        if x.shape[-1] != k:
            raise ValueError(
                f"x must be [..., {k}] for a weight with in_features {k}, got shape {x.shape}"
            )
        bias, out_dtype = check_result(out, bias, x.dtype if out_dtype is None else out_dtype)
        residual = check_residual(residual, (*x.shape[:-1], out))
        operands, tree = jax.tree.flatten((x, self.values, self.scale, bias, residual))

        def product(*operands):
            x, values, scale, bias, residual = jax.tree.unflatten(tree, operands)
            rows = x.reshape(math.prod(x.shape[:-1]), k)
            residual = None if residual is None else residual.reshape(rows.shape[0], out)
            y = _product_of(out_dtype, rows, values, scale, bias, residual)
            return y.reshape(*x.shape[:-1], out)

        return with_automatic_axes(
            product, operands, lambda x, values, *_: product_spec(x, values[0])
        )

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("values"), self.values), (key("scale"), self.scale)), None

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children)


register(ServingWeight, ("values", "scale"), lambda w: {}, dataclasses.replace, lambda kept: None)


@functools.partial(
    jax.jit, static_argnums=0
)  # traced once for each shape, however many layers have it
def _product_of(out_dtype, x, values, scale, bias, residual) -> jax.Array:
    return _dense_product(out_dtype, x, values, scale, bias, residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense_product(out_dtype, x, values, scale, bias, residual) -> jax.Array:
    codes, scale_x = quantize_rows(x, values.dtype)
    return finish(accumulate(codes, values), scale_x, scale, bias, out_dtype, residual)


def _dense_forward(out_dtype, x, values, scale, bias, residual):
    y = _dense_product(out_dtype, x, values, scale, bias, residual)
    of_residual = None if residual is None else jnp.zeros(0, residual.dtype)
    return y, (x, values, scale, bias, of_residual)


def _dense_backward(out_dtype, saved, dy):
    """Straight-through, as `linear` has it; the weight has no gradient."""
    x, values, scale, bias, of_residual = saved
    d_residual = None if of_residual is None else dy.astype(of_residual.dtype)
    dy = dy.astype(jnp.float32)
    d_bias = None if bias is None else dy.sum(0).astype(bias.dtype)
    dx = ((dy * scale) @ values.astype(jnp.float32)).astype(x.dtype)
    return dx, None, None, d_bias, d_residual


_dense_product.defvjp(_dense_forward, _dense_backward)


DenseWeight = ServingWeight  # its earlier name

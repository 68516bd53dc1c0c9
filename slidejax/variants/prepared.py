"""Prepared forms: what an implementation needs beyond the packed form, made once outside the loop.

| name | what it holds | where it pays |
|---|---|---|
| `dense` | the kernel's codes `[out, in]` in the values' dtype, zeros included | a CPU, and a GPU where dense is the faster choice: nothing is unpacked in the loop. Not with the pattern "dense", whose values are these codes already |
| `cusparselt` | cuSPARSELt's opaque compressed form, uint8 | every use of that library |
| `hopper` | the 2:4 metadata in the order in which the kernel's lanes read it, uint8 | every use of the kernel |

A prepared form is counted in a weight's bytes, never saved, and dropped by `drop_prepared`.

Where "dense" is what runs, the packed form is not read any more, and with it goes the pattern: `serving` leaves the codes and
scales alone (`DenseWeight`), so that one compiled program serves every pattern.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops import choice, registry
from slidejax.ops.cuda import library
from slidejax.ops.implementations.base import Form
from slidejax.ops.implementations.dense import DENSE
from slidejax.ops.implementations.reference import accumulate, finish
from slidejax.ops.lift_quantize import quantize_rows
from slidejax.ops.primitive import check_input
from slidejax.ops.sparse_matmul import check_result
from slidejax.weights.packed import SlideWeight, WrappedWeight, check_weight

__all__ = ["DenseWeight", "drop_prepared", "map_weights", "prepare", "serving", "weights_of"]


def map_weights(fn: Callable[[SlideWeight], Any], tree: Any) -> Any:
    """Applies `fn` to every `SlideWeight` of a tree; other leaves stay."""
    return jax.tree.map(
        lambda node: fn(node) if _is_weight(node) else node, tree, is_leaf=_is_weight
    )


def weights_of(tree: Any) -> list[SlideWeight]:
    """Every `SlideWeight` of a tree."""
    return [node for node in jax.tree.leaves(tree, is_leaf=_is_weight) if _is_weight(node)]


def _is_weight(node: Any) -> bool:
    return isinstance(node, SlideWeight)


def drop_prepared(tree: Any) -> Any:
    """The tree without prepared forms: what is saved, and what moves to another device."""
    return map_weights(lambda w: w.replace(prepared={}) if w.prepared else w, tree)


def prepare(tree: Any, implementation: str | None = None) -> Any:
    """Adds to every `SlideWeight` of a tree the prepared form that an implementation wants.

    Args:
      tree: any pytree, such as a model's variables.
      implementation: "dense", "cusparselt" or "hopper"; None: what the measured choice for this device and each weight's
        shape wants ("dense" on a CPU).

    Returns:
      The tree; other leaves, and weights for which nothing pays, as they were: among them those of the pattern "dense", which runs
      from its values.

    Raises:
      ValueError: for an unknown name, or under tracing of a form that needs the device ("cusparselt").
      NotImplementedError: if the implementation that was asked for cannot run here.

    >>> from slidejax import pack
    >>> import jax.numpy as jnp
    >>> w = prepare(pack(jnp.ones((8, 4)), "6:8", dtype="int8"), implementation="dense")
    >>> w.prepared["dense"].shape, w.prepared["dense"].dtype.name
    ((4, 8), 'int8')
    """
    if implementation is not None:
        _form(implementation)
    return map_weights(lambda w: _prepare(check_weight(w), implementation), tree)


def _prepare(w: SlideWeight, implementation: str | None) -> SlideWeight:
    if not w.pattern.prunes:
        return w
    forms = dict(w.prepared)
    for form in _wanted(w) if implementation is None else (_form(implementation),):
        if form.name not in forms:
            forms[form.name] = form.of(w.replace(prepared={}))
    return w.replace(prepared=forms)


def _form(implementation: str) -> Form:
    form = registry.get(implementation).form
    if form is None:
        raise ValueError(f"implementation {implementation!r} has no prepared form")
    return form


def _wanted(w: SlideWeight) -> tuple[Form, ...]:
    """The forms that pay here: by the measured table on a GPU, else that of what runs everywhere."""
    names = choice.forms(w) if library.on_gpu() else None
    return tuple(
        i.form
        for i in registry.competing()
        if i.form is not None
        and (i is registry.FALLBACK if names is None else i.form.name in names)
    )


# --- the dense form alone ---------------------------------------------------------------------------------------------


def serving(tree: Any) -> Any:
    """What serves a tree of parameters on this device: prepared, and without what the programs do not read.

    Args:
      tree: any pytree, such as a converted model's parameters.

    Returns:
      The tree: on a CPU a `DenseWeight` in place of each `SlideWeight`, so that weights of every pattern run in one
      program; on a GPU as `prepare` makes it, since kernels read the packed form. Wrapped weights and other leaves stay.

    >>> from slidejax import pack
    >>> w = pack(jax.random.normal(jax.random.key(0), (64, 4)), "6:8", dtype="int8")
    >>> jax.tree.structure(serving(w)) == jax.tree.structure(serving(pack(jnp.ones((64, 4)), "2:4", dtype="int8")))
    True
    """
    if jax.default_backend() != "cpu":
        return prepare(tree)
    return map_weights(lambda w: DenseWeight(DENSE.form.of(check_weight(w)), w.scale), tree)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class DenseWeight(WrappedWeight):
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
    def weight(self) -> SlideWeight:
        raise ValueError(
            "this weight was made to serve (slidejax.prepared.serving) and holds no packed form: use what it was made from"
        )

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return np.dtype(self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-2], self.values.shape[-1], self.values.shape[-2])

    @property
    def out_features(self) -> int:
        return self.values.shape[-2]

    @property
    def is_k_shard(self) -> bool:
        return False

    def replace(self, **changes) -> DenseWeight:
        return dataclasses.replace(self, **changes)

    def trained(self) -> DenseWeight:
        return DenseWeight(False, False)  # type: ignore[arg-type]

    def check(self, name: str = "w") -> DenseWeight:
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

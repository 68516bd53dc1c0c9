"""Training packed weights: splitting a tree for `jax.grad` and optax, and master weights.

`jax.grad` raises on integer leaves, and optax crashes on their float0 gradients. So a loss is
written over the part of a tree that can be trained:

    train, rest = sj.partition(params)
    grads = jax.grad(lambda train: loss(sj.combine(train, rest)))(train)

8-bit values have no gradient. `masters` puts a `MasterWeight` in the place of each packed weight.
It holds float32 values, and its forward pass is that of the 8-bit weight, with the same codes
(quantisation-aware training). `deploy` turns it into the packed 8-bit weight that the training saw:

    params = sj.trainable.masters(params)   # 8-bit or float-packed weights -> float32 masters
    ...                                     # partition, grad, optax
    params = sj.trainable.deploy(params)    # -> 8-bit weights, as `slidejax.quantize` makes them
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.kinds import check_function
from slidejax.ops.lift_quantize import quantize_rows
from slidejax.ops.linear import linear
from slidejax.ops.parameters import check_residual
from slidejax.ops.sharding import product_spec, with_automatic_axes
from slidejax.ops.sparse_matmul import outer, sum_of_rows, values_gradient
from slidejax.variants.boxes import refuse_boxed, refuse_hidden
from slidejax.weights import numerics
from slidejax.weights.layout import scatter_values
from slidejax.weights.packed import (
    LinearWeight,
    SlideWeight,
    TreeLayout,
    WrappedWeight,
    check_held,
    quantize,
)
from slidejax.weights.pattern import Pattern
from slidejax.weights.registries import register

__all__ = ["MasterWeight", "combine", "deploy", "map_wrapped", "masters", "partition"]

Selection = str | re.Pattern | Callable[[str], bool] | None


# --- partition and combine ------------------------------------------------------------------------


def partition(tree: Any, trained: Selection = None) -> tuple[Any, Any]:
    """Splits a tree into the part that is trained and the rest.

    Floating arrays can be trained: biases, norms, kernels, the values of float-packed weights and
    of masters, and the low-rank factors of adapters. The rest has no gradient: 8-bit values, zeros,
    scales, prepared forms, the weights under adapters, integers and other leaves.

    Args:
      tree: any pytree.
      trained: which of the floating leaves to train. A regular expression must match the whole
        '/'-joined path of a leaf, such as `model/layers/0/mlp/up_proj/kernel/values`. A function
        gets that path. None trains all.

    Returns:
      `(train, rest)`: two trees with the structure of the tree. Each has None where the other holds
      the leaf. Weights whose values are trained have lost their prepared forms, which would be
      those of the values before.

    Raises:
      ValueError: if `trained` is a bad regular expression, or selects nothing.
      TypeError: naming the path, if a weight's leaves are boxed; or if the tree is an NNX model or
        its state. There `wrt=nnx.Param` says what is trained.

    >>> from slidejax import pack
    >>> layer = {"kernel": pack(jnp.ones((8, 2)), "6:8"), "bias": jnp.ones(2)}
    >>> train, rest = partition({**layer, "step": jnp.int32(3)})
    >>> len(jax.tree.leaves(train)), len(jax.tree.leaves(rest))
    (2, 3)
    >>> len(jax.tree.leaves(partition(layer, ".*bias")[0]))
    1
    """
    refuse_boxed(tree)
    refuse_hidden(tree, "partition", "nnx.Optimizer(model, tx, wrt=nnx.Param) trains one")
    selected = selector(trained)
    can = jax.tree.map(_trained, tree, is_leaf=is_packed)
    keep = jax.tree_util.tree_map_with_path(lambda path, yes: yes and selected(path_of(path)), can)
    if trained is not None and not any(jax.tree.leaves(keep)):
        some = [path_of(path) for path, yes in jax.tree_util.tree_leaves_with_path(can) if yes][:2]
        raise ValueError(f"trained={trained!r} selects none of the floating leaves, such as {some}")
    if trained is None:
        _warn_of_codes(tree)
    tree, keep = _without_stale_forms(tree, keep)
    train = jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, keep)
    rest = jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, keep)
    return train, rest


def _without_stale_forms(tree: Any, keep: Any) -> tuple[Any, Any]:
    """The trees without the prepared forms of weights whose values are trained.

    A step changes the values, and the forms would stay those of the values before.
    """

    def without(take: Callable[[Any, Any], Any]) -> Any:
        def bare(node, keep):
            stale = isinstance(node, SlideWeight) and keep.values
            return take(node, keep).replace(prepared={}) if stale else take(node, keep)

        return jax.tree.map(bare, tree, keep, is_leaf=is_packed)

    return without(lambda node, keep: node), without(lambda node, keep: keep)


def _warn_of_codes(tree: Any) -> None:
    """Warns of 8-bit weights: nothing in them is trained, and nothing else would say so.

    Beside masters and adapters they are there on purpose.
    """
    if any(isinstance(node, WrappedWeight) for node in jax.tree.leaves(tree, is_leaf=is_packed)):
        return
    weights = [
        (path_of(path), node)
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_packed)
        if isinstance(node, SlideWeight) and numerics.is_quantized(node.dtype)
    ]
    if weights:
        path, node = weights[0]
        warnings.warn(
            f"{len(weights)} weights of {node.dtype.name} values, such as {path or 'w'!r}, have no "
            "gradient and are not trained: slidejax.trainable.masters trains them; trained= says "
            "that this is meant",
            stacklevel=3,
        )


def combine(train: Any, rest: Any) -> Any:
    """The inverse of `partition`.

    Raises:
      ValueError: if the two have different structures, or both hold the same leaf.
    """

    def pick(a, b):
        if a is not None and b is not None:
            raise ValueError(
                "train and rest both hold a leaf: pass the two parts that partition returned"
            )
        return b if a is None else a

    try:
        return jax.tree.map(pick, train, rest, is_leaf=lambda node: node is None)
    except ValueError as error:
        if "pytree" not in str(error):
            raise
        raise ValueError(
            "train and rest must be trees of one structure, the two parts that partition returned"
        ) from error


def selector(trained: Selection, name: str = "trained") -> Callable[[str], bool]:
    """A selection of leaves as a function of their paths; `name` is that of the argument."""
    if trained is None:
        return lambda path: True
    if callable(trained) and not isinstance(trained, type):
        return trained
    try:
        regex = re.compile(cast(str, trained))
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{name} must be a regular expression, a function of a path or None, got {trained!r:.60}"
        ) from error
    return lambda path: regex.fullmatch(path) is not None


def path_of(keys) -> str:
    """The '/'-joined path of a leaf."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def is_packed(node) -> bool:
    """Whether a node of a tree takes the place of a kernel: a weight, or a layout of weights."""
    return isinstance(node, (LinearWeight, TreeLayout))


def _trained(node):
    """Whether a leaf can be trained; for a weight a tree that says it for each of its leaves."""
    if isinstance(node, LinearWeight):
        return node.trained()
    if isinstance(node, TreeLayout):
        return jax.tree.map(lambda _: False, node)  # fused projections serve and are not trained
    return hasattr(node, "dtype") and jnp.issubdtype(node.dtype, jnp.floating)


# --- master weights -------------------------------------------------------------------------------


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class MasterWeight(WrappedWeight):
    """Float32 kept values that run in 8 bit: quantisation-aware training on a fixed mask.

    `slidejax.linear(x, master)` computes `linear(x, quantize(master.packed, qdtype))`, the same op
    that serves. Its derivative is straight-through (Bengio et al., arXiv 1308.3432): rounding
    counts as the identity. With the codes `qx` and `qw` and their scales it is

        dx = dy @ (qw * scale_w),    dvalues = the kept entries of dy^T @ (qx * scale_x)

    Products of the derivative run in x's dtype and accumulate in float32.

    Attributes:
      values: float32 `[..., out, groups, kept]`.
      zeros: uint8 `[..., out, groups]`, as in `SlideWeight`.
      pattern: the `Pattern`. Static.
      in_features: the number of inputs of the whole kernel, without padding. Static.
      qdtype: int8 or float8_e4m3fn. Static.

    >>> from slidejax import pack
    >>> w = pack(jax.random.normal(jax.random.key(0), (64, 4)), "6:8", dtype="int8")
    >>> x = jax.random.normal(jax.random.key(1), (3, 64))
    >>> bool((linear(x, masters(w)) == linear(x, deploy(masters(w)))).all())
    True
    """

    values: jax.Array
    zeros: jax.Array
    pattern: Pattern
    in_features: int
    qdtype: Any

    @property
    def packed(self) -> SlideWeight:
        scale = jnp.ones(jnp.shape(self.values)[:-2], jnp.float32)
        return SlideWeight(self.values, self.zeros, scale, self.pattern, self.in_features)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-3], self.in_features, self.values.shape[-3])

    def check(self, name: str = "w") -> MasterWeight:
        self.packed.check(name)
        return self

    @property
    def is_k_shard(self) -> bool:
        return self.packed.is_k_shard

    def trained(self) -> MasterWeight:
        return jax.tree.unflatten(jax.tree.structure(self), [True, False])

    def linear(
        self, x, bias, *, implementation=None, out_dtype=None, reduce_axis=None, residual=None
    ) -> jax.Array:
        if reduce_axis is not None or self.is_k_shard:
            raise NotImplementedError(
                "a master weight needs the whole of K: its scale is that of a whole row"
            )
        x = jnp.asarray(x)
        out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
        static = _StaticArgs(self.pattern, self.in_features, self.qdtype, implementation, out_dtype)
        residual = check_residual(residual, (*x.shape[:-1], self.out_features))
        operands, tree = jax.tree.flatten((x, self.values, self.zeros, bias, residual))
        return with_automatic_axes(
            lambda *operands: _straight_through(static, *jax.tree.unflatten(tree, operands)),
            operands,
            lambda x, values, *_: product_spec(x, values[0]),
        )

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        children = ((key("values"), self.values), (key("zeros"), self.zeros))
        return children, (self.pattern, self.in_features, self.qdtype)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)


register(
    MasterWeight,
    ("values", "zeros"),
    lambda w: {
        "pattern": str(w.pattern),
        "in_features": w.in_features,
        "qdtype": np.dtype(w.qdtype).name,
    },
    dataclasses.replace,
    lambda kept: (Pattern.parse(kept["pattern"]), kept["in_features"], jnp.dtype(kept["qdtype"])),
)


@dataclasses.dataclass(frozen=True)
class _StaticArgs:
    """The static arguments of a product with a master weight."""

    pattern: Pattern
    in_features: int
    qdtype: np.dtype
    implementation: str | None
    out_dtype: np.dtype

    def deployed(self, values, zeros) -> SlideWeight:
        scale = jnp.ones(values.shape[:-2], jnp.float32)
        return quantize(
            SlideWeight(values, zeros, scale, self.pattern, self.in_features), self.qdtype
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(static: _StaticArgs, x, values, zeros, bias, residual):
    return _forward(static, x, values, zeros, bias, residual)[0]


def _forward(static: _StaticArgs, x, values, zeros, bias, residual):
    w = static.deployed(values, zeros)
    y = linear(x, w, bias, static.implementation, static.out_dtype, residual=residual)
    return y, (x, w, bias, None if residual is None else jnp.zeros(0, residual.dtype))


def _backward(static: _StaticArgs, saved, dy):
    x, w, bias, of_residual = saved
    d_residual = None if of_residual is None else dy.astype(of_residual.dtype)
    out, columns = w.out_features, w.groups * w.pattern.group
    codes_x, scale_x = quantize_rows(x, static.qdtype)
    # bfloat16 holds the codes exactly (int8 has 8 bits, e4m3 has 4); the scales go to the operand
    # that is rounded anyway
    codes_w = scatter_values(w.values.astype(x.dtype), w.zeros).reshape(out, columns)[
        :, : x.shape[-1]
    ]
    codes_x = codes_x.astype(x.dtype)
    dy = dy.astype(jnp.float32)
    scaled = dy * numerics.of_rank(w.scale, dy.ndim)
    dx = _product(scaled.astype(x.dtype), codes_w).astype(x.dtype)
    d_kernel = outer((dy * scale_x).astype(x.dtype), codes_x, preferred_element_type=jnp.float32)
    d_values = values_gradient(
        jnp.pad(d_kernel, ((0, 0), (0, columns - x.shape[-1]))),
        w.replace(values=w.values.astype(jnp.float32)),
    )
    d_bias = None if bias is None else sum_of_rows(dy).astype(bias.dtype)
    return dx, d_values, None, d_bias, d_residual


def _product(a, b) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


_straight_through.defvjp(_forward, _backward)


def map_wrapped(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Applies `fn` to every `LinearWeight` of a tree; other leaves stay."""
    check_function(fn, "fn")
    return jax.tree.map(
        lambda node: fn(node) if isinstance(node, LinearWeight) else node, tree, is_leaf=is_packed
    )


def masters(tree: Any, qdtype: Any = None) -> Any:
    """Puts a `MasterWeight` in the place of packed weights.

    Args:
      tree: any pytree with `SlideWeight`s, such as the parameters of a converted model.
      qdtype: the dtype to which float-packed weights will be quantised: int8 or float8_e4m3fn. None
        leaves them as they are, and they are trained unquantised. 8-bit weights keep their dtype,
        and their masters start as `values * scale`.

    Returns:
      The tree without prepared forms. Wrapped weights and other leaves stay.

    Raises:
      ValueError: for a dtype that is not 8-bit, or if weights are quantised to another dtype.
      TypeError: naming the path, if a weight's leaves are boxed; or if the tree is an NNX model or
        its state (see `slidejax.nnx.map_weights`).
    """
    refuse_boxed(tree)
    refuse_hidden(tree, "trainable.masters")
    if qdtype is not None:
        qdtype = numerics.check_dtype(qdtype, "qdtype")
        if not numerics.is_quantized(qdtype):
            raise ValueError(f"qdtype must be int8 or float8_e4m3fn, got {qdtype.name}")

    def master(w):
        check_held(w)
        if isinstance(w, WrappedWeight):
            return w
        if not numerics.is_quantized(w.dtype):
            if qdtype is None:
                return w.replace(prepared={})
            return MasterWeight(
                w.values.astype(jnp.float32), w.zeros, w.pattern, w.in_features, qdtype
            )
        if qdtype not in (None, w.dtype):
            raise ValueError(
                f"a weight is quantised to {w.dtype.name} already, not to {qdtype.name}"
            )
        values = w.values.astype(jnp.float32) * w.scale[..., None, None]
        return MasterWeight(values, w.zeros, w.pattern, w.in_features, w.dtype)

    return map_wrapped(master, tree)


def deploy(tree: Any) -> Any:
    """Quantises every `MasterWeight` of a tree (`slidejax.quantize`). Other leaves stay.

    The result computes the same as the masters: codes, scales and accumulators are equal bit for
    bit.

    Raises:
      TypeError: if the tree is an NNX model or its state (see `slidejax.nnx.map_weights`).
    """
    refuse_hidden(tree, "trainable.deploy")

    def deployed(w):
        if not isinstance(w, MasterWeight):
            return w
        check_held(w)
        return quantize(w.packed, w.qdtype)

    return map_wrapped(deployed, tree)

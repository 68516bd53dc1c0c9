"""Helpers that all ops share: making a primitive with its vmap rule and derivative; checking x."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir

from slidejax.ops import shards
from slidejax.ops.sharding import check_partitioner
from slidejax.weights.layout import as_array

__all__ = ["check_input", "make_primitive", "map_batched", "on_cuda_alone", "with_rules"]


def make_primitive(
    name: str,
    shape_rule: Callable[..., list],
    lowering: Callable[..., Any],
    asks_devices: bool = False,
) -> Primitive:
    """Makes a primitive with several results, a shape rule and one lowering for each platform.

    Args:
      name: of the primitive, as jaxprs show it.
      shape_rule: `(*avals, **params) -> [(shape, dtype), ...]`. All results have as many axes and
        rows as the first operand.
      lowering: `(*operands, platform=..., **params) -> list of results`, written in JAX. `platform`
        is "cuda" or "default".
      asks_devices: whether `lowering` takes one more argument, `devices`: the number of devices of
        the program; None inside `shard_map`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def abstract_eval(x, *avals, **params):
        # The results are made from x's own aval. Inside shard_map they then vary over the mesh axes
        # over which x varies.
        return [
            x.update(shape=shape, dtype=np.dtype(dtype), weak_type=False)
            for shape, dtype in shape_rule(x, *avals, **params)
        ]

    def lower_for(platform):
        def rule(ctx, *operands, **params):
            context = ctx.module_context.axis_context
            check_partitioner(context)
            more: dict[str, Any] = {"platform": platform}
            if asks_devices:  # a context of manual axes has no such number
                more["devices"] = getattr(context, "num_devices", None)
            lower = functools.partial(lowering, **more)
            return mlir.lower_fun(lower, multiple_results=True)(ctx, *operands, **params)

        return rule

    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, lower_for("default"))
    mlir.register_lowering(primitive, lower_for("cuda"), platform="cuda")
    jitted = jax.jit(
        lambda *operands, params: primitive.bind(*operands, **dict(params)),
        static_argnames="params",
    )

    def run(*operands, **params):
        # Only a compiled program runs a primitive. Under `jax.disable_jit` the call would come back
        # here without end.
        with jax.disable_jit(False):
            return jitted(*operands, params=tuple(sorted(params.items())))

    primitive.def_impl(run)
    return primitive


def _make_on_cuda() -> Primitive:
    primitive = Primitive("slidejax_on_cuda_alone")
    primitive.def_impl(lambda x, *, refusal: x)
    primitive.def_abstract_eval(lambda x, *, refusal: x)

    def refuse(ctx, x, *, refusal):
        if not shards.explains():  # perhaps for another platform than this one
            raise NotImplementedError(refusal)
        return [x]

    mlir.register_lowering(primitive, refuse)
    mlir.register_lowering(primitive, lambda ctx, x, *, refusal: [x], platform="cuda")
    return primitive


_on_cuda_p = _make_on_cuda()


def on_cuda_alone(x: jax.Array, refusal: str) -> jax.Array:
    """Returns x. A program with it is a NotImplementedError where it is lowered for no GPU.

    An op that is split over devices is lowered in a callback of the partitioner, which would make a
    JaxRuntimeError of its error. It has no vmap rule and no derivative, so it belongs inside
    `with_rules`.
    """
    return _on_cuda_p.bind(x, refusal=refusal)


def with_rules(
    primal: Callable[..., Any],
    vmap_rule: Callable[..., tuple[Any, Any]],
    backward: Callable[[Any, Any], tuple],
    residuals: Callable[[tuple, Any], Any] = lambda operands, results: operands,
) -> Callable[..., Any]:
    """Gives `primal` a vmap rule and a reverse-mode derivative.

    A function with `custom_partitioning` has neither.

    Args:
      primal: `(*operands) -> results`.
      vmap_rule: `(op, axis_size, in_batched, *operands) -> (results, out_batched)`. `op` is the op
        itself, so that maps nest.
      backward: `(residuals, cotangents) -> cotangents of the operands`.
      residuals: `(operands, results) -> residuals`. By default these are the operands.
    """

    @custom_vmap
    def batched(*operands):
        return primal(*operands)

    @batched.def_vmap
    def _(axis_size, in_batched, *operands):
        return vmap_rule(batched, axis_size, in_batched, *operands)

    @jax.custom_vjp
    def op(*operands):
        return batched(*operands)

    def forward(*operands):
        results = op(*operands)  # and not `batched`: it has a derivative of its own
        return results, residuals(operands, results)

    op.defvjp(forward, backward)
    return op


def map_batched(op, axis_size: int, in_batched, row_operands: Collection[int], operands):
    """The vmap rule of an op whose results have rows, as have the operands numbered `row_operands`.

    Rows may have any number of leading axes, so a batch of rows is one more of them. A batch of
    anything else runs one element after the other.
    """
    batched = list(jax.tree.leaves(in_batched))
    if not any(b for i, b in enumerate(batched) if i not in row_operands):
        ys = op(
            *(
                jnp.broadcast_to(a, (axis_size, *a.shape)) if i in row_operands and not b else a
                for i, (a, b) in enumerate(zip(operands, batched, strict=True))
            )
        )
        return ys, jax.tree.map(lambda y: True, ys)

    def one(slices):
        rest = iter(slices)
        return op(*(next(rest) if b else a for a, b in zip(operands, batched, strict=True)))

    ys = jax.lax.map(one, [a for a, b in zip(operands, batched, strict=True) if b])
    return ys, jax.tree.map(lambda y: True, ys)


def check_input(x, name: str = "x") -> jax.Array:
    """Returns `x` as a float array with at least one axis.

    Raises:
      ValueError: if it has no axis, or another dtype.
      TypeError: if it is no array.
    """
    x = as_array(x, name)
    if x.ndim < 1:
        raise ValueError(f"{name} must be [..., in], got a scalar")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}")
    return x

"""Tracing a model with a tap at the input of each chosen layer.

A *tap* is an identity that knows the path of the layer's kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import batching

from slidejax.contraction import Contraction
from slidejax.functional import watching_inputs

__all__ = ["TAP", "body_with_taps", "first_tap", "traced"]

# An identity of a layer's input. Its second operand, if it has one, is the layer's kernel. `levels`
# is the number of leading axes of both along which `vmap` has stacked layers.
TAP = core.Primitive("slidejax_tap")
TAP.def_abstract_eval(lambda x, *_, **__: x)


def _batched_tap(operands, dims, *, path: str, axes: Contraction, levels: int):
    """The tap under `vmap`: more layers if the kernel is mapped, and otherwise more rows."""
    x, *kernels = operands
    at, *kernel_at = dims
    if not kernels:
        raise NotImplementedError(
            f"calibration cannot look into layers under vmap, such as {path}, unless they show "
            "their kernels (slidejax.functional.show_input)"
        )
    if kernel_at[0] is not None:
        kernel = jnp.moveaxis(kernels[0], kernel_at[0], 0)
        shape = (kernel.shape[0], *x.shape)
        x = jnp.broadcast_to(x, shape) if at is None else jnp.moveaxis(x, at, 0)
        return TAP.bind(x, kernel, path=path, axes=axes, levels=levels + 1), 0
    if at < levels:  # the first axes of x belong to the kernels
        x, at = jnp.moveaxis(x, at, levels), levels
    place = at - levels
    x_in = tuple(a + (a >= place) for a in axes.x_in)
    axes = dataclasses.replace(axes, x_in=x_in)
    return TAP.bind(x, *kernels, path=path, axes=axes, levels=levels), at


batching.primitive_batchers[TAP] = _batched_tap


def traced(
    run: Callable[[Any, Any], Any], params: Any, batch: Any, paths: Collection[str] | None
) -> Any:
    """The jaxpr of a model with taps.

    Its inputs are the leaves of the parameters and of the batch.
    """
    leaves, tree = jax.tree.flatten(params)
    batch_leaves, batch_tree = jax.tree.flatten(batch)

    def mark(path, x, axes, kernel):
        if paths is not None and path not in paths:
            return x
        levels = len(axes.kernel_batch)
        if not levels:
            return TAP.bind(
                x, *(() if kernel is None else (kernel,)), path=path, axes=axes, levels=0
            )
        if kernel is None or axes.kernel_batch != tuple(range(levels)):
            return x  # its kernels are not stacked along the first axes
        x = jnp.moveaxis(x, axes.x_batch, range(levels))
        x = TAP.bind(x, kernel, path=path, axes=_of_one(axes, x.ndim), levels=levels)
        return jnp.moveaxis(x, range(levels), axes.x_batch)

    def program(leaves, batch_leaves):
        with watching_inputs(mark, kernels=True):
            run(jax.tree.unflatten(tree, leaves), jax.tree.unflatten(batch_tree, batch_leaves))
        return ()

    return jax.make_jaxpr(program)(leaves, batch_leaves)


def _of_one(axes: Contraction, x_ndim: int) -> Contraction:
    """The contraction of one of a layer's kernels, when the batch axes of x are its first."""
    rest = [a for a in range(x_ndim) if a not in axes.x_batch]
    levels = len(axes.kernel_batch)
    return Contraction(
        (),
        tuple(a - levels for a in axes.kernel_in),
        tuple(a - levels for a in axes.kernel_out),
        (),
        tuple(rest.index(a) for a in axes.x_in),
        axes.result,
    )


def first_tap(jaxpr) -> str:
    """The path of the first layer in a jaxpr."""
    for eqn in jaxpr.eqns:
        body = body_with_taps(eqn)
        if eqn.primitive is TAP or body is not None:
            return eqn.params["path"] if body is None else first_tap(body[0])
    raise AssertionError("no layer is inside")


def body_with_taps(eqn):
    """`(jaxpr, consts)` of the function that an equation calls, if taps are inside; else None."""
    for value in eqn.params.values():
        for body in value if isinstance(value, (tuple, list)) else (value,):
            consts = getattr(body, "consts", None) or ()
            jaxpr = getattr(body, "jaxpr", body)
            if isinstance(jaxpr, core.Jaxpr) and any(
                e.primitive is TAP or body_with_taps(e) for e in jaxpr.eqns
            ):
                return jaxpr, consts
    return None

"""The inputs and outputs of linear layers, seen while a model runs: in Linen and transformers by an interceptor, in NNX by the layers
of `slidejax.nnx.functional`."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slidejax import linen
from slidejax.contraction import Contraction
from slidejax.rules import LeftDense
from slidejax.weights import numerics

__all__ = [
    "as_rows",
    "contractions",
    "rounded",
    "see_input",
    "see_output",
    "seeing_inputs",
    "seeing_layers",
]

# (path of the kernel, input, contraction) -> the input to go on with
See = Callable[[str, jax.Array, Contraction], jax.Array]
# (path of the kernel, output) -> the output to go on with
SeeOutput = Callable[[str, jax.Array], jax.Array]
_SEE_OUTPUT: contextvars.ContextVar[SeeOutput | None] = contextvars.ContextVar(
    "slidejax_see_output", default=None
)
_SEE: contextvars.ContextVar[See | None] = contextvars.ContextVar("slidejax_see", default=None)


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar, see: Callable) -> Iterator[None]:
    token = variable.set(see)
    try:
        with nn.intercept_methods(_interceptor):
            yield
    finally:
        variable.reset(token)


def seeing_inputs(see: See) -> contextlib.AbstractContextManager[None]:
    """While it is entered, `see` is called with the input of each linear layer whose kernel is an array."""
    return _set(_SEE, see)


def seeing_layers(see: SeeOutput) -> contextlib.AbstractContextManager[None]:
    """While it is entered, `see` is called with the output of each linear layer whose kernel is an array."""
    return _set(_SEE_OUTPUT, see)


def see_input(path: str, x: jax.Array, axes: Contraction) -> jax.Array:
    """What a layer calls with its input; it goes on with the result."""
    see = _SEE.get()
    return x if see is None else see(path, x, axes)


def see_output(path: str, y: jax.Array) -> jax.Array:
    """What a layer calls with its output; the result is its output."""
    see = _SEE_OUTPUT.get()
    return y if see is None else see(path, y)


def _interceptor(next_fun, args, kwargs, context):
    module, layer = context.module, linen.layer_of(context)
    kernel = None if layer is None else linen.own_kernel(module)
    if layer is None or not isinstance(kernel, jax.Array):
        return next_fun(*args, **kwargs)
    x, args, kwargs = linen.split_input(args, kwargs)
    try:
        axes, _ = layer(module, x, *args, **kwargs)
    except LeftDense:
        return next_fun(x, *args, **kwargs)
    path = "/".join((*module.path, "kernel"))
    return see_output(path, next_fun(see_input(path, x, axes), *args, **kwargs))


def contractions(run: Callable[..., Any], params: Any, batch: Any) -> dict[str, Contraction]:
    """How each linear layer contracts its input and its kernel, by the kernel's path; nothing is computed."""
    found: dict[str, Contraction] = {}

    def see(path, x, axes):
        found[path] = axes
        return x

    with seeing_inputs(see):
        jax.eval_shape(lambda params, batch: [run(params, batch), None][1], params, batch)
    return found


def as_rows(x: jax.Array, axes: Contraction) -> jax.Array:
    """A layer's input as a float32 matrix `[rows, in]`."""
    rest = tuple(a for a in range(x.ndim) if a not in axes.x_in)
    size = math.prod(x.shape[a] for a in axes.x_in)
    return jnp.transpose(x, (*rest, *axes.x_in)).reshape(-1, size).astype(jnp.float32)


def rounded(x: jax.Array, axes: Contraction, dtype) -> jax.Array:
    """The input of an 8-bit layer after its rounding, in x's dtype."""
    codes, scale = numerics.encode(x, numerics.absmax(x, axes.x_in), dtype)
    return (codes.astype(jnp.float32) * scale).astype(x.dtype)

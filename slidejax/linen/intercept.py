"""Running unchanged Linen models: an interceptor computes the layers that own a packed weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from slidejax import functional
from slidejax.linen.fused import FusedProduct
from slidejax.linen.gated_mlp import run_gated_mlp
from slidejax.linen.known import kernel_path, layer_of, own_kernel, run_layer, split_input
from slidejax.rules import Skipped
from slidejax.variants.projections import FusedPart, FusedWeight
from slidejax.weights.packed import LinearWeight

__all__ = ["Interceptor", "apply", "interceptor", "show_layers"]


class Interceptor:
    """For `nn.intercept_methods`, around one call of a model: runs layers with packed kernels.

    All other layers run as they are. In the MLPs of transformers' Llama, Mistral and Gemma the
    gate's product is computed where the rows of `down_proj` are quantised. Make a new interceptor
    for each call of the model, because it holds the latest product of fused layers
    (`slidejax.linen.fuse_projections`).

    `apply` enters one. Enter one yourself where other code calls the model:

        with nn.intercept_methods(sj.linen.Interceptor()):
            logits = state.apply_fn(state.params, tokens)
    """

    def __init__(self) -> None:
        self._product = FusedProduct()

    def __call__(self, next_fun, args, kwargs, context):
        y = run_gated_mlp(args, kwargs, context)
        if y is not None:
            return y
        layer = layer_of(context)
        w = own_kernel(context.module) if layer is not None else None
        if layer is None or not isinstance(w, (LinearWeight, FusedWeight, FusedPart)):
            return next_fun(*args, **kwargs)
        if isinstance(w, LinearWeight):
            w.check(kernel_path(context.module))
        x, args, kwargs = split_input(args, kwargs)
        axes, features = layer(context.module, x, *args, **kwargs)
        if not isinstance(w, LinearWeight):
            return self._product.part(context.module, w, axes, features, x)
        return run_layer(context.module, w, axes, features, x)


def interceptor(next_fun, args, kwargs, context):
    """An `Interceptor` without a memory, for any number of calls.

    Each of several fused layers computes the product of all of them and takes its part. XLA merges
    equal products under `jax.jit`. Outside `jax.jit` an `Interceptor` for each call computes the
    product once.
    """
    return Interceptor()(next_fun, args, kwargs, context)


def apply(model: nn.Module, variables: Mapping, *args, **kwargs) -> Any:
    """`model.apply(variables, *args, **kwargs)` where kernels in `variables` may be packed.

    Args:
      model: any Linen module, unchanged.
      variables: as `model.apply` takes them, from `slidejax.linen.convert`.
      *args, **kwargs: other arguments of `model.apply`: inputs, `method`, `mutable`, `rngs`,
        `capture_intermediates`.

    Returns:
      What `model.apply` returns.

    >>> import jax.numpy as jnp
    >>> from slidejax.linen import convert
    >>> model, x = nn.Dense(4), jnp.ones((1, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> apply(model, convert(variables, "6:8", model, x), x).shape
    (1, 4)
    """
    with nn.intercept_methods(Interceptor()):
        return model.apply(variables, *args, **kwargs)


def show_layers(next_fun, args, kwargs, context):
    """For `nn.intercept_methods`: linear layers with an array for a kernel show input and output.

    Calibration watches them (`slidejax.functional.watching_inputs`).
    """
    module, layer = context.module, layer_of(context) if functional.watched() else None
    kernel = None if layer is None else own_kernel(module)
    if layer is None or not isinstance(kernel, jax.Array):
        return next_fun(*args, **kwargs)
    x, args, kwargs = split_input(args, kwargs)
    try:
        axes, _ = layer(module, x, *args, **kwargs)
    except Skipped:
        return next_fun(x, *args, **kwargs)
    path = kernel_path(module)
    y = next_fun(functional.show_input(path, x, axes, kernel), *args, **kwargs)
    return functional.show_output(path, y)

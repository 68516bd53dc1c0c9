"""Running unchanged Linen models: an interceptor computes the layers that own a packed weight."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from slidejax import functional
from slidejax.kinds import check_kind
from slidejax.linen.decoder_layer import DecoderLayers
from slidejax.linen.fused import FusedProduct
from slidejax.linen.gated_mlp import run_gated_mlp
from slidejax.linen.known import (
    call_with,
    kernel_path,
    layer_of,
    own_kernel,
    run_layer,
    run_registered,
    split_input,
)
from slidejax.linen.mapped import check_wrapper
from slidejax.linen.registered import Registered
from slidejax.rules import Skipped
from slidejax.variants.projections import FusedPart, FusedWeight
from slidejax.weights.packed import LinearWeight

__all__ = ["Interceptor", "apply", "interceptor", "show_layers", "traced_anew"]


class Interceptor:
    """For `nn.intercept_methods`, around one call of a model: runs layers with packed kernels.

    All other layers run as they are. In the MLPs of transformers' Llama, Mistral and Gemma the
    gate's product is computed where the rows of `down_proj` are quantised. With fused projections
    (`slidejax.linen.fuse_projections`) all that follows attention in their layers is one
    `slidejax.linear_chain`. Make a new interceptor for each call of the model, because it holds the
    latest product of fused layers.

    `apply` enters one. Enter one yourself where other code calls the model:

        with nn.intercept_methods(sj.linen.Interceptor()):
            logits = state.apply_fn(state.params, tokens)
    """

    def __init__(self) -> None:
        self._product = FusedProduct()
        self._layers = DecoderLayers()

    def __call__(self, next_fun, args, kwargs, context):
        y = self._layers.run(args, kwargs, context)
        return self.run_module(next_fun, args, kwargs, context) if y is None else y

    def run_module(self, next_fun, args, kwargs, context):
        """Like a call, but no decoder layer runs as a whole."""
        check_wrapper(context.module)
        y = run_gated_mlp(args, kwargs, context)
        if y is not None:
            return y
        layer = layer_of(context)
        w = own_kernel(context.module, layer) if layer is not None else None
        if layer is None or not isinstance(w, (LinearWeight, FusedWeight, FusedPart)):
            return next_fun(*args, **kwargs)
        if isinstance(w, LinearWeight):
            w.check(kernel_path(context.module, layer))
        x, args, kwargs = split_input(args, kwargs, layer)
        axes, features = layer(context.module, x, *args, **kwargs)
        if isinstance(layer, Registered) and isinstance(w, LinearWeight):
            return run_registered(w, axes, features, x)
        if not isinstance(w, LinearWeight):
            return self._product.part(context.module, w, axes, features, x)
        return run_layer(context.module, w, axes, features, x)


def interceptor(next_fun, args, kwargs, context):
    """An `Interceptor` without a memory, for any number of calls.

    Each of several fused layers computes the product of all of them and takes its part. XLA merges
    equal products under `jax.jit`. Outside `jax.jit` an `Interceptor` for each call computes the
    product once.
    """
    return Interceptor().run_module(next_fun, args, kwargs, context)


def apply(model: nn.Module, variables: Mapping, *args, **kwargs) -> Any:
    """`model.apply(variables, *args, **kwargs)` where kernels in `variables` may be packed.

    Args:
      model: any Linen module, unchanged.
      variables: as `model.apply` takes them, from `slidejax.linen.convert`.
      *args, **kwargs: other arguments of `model.apply`: inputs, `method`, `mutable`, `rngs`,
        `capture_intermediates`.

    Returns:
      The result of `model.apply`.

    Raises:
      TypeError: if the model or the variables are of another kind.

    >>> import jax.numpy as jnp
    >>> from slidejax.linen import convert
    >>> model, x = nn.Dense(4), jnp.ones((1, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> apply(model, convert(variables, "6:8", model, x), x).shape
    (1, 4)
    """
    check_kind(model, nn.Module, "model", "a module of flax.linen")
    check_kind(variables, Mapping, "variables", "a mapping, as model.init returns it")
    with nn.intercept_methods(Interceptor()):
        return model.apply(variables, *args, **kwargs)


_TRACES = itertools.count()


def traced_anew(rngs: Any = None) -> dict[str, Any]:
    """Keys for one call of a model, with one more that makes `nn.jit` trace it again.

    `nn.jit` remembers what it has traced by its arguments, and an interceptor is none of them. So a
    call that is only made for its interceptors gets a stream of keys whose name is new.

    Args:
      rngs: the keys that the call needs: a dict, or one key for "params"; or None.
    """
    given = rngs if isinstance(rngs, Mapping) else {} if rngs is None else {"params": rngs}
    return {**given, f"slidejax_{next(_TRACES)}": jax.random.key(0)}


def show_layers(next_fun, args, kwargs, context):
    """For `nn.intercept_methods`: linear layers with an array for a kernel show input and output.

    Calibration watches them (`slidejax.functional.watching_inputs`).
    """
    module, layer = context.module, layer_of(context) if functional.watched() else None
    kernel = None if layer is None else own_kernel(module, layer)
    if layer is None or not isinstance(kernel, jax.Array):
        return next_fun(*args, **kwargs)
    x, args, kwargs = split_input(args, kwargs, layer)
    path = kernel_path(module, layer)
    try:
        axes, _ = layer(module, x, *args, **kwargs)
    except Skipped:
        return call_with(next_fun, layer, x, args, kwargs)
    x = functional.show_input(path, x, axes, kernel)
    y = call_with(next_fun, layer, x, args, kwargs)
    return functional.show_output(path, y)

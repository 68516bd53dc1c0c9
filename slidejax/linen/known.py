"""The linear layers of Flax Linen that can hold a packed weight, and how they run with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slidejax.contraction import Contraction, check_product, contract, promote_packed
from slidejax.linen.mapped import check_unmapped
from slidejax.linen.registered import Registered, function_name, registered
from slidejax.rules import Skipped
from slidejax.weights.packed import LinearWeight, TreeLayout

__all__ = [
    "bias_of",
    "body_name",
    "call_with",
    "kernel_name",
    "kernel_path",
    "layer_of",
    "own_kernel",
    "product",
    "run_layer",
    "run_registered",
    "split_input",
]


# (module, x, *args, **kwargs) -> (contraction, sizes of the output axes)
Layer = Callable[..., tuple[Contraction, tuple[int, ...]]]


def _asked_dtype(module) -> Any:
    """The dtype that a layer's arguments ask of its result, or None.

    Raises:
      ValueError: if a packed kernel cannot honour them.
    """
    names = "dot_general", "dot_general_cls", "preferred_element_type"
    return check_product(type(module).__name__, *(getattr(module, name, None) for name in names))


def _check_product(module) -> None:
    try:
        _asked_dtype(module)
    except ValueError as error:
        raise Skipped(f"it has a product of its own ({error})") from error


def _dense(module, x) -> tuple[Contraction, tuple[int, ...]]:
    _check_product(module)
    return Contraction.dense(jnp.ndim(x)), (module.features,)


def _dense_general(module, x) -> tuple[Contraction, tuple[int, ...]]:
    _check_product(module)
    axis, batch, features = (
        tuple(a) if isinstance(a, Sequence) else (a,)
        for a in (module.axis, module.batch_dims, module.features)
    )
    return Contraction.general(jnp.ndim(x), axis, batch, len(features)), features


def _einsum(module, x, einsum_str=None) -> tuple[Contraction, tuple[int, ...]]:
    _check_product(module)
    axes = Contraction.einsum(
        nn.merge_param("einsum_str", module.einsum_str, einsum_str), jnp.ndim(x)
    )
    return axes, tuple(module.shape[a] for a in axes.kernel_out)


def _conv1d(module, x) -> tuple[Contraction, tuple[int, ...]]:
    """Conv1D of transformers' GPT-2: a dense layer that stores its kernel as `[out, in]`."""
    return Contraction((), (1,), (0,), (), (jnp.ndim(x) - 1,)), (module.features,)


# A layer is known by the function that runs. So a subclass that overrides `__call__` is known if it
# calls the inherited function, and not known if it does something else with the kernel. The table
# holds the names of the functions, because transformers need not be installed.
_LAYERS: dict[str, Layer] = {
    function_name(nn.Dense.__call__): _dense,
    function_name(nn.DenseGeneral.__call__): _dense_general,
    function_name(nn.Einsum.__call__): _einsum,
    "transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D.__call__": _conv1d,
}


def layer_of(context) -> Layer | None:
    """The linear layer whose `__call__` an interceptor is about to run, or None.

    Args:
      context: the interceptor's context.

    Returns:
      `(module, x, *args, **kwargs) -> (contraction, sizes of the output axes)`, which raises
      `Skipped` if the layer cannot hold a packed weight.
    """
    name = body_name(context)
    return _LAYERS.get(name) or registered(name)


def body_name(context) -> str:
    """The qualified name of the function that an interceptor's context is about to run."""
    return function_name(getattr(context.orig_method, "func", context.orig_method))


def kernel_name(module: nn.Module, layer: Layer | None = None) -> str:
    """The name of the parameter that holds this module's kernel.

    Args:
      module: the module.
      layer: what `layer_of` says of it.
    """
    return layer.parameter(module) if isinstance(layer, Registered) else "kernel"


def own_kernel(module: nn.Module, layer: Layer | None = None) -> Any:
    """The kernel of this very module, as the module sees it, or None.

    Raises:
      ValueError: if it is packed, and a function over variables has changed its leaves.
    """
    name = kernel_name(module, layer)
    if module.scope is None or not module.has_variable("params", name):
        return None
    kernel: Any = module.get_variable("params", name)
    if isinstance(kernel, LinearWeight | TreeLayout):
        check_unmapped(kernel, name, kernel_path(module, layer))
    return nn.meta.unbox(kernel)


def kernel_path(module: nn.Module, layer: Layer | None = None) -> str:
    """The '/'-joined path of this module's kernel."""
    return "/".join((*module.path, kernel_name(module, layer)))


def split_input(args, kwargs, layer: Layer | None = None):
    """The input of a layer's `__call__`, and the other arguments."""
    if isinstance(layer, Registered):
        return layer.split(args, kwargs)
    if args:
        return args[0], args[1:], kwargs
    return kwargs["inputs"], (), {name: value for name, value in kwargs.items() if name != "inputs"}


def call_with(next_fun: Callable, layer: Layer, x, args, kwargs) -> Any:
    """Calls a layer with another input, and the other arguments that `split_input` gave."""
    if isinstance(layer, Registered):
        return next_fun(**{layer.input: x}, **kwargs)
    return next_fun(x, *args, **kwargs)


def bias_of(module) -> jax.Array | None:
    """The bias of this very module, or None if it has none."""
    if not module.use_bias:
        return None
    bias = nn.meta.unbox(module.get_variable("params", "bias"))
    if bias is None:
        raise ValueError(f"{'/'.join(module.path)} has use_bias=True and no parameter 'bias'")
    return bias


def run_layer(
    module,
    w: LinearWeight,
    axes: Contraction,
    features,
    x,
    implementation: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """A layer's result with a packed weight in place of its kernel.

    Args:
      module: the layer.
      w: the weight.
      axes: how the layer contracts its input with its kernel.
      features: sizes of the kernel's output axes.
      x: the input.
      implementation, residual: as in `slidejax.linear`.
    """
    return product(module, w, axes, features, x, bias_of(module), implementation, residual)


def product(
    module,
    w: LinearWeight,
    axes: Contraction,
    features,
    x,
    bias,
    implementation: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """A layer's result with a packed weight and this bias.

    Dtypes are promoted as the layer promotes them, except that 8-bit values and the residual take
    no part.
    """
    promote = getattr(module, "promote_dtype", nn.dtypes.promote_dtype)
    x, w, bias = promote_packed(lambda *arrays: promote(*arrays, dtype=module.dtype), x, w, bias)
    return contract(x, w, axes, features, bias, implementation, residual, _asked_dtype(module))


def run_registered(w: LinearWeight, axes: Contraction, features, x) -> jax.Array:
    """A registered layer's result with a packed weight in place of its kernel.

    Dtypes are promoted as `jnp.einsum` promotes them, except that 8-bit values take no part.
    """
    x, w, _ = promote_packed(nn.dtypes.promote_dtype, x, w, None)
    return contract(x, w, axes, features)

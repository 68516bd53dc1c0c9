"""Hugging Face Flax models that run with other parameters and other arithmetic; their class stays.

A `FlaxPreTrainedModel` calls `module.apply` for everything it does. A model made here holds an
instance of a subclass of its module's class, whose `apply` runs under an interceptor. Nothing else
changes.

All uses of private attributes of transformers are in this file.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from slidejax import linen
from slidejax.huggingface.supported import rope_theta
from slidejax.huggingface.write import write_pretrained
from slidejax.kinds import check_kind
from slidejax.variants.prepared import prepare

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

__all__ = [
    "check_model",
    "fuse_projections",
    "hold",
    "init_arguments",
    "is_model",
    "params_of",
    "with_params",
    "with_rope_theta",
]


def is_model(model: Any) -> bool:
    """Whether it is a Flax model of transformers; transformers is not imported for it."""
    return any(
        cls.__name__ == "FlaxPreTrainedModel" and cls.__module__.startswith("transformers.")
        for cls in type(model).__mro__
    )


def check_model(flax_model: Any) -> None:
    """Raises a TypeError unless it is a Flax model of transformers."""
    if not is_model(flax_model):
        raise TypeError(
            f"flax_model must be a Flax model of transformers, got {type(flax_model).__name__} "
            f"(slidejax.linen.convert and slidejax.nnx.convert take other modules)"
        )


# --- parameters -----------------------------------------------------------------------------------


def params_of(flax_model: FlaxPreTrainedModel) -> Mapping:
    """A model's parameters; a ValueError if it holds none."""
    if not flax_model._is_initialized:
        raise ValueError(
            f"this {type(flax_model).__name__} was made with _do_init=False and holds no "
            "parameters: give params="
        )
    return flax_model.params


def hold(flax_model: FlaxPreTrainedModel, params: Any) -> None:
    """Makes a model hold parameters, even if it was made with `_do_init=False`."""
    # as init_weights sets it; otherwise params cannot be assigned
    flax_model._is_initialized = True
    flax_model.params = params


def with_params(flax_model: FlaxPreTrainedModel, params: Mapping) -> FlaxPreTrainedModel:
    """A copy of a model that holds and runs other parameters, among them `SlideWeight`s.

    Args:
      flax_model: a model of any Flax class of transformers. It stays as it is.
      params: parameters in its structure, such as `slidejax.checkpoint` loads them. On a GPU the
        packed weights get their prepared forms (`slidejax.prepare`).

    Raises:
      ValueError: if parameters are missing.
      TypeError: if it is not a Flax model of transformers, or the parameters are no mapping.
    """
    check_model(flax_model)
    check_kind(params, Mapping, "params", "nested dicts of the model's parameters")
    model = copy.copy(flax_model)
    # users may edit these; the module keeps the configuration that it was built with
    model._config = copy.deepcopy(flax_model.config)
    model.generation_config = copy.deepcopy(flax_model.generation_config)
    if not getattr(flax_model.module, "_slidejax_sparse", False):
        model._module = _intercepted(flax_model.module, linen.Interceptor, _slidejax_sparse=True)
    hold(model, prepare(params) if jax.default_backend() == "gpu" else params)
    model.save_pretrained = types.MethodType(_save_pretrained, model)
    return model


def fuse_projections(flax_model: FlaxPreTrainedModel) -> FlaxPreTrainedModel:
    """A copy of a converted model that computes q, k and v as one product, and gate and up as one.

    It computes the same results with fewer and larger kernels (`slidejax.linen.fuse_projections`).

    Args:
      flax_model: a model from `convert`. It stays as it is.

    Raises:
      TypeError: if it is not a Flax model of transformers.
    """
    check_model(flax_model)
    return with_params(flax_model, linen.fuse_projections(flax_model.params))


def _save_pretrained(self, save_directory, params=None, **kwargs) -> None:
    """Writes the model with its packed weights, as `slidejax convert` does."""
    if kwargs:
        raise ValueError(
            f"save_pretrained of a sparse model takes no {', '.join(kwargs)}: "
            "see slidejax.checkpoint.save"
        )
    write_pretrained(save_directory, self if params is None else with_params(self, params))


# --- modules --------------------------------------------------------------------------------------


def _with_methods(module: nn.Module, **namespace) -> nn.Module:
    """The same module as an instance of a subclass with other methods. The class keeps its name."""
    base = type(module)
    namespace = {
        name: nn.nowrap(value) if callable(value) else value for name, value in namespace.items()
    }
    namespace |= {"__module__": base.__module__, "__doc__": base.__doc__}
    subclass = type(base.__name__, (base,), namespace)
    fields = [
        field.name
        for field in dataclasses.fields(module)
        if field.init and field.name not in ("parent", "name")
    ]
    return subclass(**{name: getattr(module, name) for name in fields})


def _intercepted(module: nn.Module, interceptor: Callable[[], Any], **namespace) -> nn.Module:
    """The same module, but its `apply` runs under an interceptor.

    Args:
      module: the module.
      interceptor: makes an interceptor for each call.
      **namespace: attributes of the subclass.
    """
    base = type(module)

    def apply(self, *args, **kwargs):
        with nn.intercept_methods(interceptor()):
            return base.apply(self, *args, **kwargs)

    return _with_methods(module, apply=apply, **namespace)


class _Called(Exception):
    """Carries the arguments of `module.init` out of `init_weights`."""


def init_arguments(flax_model: FlaxPreTrainedModel) -> tuple[Any, tuple, dict]:
    """The arguments with which the model itself calls `module.init`, for any architecture."""

    def init(self, rngs, *args, **kwargs):
        raise _Called(rngs, args, kwargs)

    probe = copy.copy(flax_model)
    probe._module = _with_methods(flax_model.module, init=init)
    try:
        probe.init_weights(jax.random.PRNGKey(0), flax_model.input_shape)
    except _Called as call:
        rngs, args, kwargs = call.args
        return rngs, args, kwargs
    raise ValueError(
        f"{type(flax_model).__name__}.init_weights does not call module.init: "
        "its layers cannot be traced"
    )


# --- rotary positions -----------------------------------------------------------------------------

_ROTARY = frozenset(
    {"FlaxLlamaRotaryEmbedding", "FlaxMistralRotaryEmbedding", "FlaxGemmaRotaryEmbedding"}
)
_FLAX_THETA = 10000.0  # written into transformers' Flax modules


def with_rope_theta(model: Any) -> Any:
    """Makes a Hugging Face Flax model rotate with the base that its configuration says.

    Returns the model.

    The Flax classes of transformers 4 rotate with a base of 10000, whatever the configuration
    says. So without this SmolLM2 (100000) and Llama 3 (500000) do not compute what they were
    trained to compute.
    """
    theta = rope_theta(model.config)
    module = model.module
    if theta in (None, _FLAX_THETA) or getattr(module, "_slidejax_rope_theta", None) == theta:
        return model

    def rotate(next_fun, args, kwargs, context):
        if type(context.module).__name__ in _ROTARY and context.method_name == "__call__":
            return _rotated(context.module.dtype, theta, *args, **kwargs)
        return next_fun(*args, **kwargs)

    model._module = _intercepted(module, lambda: rotate, _slidejax_rope_theta=theta)
    return model


def _rotated(
    dtype: Any, theta: float, key: jax.Array, query: jax.Array, position_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The key and the query, rotated with this base."""
    half = key.shape[-1] // 2
    frequencies = (1.0 / theta ** (np.arange(half) / half)).astype(np.float32)
    angles = position_ids[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]

    def turn(x: jax.Array) -> jax.Array:
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(dtype)

    return turn(key), turn(query)

"""Layers that read the same input as one product: q, k and v; gate and up.

Products of few rows cost little more together than one of them alone. This is another layout of the
parameters, for loops: `qkv_proj` takes the place of three layers, `gate_up_proj` that of two. The
results are those of the layers. Models are converted, trained and saved in the usual layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.lm.decoder.layer import chain_kernels
from slidejax.lm.decoder.params import GROUPS, check_tree
from slidejax.ops.implementations import hopper
from slidejax.ops.implementations.decode import ROWS, is_small
from slidejax.ops.implementations.dense import dense_codes
from slidejax.ops.problem import device_kind
from slidejax.variants.prepared import map_weights, prepare
from slidejax.variants.serving import serving as serving_weights
from slidejax.weights.packed import LinearWeight, SlideWeight, pack
from slidejax.weights.pattern import UNPRUNED

__all__ = ["fuse", "serving"]


def fuse(params: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the kernels of layers that read the same input together.

    Args:
      params: a decoder's parameters, see `slidejax.lm.decoder.apply`.

    Returns:
      New parameters of another layout, for `apply`. Layers are fused where all kernels of a group
      are arrays, or packed weights of one pattern and dtype; others stay as they are. Packed
      weights have no prepared forms.

    >>> from slidejax.lm.decoder.examples import tiny
    >>> fused = fuse(tiny().params)
    >>> fused["model"]["layers"]["0"]["self_attn"]["qkv_proj"]["kernel"].shape
    (32, 64)
    """
    check_tree(params)
    body = params["model"]
    layers = {
        index: {name: _fuse_module(name, module) for name, module in layer.items()}
        for index, layer in body.get("layers", {}).items()
    }
    return {**params, "model": {**body, "layers": layers}}


def serving(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in the layout and the form that serve best on this device.

    They are fused. On a GPU packed weights get the prepared forms that pay. On a Hopper GPU those
    of a small model whose layers make chains become weights of the pattern "dense" with the same
    codes, because its steps wait for kernels and not for bytes. On a CPU only their codes and
    scales are kept, and kernels of 16-bit floats are kept in float32: XLA multiplies in float32
    there, and would convert all of them in every call. The results are the same. Adapters and
    master weights stay as they are.

    >>> from slidejax.lm.decoder.examples import tiny
    >>> from slidejax.lm.decoder.family import convert
    >>> params = serving(convert(tiny(), "6:8").params)
    >>> type(params["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]).__name__
    'ServingWeight'
    """
    fused = fuse(params)
    if jax.default_backend() == "cpu":
        return _for_a_cpu(fused)
    return prepare(map_weights(_with_zeros, fused) if _is_small(fused) else fused)


def _is_small(params: Mapping[str, Any]) -> bool:
    """Whether chains of few rows are faster where the zeros are values (decision 063)."""
    device = device_kind("cuda")
    chains = [chain_kernels(layer) for layer in params["model"]["layers"].values()]
    return all(
        kernels is not None
        and all(
            is_small(ROWS, w.in_features, UNPRUNED, w.dtype)
            and hopper.refuses_device(device, w.dtype) is None
            for w in kernels
        )
        for kernels in chains
    )


def _with_zeros(w: SlideWeight) -> SlideWeight:
    """The weight in the pattern "dense": its zeros are values like others."""
    if not w.pattern.prunes:
        return w
    codes = jnp.swapaxes(dense_codes(w.replace(prepared={})), -1, -2)
    return pack(codes, UNPRUNED).replace(scale=w.scale)


def _for_a_cpu(params: Mapping[str, Any]) -> dict[str, Any]:
    """Fused parameters as `serving` makes them for a CPU."""
    embedding = params["model"]["embed_tokens"]["embedding"]
    if "lm_head" not in params and embedding.dtype != jnp.float32:
        # The embedding says in which dtype the decoder computes, so the head needs its own array.
        params = {**params, "lm_head": {"kernel": embedding.T}}

    def served(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {inner: served(inner, part) for inner, part in value.items()}
        return _kernel_for_a_cpu(value, embedding.dtype) if name == "kernel" else value

    return served("", params)


def _kernel_for_a_cpu(kernel: Any, dtype: Any) -> Any:
    """A kernel of a decoder that computes in `dtype`."""
    if isinstance(kernel, SlideWeight):
        served = serving_weights(kernel)
        same = served.dtype == dtype  # otherwise x is rounded to the dtype of the values
        return served.with_promoted(served.values.astype(jnp.float32)) if same else served
    if isinstance(kernel, LinearWeight) or kernel.dtype == dtype == jnp.float32:
        return kernel
    return kernel.astype(dtype).astype(jnp.float32)


def _fuse_module(name: str, module: Mapping[str, Any]) -> Mapping[str, Any]:
    together, parts = GROUPS.get(name, ("", ()))
    if not parts or any(part not in module for part in parts):
        return module
    kernel = _one_kernel([module[part]["kernel"] for part in parts])
    if kernel is None:
        return module
    layer = {"kernel": kernel}
    biases = [module[part].get("bias") for part in parts]
    if any(bias is not None for bias in biases):
        layer["bias"] = jnp.concatenate(
            [
                jnp.zeros(module[part]["kernel"].shape[-1]) if bias is None else bias
                for part, bias in zip(parts, biases, strict=True)
            ]
        )
    return {**{key: value for key, value in module.items() if key not in parts}, together: layer}


def _one_kernel(kernels: list[Any]) -> Any:
    """The kernels side by side, or None if they do not fit together."""
    first = kernels[0]
    if all(isinstance(w, SlideWeight) for w in kernels):
        if any((w.pattern, w.dtype) != (first.pattern, first.dtype) for w in kernels):
            return None
        values, zeros, scale = (
            jnp.concatenate([getattr(w, name) for w in kernels])
            for name in ("values", "zeros", "scale")
        )
        return SlideWeight(values, zeros, scale, first.pattern, first.in_features)
    if all(isinstance(w, jax.Array) and w.dtype == first.dtype for w in kernels):
        return jnp.concatenate(kernels, axis=1)
    return None

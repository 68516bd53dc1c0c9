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

from slidejax.variants.prepared import prepare
from slidejax.variants.serving import serving as serving_weights
from slidejax.weights.packed import SlideWeight

__all__ = ["fuse", "serving"]

_GROUPS = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


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
    body = params["model"]
    layers = {
        index: {name: _fuse_module(name, module) for name, module in layer.items()}
        for index, layer in body["layers"].items()
    }
    return {**params, "model": {**body, "layers": layers}}


def serving(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in the layout and the form that serve best on this device.

    They are fused. On a GPU packed weights get the prepared forms that pay; on a CPU only their
    codes and scales are kept.

    >>> from slidejax.lm.decoder.examples import tiny
    >>> from slidejax.lm.decoder.family import convert
    >>> params = serving(convert(tiny(), "6:8").params)
    >>> type(params["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]).__name__
    'ServingWeight'
    """
    fused = fuse(params)
    return serving_weights(fused) if jax.default_backend() == "cpu" else prepare(fused)


def _fuse_module(name: str, module: Mapping[str, Any]) -> Mapping[str, Any]:
    together, parts = _GROUPS.get(name, ("", ()))
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

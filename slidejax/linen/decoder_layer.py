"""Decoder layers of transformers' Flax models with fused projections, run as a whole.

Behind attention, a layer computes

    x = x + o_proj(attention(norm(x)))
    x = x + mlp(norm(x))

These are three products with a norm, a gate and two sums between them. `slidejax.linear_chain`
computes them together, with few rows in one custom call whose kernels overlap.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slidejax.linen.gated_mlp import activation_of
from slidejax.linen.known import bias_of, body_name, kernel_path, own_kernel
from slidejax.linen.registered import function_name
from slidejax.ops.chain import Stage, linear_chain
from slidejax.ops.prologue import GLU, RMSNorm
from slidejax.variants.projections import FusedWeight
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight

__all__ = ["DecoderLayers"]

# The number that is added to the weight of a norm, by the name of the function that runs a layer.
# They are names, because transformers need not be installed.
_NORM_OFFSETS = {
    f"transformers.models.{name}.modeling_flax_{name}.Flax{name.capitalize()}DecoderLayer"
    ".__call__": offset
    for name, offset in {"llama": 0, "mistral": 0, "gemma": 1}.items()
}
_DENSE = function_name(nn.Dense.__call__)


class DecoderLayers:
    """Runs the decoder layers of one call of a model.

    A layer's attention ends with o_proj, which is the first product of the chain. So o_proj returns
    its input while the attention of such a layer runs.
    """

    def __init__(self) -> None:
        self._held_back: tuple[str, ...] | None = None  # the path of an o_proj

    def run(self, args, kwargs, context) -> Any:
        """Runs what an interceptor is about to call, if it is a whole layer or an o_proj.

        Args:
          args, kwargs, context: those of the interceptor.

        Returns:
          The result; or None if this is another call, or a layer that runs module by module.
        """
        module, name = context.module, body_name(context)
        if name == _DENSE and module.path == self._held_back:
            return args[0]
        if name not in _NORM_OFFSETS or len(args) != 1 or jnp.result_type(*args) != module.dtype:
            return None
        stages = _stages(module, args[0], _NORM_OFFSETS[name])
        if stages is None:
            return None
        self._held_back = (*module.self_attn.path, "o_proj")
        try:
            y, *others = module.self_attn(module.input_layernorm(*args), **kwargs)
        finally:
            self._held_back = None
        (y,) = linear_chain(y.astype(module.dtype), stages)
        return y, *others


def _stages(module: nn.Module, x: jax.Array, offset: int) -> list[Stage] | None:
    """The products behind the attention of a layer, or None if it has to run module by module.

    Args:
      module: the layer.
      x: its input.
      offset: added to the weight of its norm.
    """
    o, mlp, norm = module.self_attn.o_proj, module.mlp, module.post_attention_layernorm
    activation, gate_up = activation_of(mlp.act), own_kernel(mlp.gate_proj)
    if activation is None or module.is_mutable_collection("intermediates"):
        return None  # intermediates are results of modules
    if not isinstance(gate_up, FusedWeight) or gate_up.layers != ("gate_proj", "up_proj"):
        return None
    kernels = own_kernel(o), gate_up.fused, own_kernel(mlp.down_proj)
    if not all(isinstance(w, SlideWeight) and numerics.is_quantized(w.dtype) for w in kernels):
        return None
    if any(layer.use_bias for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        return None
    for w, layer in zip(kernels, (o, mlp.gate_proj, mlp.down_proj), strict=True):
        w.check(kernel_path(layer))
    weight = offset + nn.meta.unbox(norm.get_variable("params", "weight"))
    return [
        Stage(kernels[0], bias_of(o), residual=x),
        Stage(kernels[1], prologue=RMSNorm(weight, module.config.rms_norm_eps)),
        Stage(kernels[2], prologue=GLU(activation=activation), residual=0),
    ]

"""Gated MLPs of transformers' Flax models, run as a whole.

A block computes `down(up(x) * act(gate(x)))`. Where `down_proj` is 8-bit and sparse, the kernel
that quantises its rows computes the gate's product too. XLA would write that product to memory and
read it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from slidejax.contraction import promote_packed
from slidejax.linen.known import body_name, kernel_path, own_kernel
from slidejax.ops.linear import linear
from slidejax.ops.prologue import GLU
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight, TreeLayout

__all__ = ["activation_of", "run_gated_mlp"]

# The names of the functions that run these blocks: transformers need not be installed.
_BODIES = frozenset(
    f"transformers.models.{name}.modeling_flax_{name}.Flax{name.capitalize()}MLP.__call__"
    for name in ("llama", "mistral", "gemma")
)


def run_gated_mlp(args, kwargs, context) -> jax.Array | None:
    """Runs a gated MLP as a whole, if an interceptor is about to call one.

    Args:
      args, kwargs, context: those of the interceptor.

    Returns:
      The block's result, or None if this is another call, or a block that runs layer by layer. So
      do MLPs whose gate and up are fused, if they are not part of a whole layer
      (`slidejax.linen.decoder_layer`).
    """
    if len(args) != 1 or kwargs or body_name(context) not in _BODIES:
        return None
    module, (x,) = context.module, args
    down, activation = module.down_proj, activation_of(module.act)
    w = own_kernel(down)
    if (
        activation is None
        or not isinstance(w, SlideWeight)
        or not numerics.is_quantized(w.dtype)
        or down.use_bias
        or isinstance(own_kernel(module.gate_proj), TreeLayout)
    ):
        return None
    w.check(kernel_path(down))
    up, gate = module.up_proj(x), module.gate_proj(x)
    gate, w, _ = promote_packed(
        lambda *arrays: down.promote_dtype(*arrays, dtype=down.dtype), gate, w, None
    )
    return linear(gate, w, prologue=GLU(up.astype(gate.dtype), activation))


def activation_of(function: Callable) -> str | None:
    """The name that `GLU` has for a Flax activation, or None."""
    if function in (nn.silu, nn.swish):
        return "silu"
    if function is nn.relu:
        return "relu"
    if (
        isinstance(function, functools.partial)
        and function.func is nn.gelu
        and not function.args
        and set(function.keywords) == {"approximate"}
    ):
        return "gelu_tanh" if function.keywords["approximate"] else "gelu"
    return None

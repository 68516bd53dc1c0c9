"""`SlideDense`: a Linen layer that makes its own packed weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slidejax.bounds import COUNT
from slidejax.contraction import Contraction, axis_names, check_product
from slidejax.linen.known import kernel_path, own_kernel, run_layer
from slidejax.rules import Rule, Skipped
from slidejax.weights.packed import LinearWeight, SlideWeight, TreeLayout, pack
from slidejax.weights.pattern import Pattern

__all__ = ["SlideDense", "pack_boxed"]


class SlideDense(nn.Module):
    """A drop-in for `nn.Dense` that prunes and packs its kernel when parameters are initialised.

    The parameters are `{"kernel": SlideWeight, "bias": [features]}`. With `qdtype=None` the values
    are floats and can be trained (`slidejax.partition`), and the mask stays as it was at
    initialisation. 8-bit values have no gradient.

    With `nn.with_partitioning` around `kernel_init`, the axis names `(in, out)` go to the leaves of
    the `SlideWeight`. The inputs keep their name only if they are whole blocks (`Pattern.block`),
    because K cannot be cut elsewhere.

    Attributes:
      features: the number of outputs.
      use_bias: whether to add a bias.
      dtype: dtype of the computation. None promotes the input, the bias and, unless they are 8-bit,
        the values.
      param_dtype: dtype of the bias, and of the kernel before it is packed.
      precision: accepted as `nn.Dense` accepts it. Products are at least as exact as HIGHEST asks.
      kernel_init: makes the kernel `[in, out]`, which is then pruned by magnitude.
      bias_init: makes the bias.
      promote_dtype: as in `nn.Dense`.
      dot_general, dot_general_cls: only what `nn.Dense` has by default, or a `functools.partial` of
        `jax.lax.dot_general` with a `preferred_element_type`. A packed kernel has a product of its
        own.
      pattern: such as `"6:8"`.
      qdtype: dtype of the packed values, see `slidejax.Rule`. None keeps `param_dtype`.
      implementation: as in `slidejax.linear`. None takes the fastest that fits.

    >>> layer = SlideDense(features=4, pattern="6:8", qdtype="int8")
    >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8)))
    >>> variables["params"]["kernel"].shape, layer.apply(variables, jnp.ones((1, 8))).shape
    ((8, 4), (1, 4))
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable = nn.linear.default_kernel_init
    bias_init: Callable = nn.initializers.zeros_init()
    promote_dtype: Callable = nn.dtypes.promote_dtype
    dot_general: Callable | None = None
    dot_general_cls: Any = None
    pattern: str | Pattern = "6:8"
    qdtype: Any = "int8"
    implementation: str | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Computes `[..., features]` from inputs `[..., in]`.

        Args:
          inputs: `[..., in]`.
          residual: `[..., features]`, added in float32 before the result is rounded, as
            `slidejax.linear` does; or None. It takes no part in the promotion of dtypes.

        Raises:
          ValueError: if the parameter has another pattern or shape, or is not packed; or for a
            `dot_general` that a packed kernel cannot honour.
        """
        check_product("SlideDense", self.dot_general, self.dot_general_cls)
        COUNT.check(self.features, "features")
        rule, shape = Rule(self.pattern, self.qdtype), (jnp.shape(inputs)[-1], self.features)
        w = own_kernel(self)
        if w is not None:
            _check_own(w, rule.pattern, shape, kernel_path(self))
        if w is None or not w.is_k_shard:
            w = self.param(
                "kernel",
                functools.partial(_init_kernel, self.kernel_init, rule),
                shape,
                self.param_dtype,
            )
        if self.use_bias:
            self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return run_layer(
            self,
            w,
            Contraction.dense(jnp.ndim(inputs)),
            (self.features,),
            inputs,
            self.implementation,
            residual,
        )


def _check_own(w: Any, pattern: Pattern, shape: tuple[int, int], path: str) -> None:
    """Raises a ValueError unless the parameter is a packed weight of this pattern and shape."""
    if isinstance(w, TreeLayout):
        raise w.not_a_weight()
    if not isinstance(w, LinearWeight):
        raise ValueError(
            f"{path} is an unpacked array of shape {jnp.shape(w)}; SlideDense takes a SlideWeight "
            "(slidejax.linen.convert)"
        )
    w.check(path)
    found = w.weight.pattern
    if (
        found != pattern
        or w.out_features != shape[-1]
        or not (w.is_k_shard or w.shape[-2:] == shape)
    ):
        raise ValueError(
            f"{path} is a {found} weight of shape {w.shape}; expected {pattern} of shape {shape}"
        )


def _init_kernel(init: Callable, rule: Rule, key, shape, dtype) -> SlideWeight:
    return pack_boxed(
        init(key, shape, dtype),
        Contraction.dense(1).kernel,
        lambda kernel: pack(kernel, rule.pattern, dtype=rule.qdtype),
    )


def pack_boxed(kernel, axes, make: Callable[[jax.Array], SlideWeight]) -> SlideWeight:
    """Packs a kernel that may be boxed with the names of its axes; the leaves are then boxed, too.

    Args:
      kernel: an array, or an `nn.Partitioned` with one.
      axes: the kernel's axes inside its layer.
      make: packs the array.

    Raises:
      Skipped: if the kernel is boxed in another way.
    """
    if not isinstance(kernel, nn.meta.AxisMetadata):
        return make(kernel)
    if not isinstance(kernel, nn.Partitioned):
        raise Skipped(
            f"its kernel is boxed in {type(kernel).__name__}, whose axis names are not known"
        )
    w = make(kernel.value)
    leaf_names = axis_names(w, kernel.names, kernel.value.ndim, axes)
    return jax.tree.map(
        lambda leaf, spec: kernel.replace(value=leaf, names=tuple(spec)), w, leaf_names
    )

"""Linear layers of other libraries, which users register: a class, its parameter, its einsum."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from slidejax.contraction import Contraction
from slidejax.kinds import shown
from slidejax.nnx.layers import SlideLayer

__all__ = ["Registered", "SlideRegistered", "parameter_of", "register", "registered"]


@dataclasses.dataclass(frozen=True)
class Registered:
    """A registered class of layers.

    Attributes:
      parameter: the attribute that holds the kernel.
      equation: `layer -> einsum of its input and its kernel`.
    """

    parameter: str
    equation: Callable[[Any], str]

    def contraction(self, layer: Any, x_ndim: int) -> Contraction:
        """How the layer contracts an input of this rank with its kernel."""
        return Contraction.einsum(self.equation(layer), x_ndim)

    def axes(self, layer: Any):
        """The kernel's batch, input and output axes, which do not depend on the input's rank."""
        operand = self.equation(layer).replace(" ", "").partition(",")[0]
        rank = len(operand.replace("...", "")) + operand.count("...")
        return self.contraction(layer, rank).kernel


_CLASSES: dict[type, Registered] = {}
# Classes of libraries that need not be installed, by the beginning and the end of their full names.
_BY_NAME = {
    ("tunix.models.", ".Einsum"): Registered("w", lambda layer: layer.einsum_str),
}


def register(cls: type, parameter: str, equation: str | Callable[[Any], str]) -> None:
    """Makes a class of linear layers known to `convert` and to calibration.

    Its `__call__` must take the input first and compute nothing but the einsum of the input and the
    parameter. Subclasses are not known by it. tunix's `Einsum` is known already.

    Args:
      cls: a subclass of `nnx.Module`.
      parameter: the name of the attribute with the kernel, an `nnx.Param`.
      equation: the einsum of input and kernel, such as `"...d,df->...f"`; or a function that makes
        it from a layer.

    Raises:
      TypeError: if `cls` is no subclass of `nnx.Module`, or an argument is of the wrong kind.
      ValueError: if the einsum is no product of matrices.

    >>> import jax.numpy as jnp
    >>> class Mine(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 8)))
    ...     def __call__(self, x):
    ...         return jnp.einsum("bd,fd->bf", x, self.w.get_value())
    >>> register(Mine, "w", "bd,fd->bf")
    >>> from slidejax.nnx import convert
    >>> type(convert(Mine(nnx.Rngs(0)), "6:8")).__name__
    'SlideMine'
    """
    if not (isinstance(cls, type) and issubclass(cls, nnx.Module)):
        raise TypeError(f"cls must be a subclass of flax.nnx.Module, got {shown(cls)}")
    if not isinstance(parameter, str) or not parameter.isidentifier():
        raise TypeError(f"parameter must be the name of an attribute, got {shown(parameter)}")
    if isinstance(equation, str):
        text = equation
        found = Registered(parameter, lambda layer: text)
        try:
            found.axes(None)
        except Exception as error:
            raise ValueError(f"equation={text!r}: {error}") from error
    elif callable(equation):
        found = Registered(parameter, equation)
    else:
        raise TypeError(f"equation must be an einsum or a function, got {shown(equation)}")
    _CLASSES[cls] = found


def registered(cls: type) -> Registered | None:
    """The registration of a class, or None."""
    if cls in _CLASSES:
        return _CLASSES[cls]
    name = f"{cls.__module__}.{cls.__qualname__}"
    for (begin, end), found in _BY_NAME.items():
        # Gemma 4's Einsum of tunix has a scale for its kernel, and computes more than an einsum.
        if name.startswith(begin) and name.endswith(end) and "gemma4" not in name:
            return found
    return None


def parameter_of(layer: Any) -> str:
    """The attribute of a layer that may hold a kernel."""
    found = registered(type(layer))
    return "kernel" if found is None else found.parameter


class SlideRegistered(SlideLayer):
    """A registered layer with a packed kernel, made by `convert`."""

    bias: Any = None
    dtype: Any = None
    promote_dtype: Any = staticmethod(nnx.nn.dtypes.promote_dtype)
    registered_as: Any = None
    packed_shape: tuple[int, ...] = ()

    @property
    def parameter(self) -> str:
        return self.registered_as.parameter

    def __call__(self, inputs: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        axes = self.registered_as.contraction(self, inputs.ndim)
        features = tuple(self.packed_shape[a] for a in axes.kernel_out)
        return self._run(inputs, axes, features, None, residual)


@functools.cache
def packed_class(cls: type) -> type[SlideRegistered]:
    """The class that layers of a registered class become."""
    return type(f"Slide{cls.__name__}", (SlideRegistered, cls), {})

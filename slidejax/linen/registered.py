"""Linear layers of other libraries, which users register: a class, its parameter, its einsum."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slidejax.contraction import Contraction
from slidejax.kinds import shown

__all__ = ["Registered", "function_name", "register", "registered"]


@dataclasses.dataclass(frozen=True)
class Registered:
    """A registered class of layers.

    Attributes:
      parameter: `module -> name of the parameter` that holds the kernel.
      equation: `(module, arguments) -> einsum` of its input and its kernel. `arguments` are those
        of the call, by name.
      shape: `(module, input) -> shape` of the kernel.
      call: the signature of the layer's `__call__`.
      input: the name of the argument that is the input.
    """

    parameter: Callable[[Any], str]
    equation: Callable[[Any, dict[str, Any]], str]
    shape: Callable[[Any, jax.Array], tuple[int, ...]]
    call: inspect.Signature
    input: str

    def __call__(self, module, x, **arguments) -> tuple[Contraction, tuple[int, ...]]:
        """The contraction of a call, and the sizes of the output axes of the kernel."""
        equation = self.equation(module, {self.input: x, **arguments})
        axes, shape = Contraction.einsum(equation, jnp.ndim(x)), self.shape(module, x)
        return axes, tuple(shape[a] for a in axes.kernel_out)

    def split(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
        """The input of a call, and its other arguments, all by name."""
        bound = self.call.bind(None, *args, **kwargs).arguments
        given = dict(list(bound.items())[1:])  # without self
        return given.pop(self.input), (), given


# By the name of the function that runs, because the libraries need not be installed.
_LAYERS: dict[str, Registered] = {}
# Layers of DeepMind's gemma: `layer(einsum, x)`, with a name of its own for the parameter.
_GEMMA = Registered(
    lambda module: getattr(module, "weight_name", "w"),
    lambda module, arguments: arguments["eqn"],
    lambda module, x: module.shape,
    inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ("self", "eqn", "x")
        ]
    ),
    "x",
)
_LAYERS |= dict.fromkeys(
    [
        "gemma.gm.nn._layers.Einsum.__call__",
        "gemma.gm.nn.gemma3n._layers.Einsum.__call__",
    ],
    _GEMMA,
)


def function_name(method: Callable) -> str:
    """The qualified name of a function, without what Flax wraps around it."""
    method = inspect.unwrap(method)
    return f"{method.__module__}.{method.__qualname__}"


def register(
    cls: type,
    parameter: str,
    equation: str | Callable[[Any, dict[str, Any]], str],
    *,
    shape: str | Callable[[Any, jax.Array], tuple[int, ...]] = "shape",
    input: str | None = None,
) -> None:
    """Makes a class of linear layers known to `convert`, to calibration and to `apply`.

    Its `__call__` must compute nothing but the einsum of the input and the parameter. Subclasses
    are known by it unless they override `__call__`. The Einsum of DeepMind's gemma is known
    already.

    Args:
      cls: a subclass of `flax.linen.Module`.
      parameter: the name of the parameter that holds the kernel.
      equation: the einsum of input and kernel, such as `"...d,df->...f"`; or a function that makes
        it from a layer and the arguments of its call, by name.
      shape: the shape of the kernel: an attribute of the layer; or a function of a layer and its
        input.
      input: the name of the argument of `__call__` that is the input. None: the first.

    Raises:
      TypeError: if `cls` is no subclass of `flax.linen.Module`, or an argument is of the wrong
        kind.
      ValueError: if the einsum is no product of matrices, or `__call__` has no such argument.

    >>> class Mine(nn.Module):
    ...     features: int
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         shape = self.features, x.shape[-1]
    ...         return x @ self.param("w", nn.initializers.normal(), shape).T
    >>> register(Mine, "w", "...d,fd->...f", shape=lambda layer, x: (layer.features, x.shape[-1]))
    >>> from slidejax.linen import convert
    >>> x, layer = jnp.ones((2, 8)), Mine(4)
    >>> convert(layer.init(jax.random.key(0), x), "6:8", layer, x)["params"]["w"].shape
    (8, 4)
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of flax.linen.Module, got {shown(cls)}")
    if not isinstance(parameter, str) or not parameter:
        raise TypeError(f"parameter must be the name of a parameter, got {shown(parameter)}")
    if isinstance(equation, str):
        _check_einsum(equation)
    elif not callable(equation):
        raise TypeError(f"equation must be an einsum or a function, got {shown(equation)}")
    if not shape or not (isinstance(shape, str) or callable(shape)):
        raise TypeError(
            f"shape must be an attribute of the layer or a function, got {shown(shape)}"
        )
    call = inspect.signature(inspect.unwrap(cls.__call__))
    names = list(call.parameters)[1:]
    if not names or (input is not None and input not in names):
        raise ValueError(f"{cls.__name__}.__call__ has the arguments {names}, and not {input!r}")
    _LAYERS[function_name(cls.__call__)] = Registered(
        lambda module: parameter,
        equation if callable(equation) else lambda module, arguments: equation,
        shape if callable(shape) else lambda module, x: getattr(module, shape),
        call,
        names[0] if input is None else input,
    )


def _check_einsum(equation: str) -> None:
    operand = equation.replace(" ", "").partition(",")[0]
    rank = len(operand.replace("...", "")) + operand.count("...")
    try:
        Contraction.einsum(equation, rank)
    except Exception as error:
        raise ValueError(f"equation={equation!r}: {error}") from error


def registered(name: str) -> Registered | None:
    """The registration of the layer whose function has this name (`function_name`), or None."""
    return _LAYERS.get(name)

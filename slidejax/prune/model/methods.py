"""The methods that a model can be pruned with.

To add one, write a `Method` and pass it as `method=`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from slidejax.kinds import check_function, check_name, check_text
from slidejax.prune.model.result import Pruned
from slidejax.prune.model.stacked import for_elements
from slidejax.prune.rounding import round_kernel
from slidejax.prune.sparsegpt import sparsegpt
from slidejax.prune.wanda import wanda
from slidejax.rules import Prune, Rule
from slidejax.weights.magnitude import magnitude
from slidejax.weights.pattern import Pattern

__all__ = [
    "CALIBRATED",
    "MAGNITUDE",
    "METHODS",
    "SPARSEGPT",
    "WANDA",
    "Method",
    "Solve",
    "calibrated_method",
    "method_of",
]

# (kernel [in, out], target [in, out], gram [in, in], damping) -> Pruned; traced once for each shape
Solve = Callable[[jax.Array, jax.Array, jax.Array, Any], Pruned]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to prune the kernels of a model.

    Attributes:
      name: its name for users.
      choose: `(kernel, pattern, gram) -> mask`, or `(mask, kernel)` if it changes the kept values.
        It prunes one kernel `[..., in, out]` by itself.
      reads: the part of the Gram matrix of a layer's inputs that `choose` reads as `gram`: nothing,
        the diagonal `[in]`, or all of it, `[in, in]`. A method that reads something is calibrated,
        and prunes kernels `[in, out]`.
      solve: `(rule, kernel, target, gram, damping) -> Pruned`, for a calibrated method. It prunes
        one kernel on the way through a whole model. `gram` is the whole matrix. `target` is the
        kernel that would make up for everything that earlier layers lost; it is `kernel` itself
        where they lost nothing.
      corrects: whether `solve` reads `target`.
    """

    name: str
    choose: Callable[[jax.Array, Pattern, Any], Any]
    reads: Literal["nothing", "diagonal", "gram"] = "nothing"
    solve: Callable[[Rule, jax.Array, jax.Array, Any, Any], Pruned] | None = None
    corrects: bool = False

    def __post_init__(self) -> None:
        check_text(self.name, "name")
        check_function(self.choose, "choose")
        check_name(self.reads, ("nothing", "diagonal", "gram"), "reads")
        check_function(self.solve, "solve", optional=True)

    @property
    def calibrated(self) -> bool:
        """Whether it needs to know a layer's inputs."""
        return self.reads != "nothing"

    def solver(self, rule: Rule) -> Solve:
        """`solve` for a rule.

        Equal rules get the same object, so that its compiled programs serve again.
        """
        return _solver(self, rule)

    def pruner(self, grams: Mapping[str, jax.Array] | None = None) -> Prune:
        """The `prune=` of conversions with any pattern, from inputs that were measured once.

        Args:
          grams: path of a kernel -> the part of the Gram matrix that `reads` names
            (`slidejax.prune.model.grams.collect`). None for a method that needs no calibration.

        Returns:
          A function that raises a ValueError for a kernel that was not calibrated.
        """

        def prune(kernel: jax.Array, pattern: Pattern, path: str):
            if not self.calibrated:
                return self.choose(kernel, pattern, None)
            if grams is None or path not in grams:
                raise ValueError(
                    f"no calibration inputs reached this layer; {self.name} needs them"
                )
            lead = kernel.shape[:-2]
            if grams[path].shape[: len(lead)] != lead:
                raise ValueError(
                    f"the inputs were measured for other kernels than those of shape {kernel.shape}"
                )
            choose = functools.partial(self._choose_one, pattern)
            return for_elements(choose, lead, kernel, grams[path])

        return prune

    def _choose_one(self, pattern: Pattern, kernel: jax.Array, gram: jax.Array) -> Any:
        return self.choose(kernel, pattern, gram)


@functools.cache
def _solver(method: Method, rule: Rule) -> Solve:
    assert method.solve is not None  # only calibrated methods are asked for it
    return functools.partial(method.solve, rule)


def _solve_wanda(rule: Rule, kernel, target, gram, damping) -> Pruned:
    mask = wanda(kernel, rule.pattern, gram)
    return Pruned(mask, jnp.where(mask, kernel, 0))


def _solve_sparsegpt(rule: Rule, kernel, target, gram, damping) -> Pruned:
    mask, new = sparsegpt(target, rule.pattern, gram, damping=damping)
    if rule.qdtype is None or rule.qdtype.itemsize > 1:
        return Pruned(mask, new)
    return Pruned(mask, *round_kernel(target, mask, gram, new, rule.qdtype, damping=damping))


def _choose_magnitude(kernel, pattern, gram) -> jax.Array:
    return magnitude(kernel, pattern)


MAGNITUDE = Method("magnitude", _choose_magnitude)
WANDA = Method("wanda", wanda, "diagonal", _solve_wanda)
SPARSEGPT = Method("sparsegpt", sparsegpt, "gram", _solve_sparsegpt, corrects=True)

METHODS = {method.name: method for method in (MAGNITUDE, WANDA, SPARSEGPT)}
CALIBRATED = tuple(name for name, method in METHODS.items() if method.calibrated)


def _named(method: Any) -> Method | None:
    """The method that a caller means by an object or a name, or None."""
    if isinstance(method, Method):
        return method
    return METHODS.get(method) if isinstance(method, str) else None


def method_of(method: str | Method | Prune, calibration: Any) -> Method | Prune:
    """The method of a conversion, checked.

    Args:
      method: a name, a `Method`, or a function (`slidejax.rules.Prune`).
      calibration: the text to calibrate on, or None.

    Raises:
      ValueError: for an unknown name, for calibration that the method does not use, or if it needs
        some.
    """
    found = _named(method)
    if found is None and not callable(method):
        raise ValueError(
            f"method must be a function or one of {', '.join(METHODS)}, got {method!r:.60}"
        )
    needs = found is not None and found.calibrated
    name = method if found is None else found.name
    if not needs and calibration is not None:
        raise ValueError(f"method {name!r} uses no calibration")
    if needs and calibration is None:
        raise ValueError(
            f"method {name!r} needs calibration: token ids [sequences, length] or a "
            "slidejax.prune.Calibration"
        )
    if needs and found is not None and found.solve is None:
        raise ValueError(f"method {name!r} has no solve=, which prunes on the way through a model")
    return method if found is None else found  # type: ignore[return-value]


def calibrated_method(method: str | Method) -> Method:
    """A method that needs calibration.

    Raises:
      ValueError: if it is not one.
    """
    found = _named(method)
    if found is None or not found.calibrated:
        raise ValueError(f"method must be one of {', '.join(CALIBRATED)}, got {method!r}")
    return found

"""A model as a function of its parameters: all that conversion, calibration and pruning know of a model.

A model family (Flax Linen, Flax NNX, Hugging Face) makes a `Functional` of each of its models. `slidejax.conversion` asks
the families for it, and `slidejax.prune.model` works with it alone. To add a family, write one `Family` and register it
(`slidejax.conversion.register`).

While `run` calls the model, each linear layer whose kernel is an array calls `show_input` and `show_output`. Calibration
sees the layers through `watching_inputs` and `watching_outputs`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from slidejax.contraction import Contraction
from slidejax.rules import Report

__all__ = [
    "Family",
    "Functional",
    "arguments_of",
    "show_input",
    "show_output",
    "watched",
    "watching_inputs",
    "watching_outputs",
]


class Pack(Protocol):
    """Prunes and packs the kernels that rules choose, and puts the parameters back into the model."""

    def __call__(self, params: Any, rules: Any, *, prune: Any = None, report: Any = None) -> Any:
        """Returns the model in the form in which its family hands it out."""


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model as a function of its parameters.

    Attributes:
      run: `(params, batch) -> output`. It calls the model with a batch: the model's input, or a tuple of its arguments.
        Its layers show their inputs and outputs.
      params: the parameters, a tree whose keys make up the layers' paths.
      pack: `(params, rules, *, prune=None, report=None) -> model`. It prunes and packs the kernels that the rules choose
        and returns the converted model.
    """

    run: Callable[[Any, Any], Any]
    params: Any
    pack: Pack

    def layers(self, batch: Any) -> dict[str, Contraction]:
        """How each linear layer contracts its input with its kernel, by the kernel's path; nothing is computed."""
        found: dict[str, Contraction] = {}

        def watch(path, x, axes):
            found[path] = axes
            return x

        with watching_inputs(watch):
            jax.eval_shape(
                lambda params, batch: [self.run(params, batch), None][1], self.params, batch
            )
        return found

    def planned(self, rules: Any) -> Report:
        """What `pack` would report; nothing is computed."""
        report = Report()
        jax.eval_shape(
            lambda params: [self.pack(params, rules, report=report), None][1], self.params
        )
        return report


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of models.

    Attributes:
      name: what error messages call such a model.
      owns: `model -> bool`: whether a model is of this family.
      functional: `(model, params, example) -> Functional`. `params` are those that the caller gave, or None. `example` is a
        tuple of arguments for one call of the model; it may be empty.
    """

    name: str
    owns: Callable[[Any], bool]
    functional: Callable[[Any, Any, tuple], Functional]


def arguments_of(batch: Any) -> tuple:
    """The arguments that a batch stands for: a tuple holds them all, anything else is the only one."""
    return batch if isinstance(batch, tuple) else (batch,)


# --- what layers show -------------------------------------------------------------------------------------------------

# (path of the kernel, input, contraction) -> the input to go on with
WatchInput = Callable[[str, jax.Array, Contraction], jax.Array]
# (path of the kernel, output) -> the output to go on with
WatchOutput = Callable[[str, jax.Array], jax.Array]

_INPUTS: contextvars.ContextVar[WatchInput | None] = contextvars.ContextVar(
    "slidejax_watch_inputs", default=None
)
_OUTPUTS: contextvars.ContextVar[WatchOutput | None] = contextvars.ContextVar(
    "slidejax_watch_outputs", default=None
)


def show_input(path: str, x: jax.Array, axes: Contraction) -> jax.Array:
    """What a layer calls with its input; it goes on with the result."""
    watch = _INPUTS.get()
    return x if watch is None else watch(path, x, axes)


def show_output(path: str, y: jax.Array) -> jax.Array:
    """What a layer calls with its output; it returns the result."""
    watch = _OUTPUTS.get()
    return y if watch is None else watch(path, y)


def watched() -> bool:
    """Whether anybody watches the layers."""
    return _INPUTS.get() is not None or _OUTPUTS.get() is not None


def watching_inputs(watch: WatchInput) -> contextlib.AbstractContextManager[None]:
    """A context in which `watch` is called with the input of each layer that shows it."""
    return _set(_INPUTS, watch)


def watching_outputs(watch: WatchOutput) -> contextlib.AbstractContextManager[None]:
    """A context in which `watch` is called with the output of each layer that shows it."""
    return _set(_OUTPUTS, watch)


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar, watch: Callable) -> Iterator[None]:
    token = variable.set(watch)
    try:
        yield
    finally:
        variable.reset(token)

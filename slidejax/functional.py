"""A model as a function of its parameters: the interface between model families and pruning.

A model family (Flax Linen, Flax NNX, Hugging Face) makes a `Functional` of each of its models.
`slidejax.conversion` asks the families for it, and `slidejax.prune.model` works with nothing else.
To add a family, write a `Family` and register it (`slidejax.conversion.register`).

While `Functional.run` calls the model, each linear layer whose kernel is an array calls
`show_input` and `show_output`. Calibration sees the layers through `watching_inputs` and
`watching_outputs`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from slidejax.contraction import Contraction
from slidejax.kinds import check_function, check_text
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
    """Packs the kernels that the rules choose, and puts the parameters back into the model."""

    def __call__(self, params: Any, rules: Any, *, prune: Any = None, report: Any = None) -> Any:
        """Returns the converted model, in the form that its family's own `convert` returns."""


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model as a function of its parameters.

    Attributes:
      run: `(params, batch) -> output`. It calls the model with a batch, which is the model's input
        or a tuple of its arguments. The layers show their inputs and outputs.
      params: the parameters: a tree whose keys make up the layers' paths.
      pack: `(params, rules, *, prune=None, report=None) -> model`. It prunes and packs the kernels
        that the rules choose and returns the converted model.
      check: `batch -> None`. It raises a ValueError for a batch that the model would read wrongly,
        such as one with unknown tokens. None: the model reads everything that it runs on.
    """

    run: Callable[[Any, Any], Any]
    params: Any
    pack: Pack
    check: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        for name in ("run", "pack"):
            check_function(getattr(self, name), name)
        check_function(self.check, "check", optional=True)

    def layers(self, batch: Any) -> dict[str, Contraction]:
        """How each linear layer contracts its input with its kernel, by the kernel's path.

        The model is traced abstractly, and nothing is computed.
        """
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
        """The report that `pack` would give; nothing is computed."""
        report = Report()
        jax.eval_shape(
            lambda params: [self.pack(params, rules, report=report), None][1], self.params
        )
        return report


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of models.

    Attributes:
      name: such a model in error messages, with its article.
      owns: `model -> bool`: whether a model is of this family.
      functional: `(model, params, example) -> Functional`. `params` are the parameters that the
        caller gave, or None. `example` is a tuple of arguments for one call of the model; it may be
        empty.
    """

    name: str
    owns: Callable[[Any], bool]
    functional: Callable[[Any, Any, tuple], Functional]

    def __post_init__(self) -> None:
        check_text(self.name, "name")
        for name in ("owns", "functional"):
            check_function(getattr(self, name), name)


def arguments_of(batch: Any) -> tuple:
    """The arguments of a call with a batch: a tuple holds all of them; anything else is one."""
    return batch if isinstance(batch, tuple) else (batch,)


# --- showing and watching -------------------------------------------------------------------------

# (path of the kernel, input, contraction) -> the input to go on with; with the kernel as a fourth
# argument if the watcher asks for it
WatchInput = Callable[..., jax.Array]
# (path of the kernel, output) -> the output to go on with
WatchOutput = Callable[[str, jax.Array], jax.Array]

_INPUTS: contextvars.ContextVar[tuple[WatchInput, bool] | None] = contextvars.ContextVar(
    "slidejax_watch_inputs", default=None
)
_OUTPUTS: contextvars.ContextVar[WatchOutput | None] = contextvars.ContextVar(
    "slidejax_watch_outputs", default=None
)


def show_input(
    path: str, x: jax.Array, axes: Contraction, kernel: jax.Array | None = None
) -> jax.Array:
    """A layer calls this with its input, and goes on with the result.

    Args:
      path: the path of the layer's kernel.
      x: the layer's input.
      axes: how the layer contracts its input with its kernel.
      kernel: the kernel as the layer has it. It tells which of many layers this is, where their
        kernels are one parameter (`nn.scan`, `vmap`). Without it such layers are not calibrated.
    """
    found = _INPUTS.get()
    if found is None:
        return x
    watch, with_kernel = found
    return watch(path, x, axes, kernel) if with_kernel else watch(path, x, axes)


def show_output(path: str, y: jax.Array) -> jax.Array:
    """A layer calls this with its output, and returns the result."""
    watch = _OUTPUTS.get()
    return y if watch is None else watch(path, y)


def watched() -> bool:
    """Whether inputs or outputs are being watched."""
    return _INPUTS.get() is not None or _OUTPUTS.get() is not None


def watching_inputs(
    watch: WatchInput, *, kernels: bool = False
) -> contextlib.AbstractContextManager[None]:
    """A context in which `watch` is called with the input of each layer that shows it.

    Args:
      watch: `(path, x, axes) -> x`, where x is the input to go on with.
      kernels: whether `watch` takes a fourth argument: the layer's kernel, or None if the layer
        does not show it.
    """
    return _set(_INPUTS, (check_function(watch, "watch"), kernels))


def watching_outputs(watch: WatchOutput) -> contextlib.AbstractContextManager[None]:
    """A context in which `watch` is called with the output of each layer that shows it."""
    return _set(_OUTPUTS, check_function(watch, "watch"))


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar, watch: Any) -> Iterator[None]:
    token = variable.set(watch)
    try:
        yield
    finally:
        variable.reset(token)

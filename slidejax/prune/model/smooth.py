"""Smoothing: the parameters are rescaled so that 8-bit rounding of activations costs less.

The model computes the same.

A token is rounded with one scale, so a few strong channels (columns) of a layer's input leave few
codes for all others. SmoothQuant (Xiao et al., arXiv 2211.10438) divides each channel by a factor,
and multiplies the kernel's row by it:

    s[k] = rms(x[:, k])^a / rms(W[k, :])^(1 - a)

The division is folded into the parameters that make the channel. These are read from the model's
program: the scale (and bias) of the norm before the layer, or the columns of a layer whose output
is a factor of the input (the up projection of a gated MLP).

SmoothQuant takes the largest magnitude of a channel. The root mean square serves better here,
because the few tokens that attention collects on decide the largest magnitude.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.contraction import from_matrix, to_matrix
from slidejax.prune.model.ahead import CompileAhead, jitted
from slidejax.prune.model.inputs import as_rows
from slidejax.prune.model.program import Program, Step, Tap, named_leaves
from slidejax.prune.model.stages import Stages

__all__ = ["Fold", "energies", "folds_of", "rescaled", "smooth"]

_SAME_CHANNELS = ("convert_element_type", "copy", "stop_gradient")


@dataclasses.dataclass(frozen=True)
class Fold:
    """Where a factor for the channels of an input can go.

    Attributes:
      vectors: paths of parameters `[in]` that are divided by it: a norm's scale and bias.
      columns: the layer whose outputs are divided by it, or None.
      members: the layers that read the input, whose kernels' rows are multiplied by it.
    """

    vectors: tuple[str, ...] = ()
    columns: Tap | None = None
    members: tuple[Tap, ...] = ()


def smooth(
    stages: Stages,
    params: Any,
    batches: Sequence[Any],
    strength: float = 0.7,
    *,
    ahead: CompileAhead | None = None,
) -> tuple[Any, list[str]]:
    """Rescales channels of layers' inputs where parameters before the layers can take the factors.

    Args:
      stages: the traced model.
      params: its parameters.
      batches: batches to measure the channels on. A few are enough.
      strength: `a` in the formula: how much of a channel's spread goes into the kernel. 0 leaves
        the model as it is.
      ahead: where the stages are being compiled.

    Returns:
      `(params, paths)`: parameters with which the model computes the same, and the paths of the
      kernels whose rows have changed.
    """
    folds = folds_of(stages)
    if not folds or not strength:
        return params, []
    leaves = stages.program.elements(named_leaves(params))
    energy: dict[int, Any] = {}
    states = [stages.start(batch) for batch in batches]
    for at in range(len(stages.taps)):
        energy |= energies(stages, at, states, leaves, ahead)
    new: dict[str, Any] = {}
    changed = ChainMap(new, leaves)  # type: ignore[arg-type]
    for fold in folds:
        new |= rescaled(fold, changed, energy[fold.members[0].value], strength)
    tree = jax.tree.unflatten(jax.tree.structure(params), list(leaves.replaced(new).values()))
    return tree, [tap.path for fold in folds for tap in fold.members]


def folds_of(stages: Stages) -> list[Fold]:
    """The inputs whose channels can be rescaled, in the order of the program."""
    folds = []
    for taps in stages.taps:
        for value in dict.fromkeys(tap.value for tap in taps):
            members = tuple(tap for tap in taps if tap.value == value)
            fold = _find(stages.program, members)
            if fold is not None:
                folds.append(dataclasses.replace(fold, members=members))
    return folds


def energies(
    stages: Stages,
    at: int,
    states: list[dict[int, Any]],
    leaves: Mapping[str, Any],
    ahead: CompileAhead | None = None,
) -> dict[int, jax.Array]:
    """The sum of squares of each channel of each input of one stage, in the original model.

    Args:
      stages: the traced model.
      at: the stage. Stages are run in order.
      states: the values between stages of each batch (`Stages.start`). They are changed in place.
      leaves: the original parameters by path.
      ahead: where the stages are being compiled.

    Returns:
      The number of an input -> float32 `[in]`.
    """
    total: dict[int, Any] = {}
    for i, values in enumerate(states):
        states[i], inputs = stages.advance(at, values, leaves, ahead=ahead)
        for tap in {tap.value: tap for tap in stages.taps[at]}.values():
            before = total.get(tap.value, np.zeros(stages.program.width(tap), np.float32))
            total[tap.value] = _energy(before, inputs[tap.value], tap.axes)
    return total


def rescaled(
    fold: Fold, leaves: Mapping[str, Any], energy: jax.Array, strength: float
) -> dict[str, jax.Array]:
    """The parameters, by path, that change when the channels of an input are divided.

    Args:
      fold: the input.
      leaves: the parameters by path. The folds before have changed them.
      energy: what `energies` measured of the input.
      strength: as in `smooth`.
    """
    made_by = () if fold.columns is None else (fold.columns,)
    readers, makers = [tap.path for tap in fold.members], [tap.path for tap in made_by]
    new = _rescaled(
        [leaves[path] for path in readers],
        [leaves[path] for path in fold.vectors],
        [leaves[path] for path in makers],
        energy,
        np.float32(strength),
        tuple(tap.axes.kernel for tap in fold.members),
        tuple(tap.axes.kernel for tap in made_by),
    )
    return dict(zip((*readers, *fold.vectors, *makers), new, strict=True))


@functools.partial(jitted, static_argnums=(5, 6))
def _rescaled(
    readers, vectors, makers, energy, strength, reader_axes, maker_axes
) -> list[jax.Array]:
    """The parameters around one input after its channels were divided.

    Args:
      readers: kernels that read the input.
      vectors: a norm's parameters that make it.
      makers: kernels that make it.
      energy: `[in]`, the sum of squares of each channel.
      strength: as in `smooth`.
      reader_axes, maker_axes: the axes of each kernel.

    Returns:
      The new readers, vectors and makers, in one list.
    """
    kernels = [to_matrix(leaf, axes) for leaf, axes in zip(readers, reader_axes, strict=True)]
    rows = jnp.max(
        jnp.stack([jnp.mean(k.astype(jnp.float32) ** 2, axis=1) for k in kernels]), axis=0
    )
    measured = (energy > 0) & (rows > 0)  # others keep the factor 1
    log = strength * jnp.log(jnp.where(measured, energy, 1)) - (1 - strength) * jnp.log(
        jnp.where(measured, rows, 1)
    )
    log = jnp.where(measured, log, 0) / 2
    # the factors of the measured channels have the geometric mean 1
    mean = jnp.sum(log) / jnp.maximum(jnp.sum(measured), 1).astype(log.dtype)
    factor = jnp.exp(jnp.where(measured, log - mean, 0))
    new = [
        from_matrix(_wide(k) * factor[:, None], leaf.shape, axes)
        for k, leaf, axes in zip(kernels, readers, reader_axes, strict=True)
    ]
    new += [_wide(vector) / factor for vector in vectors]
    new += [
        from_matrix(_wide(to_matrix(leaf, axes)) / factor[None], leaf.shape, axes)
        for leaf, axes in zip(makers, maker_axes, strict=True)
    ]
    return [
        value.astype(leaf.dtype)
        for value, leaf in zip(new, (*readers, *vectors, *makers), strict=True)
    ]


def _wide(x: jax.Array) -> jax.Array:
    """x in float32, which JAX does not do by itself where users ask for strict promotion."""
    return x.astype(jnp.float32)


@functools.partial(jitted, static_argnums=2)
def _energy(total, x, axes):
    return total + jnp.sum(as_rows(x, axes) ** 2, axis=0)


def _find(program: Program, members: tuple[Tap, ...]) -> Fold | None:
    """Where factors for an input can go, if no other layers read the input."""
    value = members[0].value
    search = _Search(program, value, program.width(members[0]))
    along_channels = all(
        tap.axes.x_in == (len(program.shape(tap.value).shape) - 1,) for tap in members
    )
    if not along_channels or any(step.tap not in members for step in search.users[value]):
        return None
    return search.fold(value)


class _Search:
    """Looks backwards through a program for the parameters that make the channels of a value.

    Args:
      program: the program.
      value: the input of some layers.
      width: its channels.
    """

    def __init__(self, program: Program, value: int, width: int):
        self._program, self._value, self._width = program, value, width
        self._makers = {v: step for step in program.steps for v in step.outputs}
        self.users: dict[int, list[Step]] = {}
        for step in program.steps:
            for v in step.inputs:
                self.users.setdefault(v, []).append(step)

    def fold(self, v: int) -> Fold | None:
        """Where a factor for the channels of a value can go."""
        step = self._makers.get(v)
        if step is None or (v != self._value and not self._read_once(v)):
            return None
        if step.name in _SAME_CHANNELS:
            return self.fold(step.inputs[0])
        if step.name == "add" and len(step.inputs) == 2:
            return self._of_sum(step.inputs)
        if step.name == "mul" and len(step.inputs) == 2:
            return self._of_product(step.inputs)
        return None

    def _of_sum(self, terms: tuple[int, ...]) -> Fold | None:
        """The sum of a norm's bias and its scaled input: both parameters are divided."""
        for bias, rest in (terms, terms[::-1]):
            path = self._vector(bias)
            below = self.fold(rest) if path is not None else None
            if path is not None and below is not None and below.vectors:
                return Fold((*below.vectors, path))
        return None

    def _of_product(self, factors: tuple[int, ...]) -> Fold | None:
        """A product: one factor is divided. It is a parameter, or the output of a layer."""
        for v in factors:
            path = self._vector(v)
            if path is not None:
                return Fold((path,))
        for v in factors:
            layer = self._columns(v)
            if layer is not None:
                return Fold((), layer)
        for v in factors:
            below = self.fold(v)
            if below is not None:
                return below
        return None

    def _read_once(self, v: int) -> bool:
        return len(self.users[v]) == 1

    def _vector(self, v: int) -> str | None:
        """The path of the parameter `[width]` that a value repeats, if nothing else reads it."""
        makers, program = self._makers, self._program
        while (
            v in makers
            and self._read_once(v)
            and makers[v].name in ("reshape", "broadcast_in_dim", *_SAME_CHANNELS)
        ):
            step = makers[v]
            if (
                step.name == "broadcast_in_dim"
                and step.shape(0)[-1:] == (self._width,)
                and step.eqn.params["broadcast_dimensions"][-1] != len(step.eqn.params["shape"]) - 1
            ):
                return None
            v = step.inputs[0]
        path = program.parameter(v)
        whole = self._read_once(v) and program.shape(v).shape == (self._width,)
        return path if path is not None and whole else None

    def _columns(self, v: int) -> Tap | None:
        """The layer without a bias that makes a value, if nothing else reads the value."""
        makers, program = self._makers, self._program
        while v in makers and self._read_once(v) and makers[v].name in _SAME_CHANNELS:
            v = makers[v].inputs[0]
        step = makers.get(v)
        if step is None or step.name != "dot_general" or not self._read_once(v):
            return None
        taps = [tap for u in step.inputs if u in makers and (tap := makers[u].tap) is not None]
        if len(taps) != 1:
            return None
        tap, kernel = taps[0], program.leaf[taps[0].path]
        if kernel not in step.inputs or not self._read_once(kernel):
            return None
        if len(tap.axes.kernel_out) != 1 or tap.axes.result is not None:
            return None
        columns = program.shape(kernel).shape[tap.axes.kernel_out[0]]
        return tap if columns == self._width else None

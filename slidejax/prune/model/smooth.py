"""Smoothing: the model's parameters are rescaled so that 8-bit rounding of activations costs less; what it computes stays.

A token is rounded with one scale, so a few strong channels (columns) of a layer's input leave few codes for all others.
SmoothQuant (Xiao et al., arXiv 2211.10438) divides each channel by a factor, folded into what makes the channel, and
multiplies the kernel's row by it:

    s[k] = rms(x[:, k])^a / rms(W[k, :])^(1 - a)

The root mean square serves better here than SmoothQuant's largest magnitude, which the few tokens decide that attention
collects on. Where the factor can go is read from the model's program: into the scale (and bias) of the norm before, or
into the columns of the layer whose output is a factor of the input (the up projection of a gated MLP).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.contraction import from_matrix, to_matrix
from slidejax.prune.model.ahead import Ahead, jitted
from slidejax.prune.model.inputs import as_rows
from slidejax.prune.model.stages import Stages, Step, Tap, named_leaves

__all__ = ["smooth"]

_SAME_CHANNELS = ("convert_element_type", "copy", "stop_gradient")


@dataclasses.dataclass(frozen=True)
class _Fold:
    """Where a factor for the channels of an input can go.

    Attributes:
      vectors: paths of parameters `[in]` to divide: a norm's scale and bias.
      columns: the layer whose outputs to divide, or None.
    """

    vectors: tuple[str, ...] = ()
    columns: Tap | None = None


def smooth(
    stages: Stages,
    params: Any,
    batches: Sequence[Any],
    strength: float = 0.7,
    *,
    ahead: Ahead | None = None,
) -> tuple[Any, list[str]]:
    """Rescales the channels of the layers' inputs, where the factors can be folded into parameters before them.

    Args:
      stages: the traced model.
      params: its parameters.
      batches: what to measure the channels on; a few will do.
      strength: `a` above: how much of the spread of a channel goes into the kernel; 0 leaves the model as it is.
      ahead: compiles the stages already.

    Returns:
      `(params, paths)`: parameters with which the model computes the same, and the paths of the kernels that have new
      rows.
    """
    folds: list[tuple[list[Tap], _Fold]] = []
    for taps in stages.taps:
        for value in dict.fromkeys(tap.value for tap in taps):
            members = [tap for tap in taps if tap.value == value]
            fold = _find(stages, members)
            if fold is not None:
                folds.append((members, fold))
    if not folds or not strength:
        return params, []
    leaves = named_leaves(params)
    energy = _energies(stages, leaves, batches, ahead)
    for members, fold in folds:
        made_by = () if fold.columns is None else (fold.columns,)
        new = _rescaled(
            [leaves[tap.path] for tap in members], [leaves[path] for path in fold.vectors], [leaves[tap.path] for tap in made_by],
            energy[members[0].value], np.float32(strength), tuple(tap.axes.kernel for tap in members), tuple(tap.axes.kernel for tap in made_by),
        )  # fmt: skip
        leaves |= zip(
            (*(tap.path for tap in members), *fold.vectors, *(tap.path for tap in made_by)),
            new,
            strict=True,
        )
    tree = jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))
    return tree, [tap.path for members, _ in folds for tap in members]


@functools.partial(jitted, static_argnums=(5, 6))
def _rescaled(
    readers, vectors, makers, energy, strength, reader_axes, maker_axes
) -> list[jax.Array]:
    """The parameters around one input, its channels divided: kernels that read it, a norm's vectors, kernels that make it.

    Args:
      readers, vectors, makers: the parameters.
      energy: `[in]`, of the input.
      strength: as in `smooth`.
      reader_axes, maker_axes: of each kernel.
    """
    kernels = [to_matrix(leaf, axes) for leaf, axes in zip(readers, reader_axes, strict=True)]
    rows = jnp.max(
        jnp.stack([jnp.mean(k.astype(jnp.float32) ** 2, axis=1) for k in kernels]), axis=0
    )
    heard = (energy > 0) & (
        rows > 0
    )  # a channel or a row that is silent keeps the factor 1; their geometric mean is 1
    log = (
        jnp.where(
            heard,
            strength * jnp.log(jnp.where(heard, energy, 1))
            - (1 - strength) * jnp.log(jnp.where(heard, rows, 1)),
            0,
        )
        / 2
    )
    factor = jnp.exp(jnp.where(heard, log - jnp.sum(log) / jnp.maximum(jnp.sum(heard), 1), 0))
    new = [
        from_matrix(k * factor[:, None], leaf.shape, axes)
        for k, leaf, axes in zip(kernels, readers, reader_axes, strict=True)
    ]
    new += [vector / factor for vector in vectors]
    new += [
        from_matrix(to_matrix(leaf, axes) / factor, leaf.shape, axes)
        for leaf, axes in zip(makers, maker_axes, strict=True)
    ]
    return [
        value.astype(leaf.dtype)
        for value, leaf in zip(new, (*readers, *vectors, *makers), strict=True)
    ]


def _energies(
    stages: Stages, leaves: Mapping[str, Any], batches: Sequence[Any], ahead: Ahead | None
) -> dict[int, jax.Array]:
    """The sum of squares of each channel of each input."""
    total: dict[int, Any] = {}
    for batch in batches:
        values = stages.start(batch)
        for at, taps in enumerate(stages.taps):
            values, inputs = stages.advance(at, values, leaves, ahead=ahead)
            for tap in {tap.value: tap for tap in taps}.values():
                before = total.get(tap.value, np.zeros(stages.width(tap), np.float32))
                total[tap.value] = _energy(before, inputs[tap.value], tap.axes)
    return total


@functools.partial(jitted, static_argnums=2)
def _energy(total, x, axes):
    return total + jnp.sum(as_rows(x, axes) ** 2, axis=0)


def _find(stages: Stages, members: list[Tap]) -> _Fold | None:
    """The parameters that make the channels of an input, if nobody but these layers sees them."""
    value, width = members[0].value, stages.width(members[0])
    makers = {v: step for step in stages.steps for v in step.outputs}
    users: dict[int, list[Step]] = {}
    for step in stages.steps:
        for v in step.inputs:
            users.setdefault(v, []).append(step)
    if any(step.tap not in members for step in users[value]) or any(
        tap.axes.x_in != (len(stages.shape(tap.value).shape) - 1,) for tap in members
    ):
        return None

    def alone(v: int) -> bool:
        return len(users[v]) == 1

    def vector(v: int) -> str | None:
        """The parameter `[width]` that a value repeats along its other axes, if it is used nowhere else."""
        while (
            v in makers
            and alone(v)
            and (makers[v].name in ("reshape", "broadcast_in_dim", *_SAME_CHANNELS))
        ):
            step = makers[v]
            if (
                step.name == "broadcast_in_dim"
                and step.shape(0)[-1:] == (width,)
                and step.eqn.params["broadcast_dimensions"][-1] != len(step.eqn.params["shape"]) - 1
            ):
                return None
            v = step.inputs[0]
        path = stages.parameter(v)
        return path if path is not None and alone(v) and stages.shape(v).shape == (width,) else None

    def columns(v: int) -> Tap | None:
        """The layer without a bias whose output a value is, if that is used nowhere else."""
        while v in makers and alone(v) and makers[v].name in _SAME_CHANNELS:
            v = makers[v].inputs[0]
        step = makers.get(v)
        if step is None or step.name != "dot_general" or not alone(v):
            return None
        taps = [makers[u].tap for u in step.inputs if u in makers and makers[u].tap is not None]
        if (
            len(taps) != 1
            or taps[0] is None
            or stages.leaf[taps[0].path] not in step.inputs
            or not alone(stages.leaf[taps[0].path])
        ):
            return None
        simple = len(taps[0].axes.kernel_out) == 1 and taps[0].axes.result is None
        return (
            taps[0]
            if simple
            and stages.shape(stages.leaf[taps[0].path]).shape[taps[0].axes.kernel_out[0]] == width
            else None
        )

    def search(v: int) -> _Fold | None:
        step = makers.get(v)
        if step is None or (v != value and not alone(v)):
            return None
        if step.name in _SAME_CHANNELS:
            return search(step.inputs[0])
        if step.name == "add" and len(step.inputs) == 2:  # a norm's bias is divided as its scale is
            for bias, rest in (step.inputs, step.inputs[::-1]):
                path = vector(bias)
                below = search(rest) if path is not None else None
                if path is not None and below is not None and below.vectors:
                    return _Fold((*below.vectors, path))
        if step.name == "mul" and len(step.inputs) == 2:
            for u in step.inputs:
                path = vector(u)
                if path is not None:
                    return _Fold((path,))
            for u in step.inputs:
                layer = columns(u)
                if layer is not None:
                    return _Fold((), layer)
            for u in step.inputs:
                below = search(u)
                if below is not None:
                    return below
        return None

    return search(value)

"""Pruning a whole model in the order of its program, each layer with the inputs that the pruned layers before it give.

For a layer with kernel `W`, input `X` in the dense model and `Z` in the model pruned so far (with its rounding to 8 bit),
the new kernel `W'` is to give what the dense layer gave, from inputs that are no longer those of the dense model:
`min || X W - Z W' ||^2` over kernels of the pattern (the asymmetry that GPTAQ, arXiv 2504.02692, corrects). Without the
pattern the optimum is `T = (Z^T Z)^-1 Z^T X W`, and up to a constant the objective is `|| Z (T - W') ||^2`: so a method
for one kernel is given the target `T` in place of `W`, and the Gram matrix `Z^T Z`.

A layer whose result is added to a stream (the residual stream of a transformer) can make up for what earlier layers lost
there, too. With the stream `R` in the dense and `S` in the pruned model: `min || (R + X W) - (S + Z W') ||^2`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.contraction import from_matrix, to_matrix
from slidejax.prune.model.ahead import Ahead, jitted, shapes_of
from slidejax.prune.model.inputs import as_rows, rounded
from slidejax.prune.model.stages import Stages, Tap, named_leaves
from slidejax.prune.model.store import Store
from slidejax.prune.sparsegpt import damped

__all__ = ["Pruned", "Solve", "begin", "prune_in_order"]

_EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pruned:
    """What a method makes of one kernel.

    Attributes:
      mask: bool `[in, out]`.
      kernel: float32 `[in, out]`, zero where not kept.
      scale: float32 `[out]`: 8-bit values are `kernel / scale`; None: they are yet to be rounded.
    """

    mask: jax.Array
    kernel: jax.Array
    scale: jax.Array | None = None


# (kernel [in, out], target [in, out], gram [in, in], damping) -> Pruned; traced, once for each shape
Solve = Callable[[jax.Array, jax.Array, jax.Array, Any], Pruned]


@dataclasses.dataclass(frozen=True)
class _Group:
    """Layers with the same input that are pruned together, as one kernel.

    Attributes:
      taps: of the layers.
      streams: for each layer the stream whose losses it makes up for, or None.
      correct: whether layers make up for anything.
      moments: `(moments, x, z, kernels, lost) -> moments`, to which one batch is added.
      solved: `(kernels, moments, correct, damping) -> (finite, [Pruned])`.
    """

    taps: tuple[Tap, ...]
    streams: tuple[int | None, ...]
    correct: bool
    moments: Callable[..., Any]
    solved: Callable[..., Any]

    @property
    def value(self) -> int:
        """Their input."""
        return self.taps[0].value

    def kernels(self, leaves: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        """Their kernels, `[in, out]` each."""
        return tuple(
            to_matrix(jnp.asarray(leaves[tap.path]), tap.axes.kernel).astype(jnp.float32)
            for tap in self.taps
        )


def prune_in_order(
    stages: Stages,
    params: Any,
    batches: Sequence[Any],
    solver: Callable[[str], Solve],
    *,
    correct: float = 0.75,
    damping: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
    store: Store | None = None,
    offload: bool = False,
    ahead: Ahead,
) -> dict[str, Pruned]:
    """Prunes the layers that `stages` has taps for.

    Args:
      stages: the traced model.
      params: the dense parameters.
      batches: what to calibrate on; the values between stages are kept for each, twice.
      solver: path of a kernel -> the method for it. Layers with the same input for which it is the same object are pruned
        together, as one kernel.
      correct: how far the target goes from the kernel (0) to what makes up for all that earlier layers lost, as far as
        can be told from these inputs (1). Some of that is chance, so that less than all does better on other text.
      damping: as in `sparsegpt`.
      progress: called with the numbers of stages done and of all.
      store: keeps finished stages on disk; those that it has are not computed again.
      offload: keeps the values between stages in the host's memory.
      ahead: where `begin` has begun to compile.

    Returns:
      Path of the kernel -> `Pruned`, NumPy arrays: on the device are new kernels only while they are read.

    Raises:
      ValueError: if the inputs of a layer are not finite.
    """
    leaves = named_leaves(params)
    new: dict[
        str, Any
    ] = {}  # the new kernels that are yet to be read, mostly those of the stage before
    keep = jax.device_get if offload else lambda values: values
    states = [(stages.start(batch), stages.start(batch)) for batch in batches]
    done: dict[str, Pruned] = {}
    for at, taps in enumerate(stages.taps):
        groups = _groups(stages, taps, solver, bool(correct))
        found = None if store is None else store.load(at)
        sums = [_nothing(stages, group, leaves) for group in groups]
        for i, (dense, pruned) in enumerate(states):
            xs: dict[int, Any] = {}
            if correct:
                dense, xs = stages.advance(at, dense, leaves, ahead=ahead)
            pruned, zs = stages.advance(
                at, pruned, {**leaves, **new}, round_inputs=True, ahead=ahead
            )
            states[i] = keep((dense, pruned))
            for g, group in enumerate(groups if found is None else ()):
                lost = tuple(None if v is None else (dense[v], pruned[v]) for v in group.streams)
                x, z = xs.get(group.value), zs[group.value]
                sums[g] = ahead.call(group.moments, sums[g], x, z, group.kernels(leaves), lost)
        if found is None:
            found = {}
            for group, moments in zip(groups, sums, strict=True):
                finite, results = ahead.call(
                    group.solved,
                    group.kernels(leaves),
                    moments,
                    np.float32(correct),
                    np.float32(damping),
                )
                if not finite:
                    raise ValueError(
                        f"{group.taps[0].path}: the calibration inputs hold inf or nan"
                    )
                found |= zip((tap.path for tap in group.taps), results, strict=True)
            if store is not None:
                store.save(at, found)
        new |= {tap.path: _leaf(found[tap.path].kernel, leaves[tap.path], tap) for tap in taps}
        new = {path: leaf for path, leaf in new.items() if stages.reads_after(at, path)}
        done |= jax.device_get(found)
        if progress is not None:
            progress(at + 1, len(stages.taps))
    return done


def _leaf(kernel: jax.Array, leaf: Any, tap: Tap) -> jax.Array:
    return from_matrix(jnp.asarray(kernel), leaf.shape, tap.axes.kernel).astype(leaf.dtype)


def begin(
    ahead: Ahead,
    stages: Stages,
    params: Any,
    solver: Callable[[str], Solve],
    *,
    correct: bool,
    store: Store | None = None,
) -> None:
    """Begins to compile what `prune_in_order` will run; arguments as there."""
    leaves = named_leaves(params)
    if correct:
        stages.begin(ahead)
    for at, taps in enumerate(stages.taps):
        for group in (
            _groups(stages, taps, solver, correct) if store is None or not store.has(at) else ()
        ):
            kernels = jax.eval_shape(
                group.kernels, shapes_of({tap.path: leaves[tap.path] for tap in group.taps})
            )
            sums, x = shapes_of(_nothing(stages, group, leaves)), stages.shape(group.value)
            lost = tuple(None if v is None else (stages.shape(v),) * 2 for v in group.streams)
            ahead.begin(group.solved, kernels, sums, *shapes_of((np.float32(0), np.float32(0))))
            ahead.begin(group.moments, sums, x if correct else None, x, kernels, lost)
    stages.begin(ahead, round_inputs=True)


def _groups(
    stages: Stages, taps: Sequence[Tap], solver: Callable[[str], Solve], correct: bool
) -> list[_Group]:
    """The groups of a stage; equal ones share their jitted functions, so that they share what is compiled."""
    found: dict[Any, list[Tap]] = {}
    for tap in taps:
        found.setdefault((tap.value, tap.axes.x_in, solver(tap.path)), []).append(tap)
    groups = []
    for (_, _, solve), members in found.items():
        streams = tuple(stages.streams[tap.path] if correct else None for tap in members)
        first = members[0]
        groups.append(
            _Group(
                tuple(members),
                streams,
                correct,
                _moments_of(first.axes, stages.qdtypes[first.path]),
                _solved_by(solve),
            )
        )
    return groups


# --- moments ----------------------------------------------------------------------------------------------------------


def _nothing(stages: Stages, group: _Group, leaves: Mapping[str, Any]) -> Any:
    """The moments of no batch: `(Z^T Z, Z^T X, [Z^T Y])`, None where it is not needed.

    `Y` are the outputs of the layers that make up for what the stream lost; for all others `Z^T X` is enough, and less.
    """
    width = stages.width(group.taps[0])
    square = np.zeros((width, width), np.float32)
    outs = [leaves[tap.path].size // width for tap in group.taps]
    wanted = [
        None if v is None else np.zeros((width, out), np.float32)
        for v, out in zip(group.streams, outs, strict=True)
    ]
    return square, square if group.correct and None in group.streams else None, wanted


@functools.cache
def _moments_of(axes, dtype) -> Callable[..., Any]:
    """`_Group.moments` for an input that layers contract as `axes` say and round to `dtype`."""

    def moments(sums, x, z, kernels, lost):
        z = as_rows(
            rounded(z, axes, dtype) if dtype is not None and dtype.itemsize == 1 else z, axes
        )
        dot = functools.partial(jnp.matmul, precision=_EXACT)
        gram, cross, wanted = sums
        gram = gram + dot(z.T, z)
        if x is None:
            return gram, None, wanted
        x = as_rows(x, axes)
        added = []
        for total, kernel, pair in zip(wanted, kernels, lost, strict=True):
            if pair is not None:
                dense, pruned = (
                    stream.reshape(len(x), kernel.shape[1]).astype(jnp.float32) for stream in pair
                )
                total = total + dot(z.T, dot(x, kernel) + dense - pruned)
            added.append(total)
        return gram, None if cross is None else cross + dot(z.T, x), added

    return jitted(moments, donate_argnums=0)


# --- solving ----------------------------------------------------------------------------------------------------------


@functools.cache
def _solved_by(solve: Solve) -> Callable[..., Any]:
    """`_Group.solved` for a method."""

    def solved(kernels, moments, correct, damping):
        gram, cross, wanted = moments
        kernel = jnp.concatenate(kernels, axis=1)
        target = kernel
        if cross is not None or any(w is not None for w in wanted):
            parts = [
                jnp.matmul(cross, k, precision=_EXACT) if w is None else w
                for k, w in zip(kernels, wanted, strict=True)
            ]
            target = kernel + correct * (
                _target(gram, jnp.concatenate(parts, axis=1), kernel, damping) - kernel
            )
        result = solve(kernel, target, gram, damping)
        ends = np.cumsum([k.shape[1] for k in kernels])
        parts = [
            jax.tree.map(lambda leaf, end=end, k=k: leaf[..., end - k.shape[1] : end], result)
            for end, k in zip(ends, kernels, strict=True)
        ]
        return jnp.isfinite(gram).all() & jnp.isfinite(target).all(), parts

    return jitted(solved)


def _target(gram, wanted, kernel, damping):
    """The least-squares kernel without the pattern; damping pulls it to the dense kernel."""
    full = damped(gram, damping)
    ridge = (jnp.diagonal(full) - jnp.diagonal(gram))[:, None]
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(full), wanted + ridge * kernel)

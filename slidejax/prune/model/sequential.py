"""Pruning a whole model in the order of its program.

Each layer is pruned with the inputs that the pruned layers before it give.

A layer with kernel `W` has the input `X` in the original model, and `Z` in the model that is pruned
so far (with its rounding to 8 bit). The new kernel `W'` should give from `Z` what the original
layer gives from `X`: `min || X W - Z W' ||^2` over kernels of the pattern. GPTAQ (arXiv 2504.02692)
corrects the same asymmetry. Without the pattern the optimum is `T = (Z^T Z)^-1 Z^T X W`, and up to
a constant the objective is `|| Z (T - W') ||^2`. So a method for one kernel gets the target `T` in
place of `W`, and the Gram matrix `Z^T Z`.

A layer whose result is added to a stream (the residual stream of a transformer) can also make up
for what earlier layers lost in the stream. With the stream `R` in the original and `S` in the
pruned model: `min || (R + X W) - (S + Z W') ||^2`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.contraction import from_matrix, to_matrix
from slidejax.prune.model.ahead import CompileAhead, jitted, shapes_of
from slidejax.prune.model.inputs import as_rows, rounded
from slidejax.prune.model.methods import Solve
from slidejax.prune.model.program import Tap, named_leaves
from slidejax.prune.model.result import Pruned
from slidejax.prune.model.solving import solved_by
from slidejax.prune.model.stacked import joined
from slidejax.prune.model.stages import Stages
from slidejax.prune.model.store import Store
from slidejax.prune.sparsegpt import EXACT
from slidejax.weights.numerics import unit

__all__ = ["InOrder"]

# The values between stages, by number: of the original model, and of the model as it is pruned.
State = tuple[dict[int, Any], dict[int, Any]]


@dataclasses.dataclass(frozen=True)
class _LayerGroup:
    """Layers with the same input that are pruned together, as one kernel.

    Attributes:
      taps: the layers' inputs.
      streams: for each layer the stream whose losses it makes up for, or None.
      correct: whether layers make up for earlier losses.
      moments: `(moments, x, z, kernels, lost) -> moments`, with one batch added.
      solved: `(kernels, moments, correct, damping) -> (finite, [Pruned])`.
    """

    taps: tuple[Tap, ...]
    streams: tuple[int | None, ...]
    correct: bool
    moments: Callable[..., Any]
    solved: Callable[..., Any]

    @property
    def value(self) -> int:
        """The value that they read."""
        return self.taps[0].value

    def kernels(self, leaves: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        """Their kernels, `[in, out]` each."""
        return tuple(
            to_matrix(jnp.asarray(leaves[tap.path]), tap.axes.kernel).astype(jnp.float32)
            for tap in self.taps
        )


class InOrder:
    """Prunes the layers of a traced model, in the order of its program.

    Args:
      stages: the traced model. The layers that it has taps for are pruned.
      solver: path of a parameter -> the method for its kernels. Layers with the same input for
        which it is the same object are pruned together, as one kernel.
      correct: how far the target goes from the kernel (0) to the one that makes up for all that
        earlier layers lost, as far as these inputs tell (1). Some of what they tell is chance, so
        less than 1 does better on other text.
      damping: as in `slidejax.prune.sparsegpt`.
      store: keeps finished stages on disk. The stages that it holds are not computed again.
      offload: keeps the values between stages in the host's memory.
      ahead: where `begin` begins to compile.
    """

    def __init__(
        self,
        stages: Stages,
        solver: Callable[[str], Solve],
        *,
        correct: float,
        damping: float,
        store: Store | None = None,
        offload: bool = False,
        ahead: CompileAhead,
    ):
        self._stages, self._ahead, self._store = stages, ahead, store
        self._correct, self._damping = correct, damping
        self._keep = jax.device_get if offload else lambda values: values
        self._groups = [_groups(stages, taps, solver, bool(correct)) for taps in stages.taps]

    def begin(self, params: Any) -> None:
        """Begins to compile what a call will run for parameters of these shapes."""
        stages, leaves = self._stages, self._stages.program.elements(named_leaves(params))
        if self._correct:
            stages.begin(self._ahead)
        for at, groups in enumerate(self._groups):
            if self._store is None or not self._store.has(at):
                for group in groups:
                    self._begin_group(group, leaves)
        stages.begin(self._ahead, round_inputs=True)

    def _begin_group(self, group: _LayerGroup, leaves: Mapping[str, Any]) -> None:
        stages = self._stages
        kernels = jax.eval_shape(
            group.kernels, shapes_of({tap.path: leaves[tap.path] for tap in group.taps})
        )
        sums, x = shapes_of(_zero_moments(stages, group, leaves)), stages.program.shape(group.value)
        lost = tuple(None if v is None else (stages.program.shape(v),) * 2 for v in group.streams)
        numbers = shapes_of((np.float32(0), np.float32(0)))
        self._ahead.begin(group.solved, kernels, sums, *numbers)
        self._ahead.begin(group.moments, sums, x if self._correct else None, x, kernels, lost)

    def __call__(
        self,
        params: Any,
        batches: Sequence[Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Pruned]:
        """Prunes the model.

        Args:
          params: the original parameters.
          batches: the batches to calibrate on. The values between stages are kept for each batch,
            of the original and of the pruned model.
          progress: called with the number of stages that are done, and of all.

        Returns:
          Path of the kernel -> `Pruned`, as NumPy arrays: the device holds new kernels only until
          the program has read them. A parameter that holds several kernels has one result, stacked
          as they are.

        Raises:
          ValueError: if the inputs of a layer are not finite.
        """
        program = self._stages.program
        leaves = program.elements(named_leaves(params))
        new: dict[str, Any] = {}
        done: dict[str, Pruned] = {}
        states = self.start(batches)
        for at in range(len(self._stages.taps)):
            done |= jax.device_get(self.stage(at, leaves, new, states))
            if progress is not None:
                progress(at + 1, len(self._stages.taps))
        return joined(done, program.stacks)

    def start(self, batches: Sequence[Any]) -> list[State]:
        """The state of each batch before stage 0: of the original model, and of the pruned one."""
        return [(self._stages.start(batch), self._stages.start(batch)) for batch in batches]

    def stage(
        self, at: int, leaves: Mapping[str, Any], new: dict[str, Any], states: list[State]
    ) -> dict[str, Pruned]:
        """Prunes the layers of one stage. Stages are pruned in order.

        Args:
          at: the stage.
          leaves: the original parameters by path. Only those that the stage needs are asked for.
          new: the new kernels that this stage and later ones read. It is changed in place.
          states: what `start` gave and the stages before changed; changed in place.

        Returns:
          Path of the kernel -> `Pruned`.

        Raises:
          ValueError: if the inputs of a layer are not finite.
        """
        taps = self._stages.taps[at]
        found = None if self._store is None else self._store.load(at)
        groups = self._groups[at] if found is None else []
        sums = [_zero_moments(self._stages, group, leaves) for group in groups]
        for i, state in enumerate(states):
            states[i] = self._add_batch(at, state, leaves, new, groups, sums)
        if found is None:
            found = self._solve(groups, sums, leaves)
            if self._store is not None:
                self._store.save(at, found)
        new |= {tap.path: _leaf(found[tap.path].kernel, leaves[tap.path], tap) for tap in taps}
        for path in [path for path in new if not self._stages.reads_after(at, path)]:
            del new[path]
        return found

    def _add_batch(
        self,
        at: int,
        state: State,
        leaves: Mapping[str, Any],
        new: dict[str, Any],
        groups: Sequence[_LayerGroup],
        sums: list[Any],
    ) -> State:
        """Runs a stage on one batch, and adds the batch to the moments of its layers, in place.

        Args:
          at: the stage.
          state: the values between stages, of the original and of the pruned model.
          leaves: the original parameters by path.
          new: the new kernels by path.
          groups: the layers to add to; empty if the stage is finished already.
          sums: their moments.

        Returns:
          The state after this stage.
        """
        original, pruned = state
        xs: dict[int, Any] = {}
        if self._correct:
            original, xs = self._stages.advance(at, original, leaves, ahead=self._ahead)
        changed = ChainMap(new, leaves)  # type: ignore[arg-type]
        pruned, zs = self._stages.advance(at, pruned, changed, round_inputs=True, ahead=self._ahead)
        for g, group in enumerate(groups):
            lost = tuple(None if v is None else (original[v], pruned[v]) for v in group.streams)
            x, z = xs.get(group.value), zs[group.value]
            sums[g] = self._ahead.call(group.moments, sums[g], x, z, group.kernels(leaves), lost)
        return self._keep((original, pruned))

    def _solve(
        self, groups: Sequence[_LayerGroup], sums: Sequence[Any], leaves: Mapping[str, Any]
    ) -> dict[str, Pruned]:
        """The pruned kernels of a stage by path."""
        found: dict[str, Pruned] = {}
        for group, moments in zip(groups, sums, strict=True):
            finite, results = self._ahead.call(
                group.solved,
                group.kernels(leaves),
                moments,
                np.float32(self._correct),
                np.float32(self._damping),
            )
            inputs, solution = finite
            if not inputs:
                raise ValueError(
                    f"{group.taps[0].path}: the calibration inputs or the kernel hold inf or nan"
                )
            if not solution:
                raise ValueError(
                    f"{group.taps[0].path}: damping {self._damping:g} is too small for these "
                    "calibration inputs, whose Gram matrix cannot be factorised; or the kernel's "
                    "products with them overflow float32"
                )
            found |= zip((tap.path for tap in group.taps), results, strict=True)
        return found


def _leaf(kernel: jax.Array, leaf: Any, tap: Tap) -> jax.Array:
    return from_matrix(jnp.asarray(kernel), leaf.shape, tap.axes.kernel).astype(leaf.dtype)


def _groups(
    stages: Stages, taps: Sequence[Tap], solver: Callable[[str], Solve], correct: bool
) -> list[_LayerGroup]:
    """The groups of a stage.

    Equal groups share their jitted functions, and so what is compiled for them.
    """
    found: dict[Any, list[Tap]] = {}
    for tap in taps:
        found.setdefault((tap.value, tap.axes.x_in, solver(tap.parameter)), []).append(tap)
    groups = []
    for (_, _, solve), members in found.items():
        streams = tuple(stages.streams[tap.path] if correct else None for tap in members)
        first = members[0]
        outputs = sum(stages.outputs(tap) for tap in members)
        groups.append(
            _LayerGroup(
                tuple(members),
                streams,
                correct,
                _moments_of(first.axes, stages.qdtypes[first.path]),
                solved_by(solve, outputs),
            )
        )
    return groups


# --- moments --------------------------------------------------------------------------------------


def _zero_moments(stages: Stages, group: _LayerGroup, leaves: Mapping[str, Any]) -> Any:
    """The moments `(Z^T Z, Z^T X, [Z^T Y])` before the first batch; None where one is not needed.

    After them comes the factor of X, Y and Z, once the first batch has been seen, so that squares
    neither overflow nor vanish. It is a power of four, which changes no digit. `Y` is the output
    that a layer should give to make up for the losses of its stream. All other layers need only
    `Z^T X`, which is smaller.
    """
    width = stages.program.width(group.taps[0])
    square = np.zeros((width, width), np.float32)
    outs = [leaves[tap.path].size // width for tap in group.taps]
    wanted = [
        None if v is None else np.zeros((width, out), np.float32)
        for v, out in zip(group.streams, outs, strict=True)
    ]
    cross = square if group.correct and None in group.streams else None
    return square, cross, wanted, np.float32(0)


@functools.cache
def _moments_of(axes, dtype) -> Callable[..., Any]:
    """`_LayerGroup.moments` for layers that contract by `axes` and round inputs to `dtype`."""

    def moments(sums, x, z, kernels, lost):
        z = as_rows(
            rounded(z, axes, dtype) if dtype is not None and dtype.itemsize == 1 else z, axes
        )
        dot = functools.partial(jnp.matmul, precision=EXACT)
        gram, cross, wanted, size = sums
        size = jnp.where(size > 0, size, unit(z.reshape(-1, 1))[0, 0])
        z = z * size
        gram = gram + dot(z.T, z)
        if x is None:
            return gram, None, wanted, size
        x = as_rows(x, axes) * size
        added = []
        for total, kernel, pair in zip(wanted, kernels, lost, strict=True):
            if pair is not None:
                original, pruned = (
                    stream.reshape(len(x), kernel.shape[1]).astype(jnp.float32) for stream in pair
                )
                total = total + dot(z.T, dot(x, kernel) + original * size - pruned * size)
            added.append(total)
        return gram, None if cross is None else cross + dot(z.T, x), added, size

    return jitted(moments, donate_argnums=0)

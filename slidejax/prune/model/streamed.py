"""Pruning a model whose parameters are read when needed, and given away when they are done.

`Stages` knows which stage reads a parameter first and last. So a model is pruned in order
(`slidejax.prune.model.sequential`) with the parameters of a few stages in memory, and with the
same arithmetic: the results are those of a model that is wholly in memory, bit for bit.

Smoothing (`slidejax.prune.model.smooth`) measures the original model ahead of pruning, and changes
parameters of several stages. The stages that one fold touches make a *unit*: a transformer's gate,
up and down are one. The batches that channels are measured on run through a unit first, then its
parameters are rescaled, then its layers are pruned.
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from slidejax.prune.model.ahead import CompileAhead
from slidejax.prune.model.result import Pruned
from slidejax.prune.model.sequential import InOrder
from slidejax.prune.model.smooth import Fold, energies, folds_of, rescaled
from slidejax.prune.model.stages import Stages

__all__ = ["Memory", "Reading", "memory", "prune_streamed", "units"]


class Reading(Mapping[str, Any]):
    """Parameters by path. One is read when it is asked for, and held until it is dropped.

    Args:
      paths: all paths.
      read: reads one parameter.
    """

    def __init__(self, paths: Sequence[str], read: Callable[[str], Any]):
        self._paths, self._read = dict.fromkeys(paths), read
        self.held: dict[str, Any] = {}

    def __getitem__(self, path: str) -> Any:
        if path not in self.held:
            if path not in self._paths:
                raise KeyError(path)
            self.held[path] = self._read(path)
        return self.held[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def units(stages: Stages, folds: Sequence[Fold]) -> list[range]:
    """The stages in groups such that no fold touches two of them.

    Each is a range of stages; together they are all stages in order.
    """
    stage = {tap.path: at for at, taps in enumerate(stages.taps) for tap in taps}
    first = list(range(len(stages.taps)))  # stage -> the first stage of its unit
    for fold in folds:
        touched = [stage[tap.path] for tap in (*fold.members, *filter(None, [fold.columns]))]
        low = min(first[at] for at in touched)
        for at in range(low, max(touched) + 1):
            first[at] = low
    starts = [at for at in range(len(first)) if first[at] == at]
    return [range(a, b) for a, b in itertools.pairwise([*starts, len(first)])]


def prune_streamed(
    stages: Stages,
    pruning: InOrder,
    leaves: Reading,
    batches: Sequence[Any],
    *,
    measured: Sequence[Any],
    strength: float,
    kernel_done: Callable[[str, Pruned], None],
    other_done: Callable[[str, Any], None],
    ahead: CompileAhead | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Prunes the layers of a traced model in order, and gives each parameter away when it is done.

    Args:
      stages: the traced model.
      pruning: prunes its stages.
      leaves: the original parameters.
      batches: the batches to calibrate on.
      measured: the batches that smoothing measures channels on.
      strength: the strength of smoothing. 0 leaves the parameters as they are.
      kernel_done: called once with each pruned kernel and its path, as soon as it is pruned.
      other_done: called once with the path and the value of each other parameter that the stages
        read or smoothing changes, after its last use.
      ahead: where the stages are being compiled.
      progress: called with the number of stages that are done, and of all.

    Returns:
      The number of layers whose inputs were smoothed.

    Raises:
      ValueError: if the inputs of a layer are not finite.
    """
    folds = folds_of(stages) if strength else []
    own_stage = {tap.path: at for at, taps in enumerate(stages.taps) for tap in taps}
    smoothed: dict[str, Any] = {}
    current = ChainMap(smoothed, leaves)  # type: ignore[arg-type]
    originals = [stages.start(batch) for batch in measured] if folds else []
    states, new = pruning.start(batches), {}  # type: ignore[var-annotated]
    for unit in units(stages, folds):
        inside = [fold for fold in folds if own_stage[fold.members[0].path] in unit]
        energy: dict[int, Any] = {}
        for at in unit if folds else ():
            energy |= energies(stages, at, originals, leaves, ahead)
        for fold in inside:
            smoothed |= rescaled(fold, current, energy[fold.members[0].value], strength)
        del energy
        for at in unit:
            found = pruning.stage(at, current, new, states)
            for path, pruned in found.items():
                kernel_done(path, pruned)
            del found
            for path in dict.fromkeys((*leaves.held, *smoothed)):  # in one order in every run
                # A kernel is also needed for the moments of its own stage.
                ahead_of_us = own_stage.get(path, -1) > at or stages.reads_after(at, path)
                if path in smoothed and not stages.reads_after(unit[-1], path):
                    leaves.held.pop(path, None)  # the original value was for measuring
                if ahead_of_us:
                    continue
                value = smoothed.pop(path, None)
                value = leaves.held.pop(path, value) if value is None else value
                leaves.held.pop(path, None)
                if path not in own_stage:
                    other_done(path, value)
            if progress is not None:
                jax.block_until_ready(states)
                progress(at + 1, len(stages.taps))
    return sum(len(fold.members) for fold in folds)


# --- what it takes --------------------------------------------------------------------------------


class Memory(NamedTuple):
    """The most bytes that arrays take at a time while `prune_streamed` runs.

    The temporary arrays of a compiled program are not counted.

    Attributes:
      parameters: those of a unit as they were read and as smoothing made them, the new kernels that
        later stages read, and the kernels of a stage while they are pruned and packed.
      state: the values between stages of all batches, in the original and in the pruned model, and
        in the original one again for the batches that smoothing measures.
      moments: the sums over the inputs of a stage's layers.
    """

    parameters: int
    state: int
    moments: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


# Bytes of each weight of a stage beside its parameter: the float32 kernel that goes into the
# solution and the one that comes out, its mask, and the packed form.
_SOLVING = 4 + 4 + 1 + 1


def memory(
    stages: Stages,
    params: Mapping[str, Any],
    batches: int,
    *,
    measured: int,
    strength: float,
    corrects: bool,
) -> Memory:
    """The memory that `prune_streamed` takes.

    Args:
      stages: the traced model, which may have been traced for shapes alone.
      params: path -> parameter, or its shape and dtype.
      batches: the number of batches.
      measured: how many of them smoothing measures.
      strength: the strength of smoothing.
      corrects: whether layers make up for earlier losses, so that the original model runs, too.
    """
    folds = folds_of(stages) if strength else []
    own = {tap.path: at for at, taps in enumerate(stages.taps) for tap in taps}
    changed = {
        path
        for fold in folds
        for path in (
            *(tap.path for tap in fold.members),
            *fold.vectors,
            *([fold.columns.path] if fold.columns else []),
        )
    }
    used: dict[str, list[int]] = {}
    for at in range(len(stages.taps)):
        for path in stages.reads(at):
            used.setdefault(path, []).append(at)
    for path, at in own.items():
        used.setdefault(path, []).append(at)

    def nbytes(path: str) -> int:
        return params[path].size * params[path].dtype.itemsize

    parameters = 0
    for unit in units(stages, folds):
        live = [p for p, ats in used.items() if min(ats) in unit or min(ats) < unit[0] <= max(ats)]
        held = sum(nbytes(p) * (2 if p in changed else 1) for p in live)
        new = sum(nbytes(p) for p in live if p in own)
        solving = max(
            _SOLVING * sum(params[tap.path].size for tap in stages.taps[at]) for at in unit
        )
        parameters = max(parameters, held + new + solving)
    runs = (2 if corrects else 1) * batches + (measured if folds else 0)
    state = runs * max((stages.kept_bytes(at) for at in range(len(stages.taps))), default=0)
    return Memory(parameters, state, max(map(sum, _moments(stages, params, corrects)), default=0))


def _moments(stages: Stages, params: Mapping[str, Any], corrects: bool) -> Iterator[list[int]]:
    """For each stage the bytes of the sums of each input."""
    for taps in stages.taps:
        sums: dict[int, int] = {}
        for tap in taps:
            width = stages.program.width(tap)
            sums.setdefault(tap.value, 4 * width * width)
        if corrects:
            crosses = {tap.value: 4 * stages.program.width(tap) ** 2 for tap in taps}
            sums = {value: size + crosses[value] for value, size in sums.items()}
            for tap in taps:
                if stages.streams[tap.path] is not None:
                    sums[tap.value] += 4 * params[tap.path].size
        yield list(sums.values())

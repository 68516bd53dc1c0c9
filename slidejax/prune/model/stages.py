"""A model's program cut into pruning stages, so that each part of the model runs once.

Whatever depends on a layer's kernel lies in a later stage than the layer's tap
(`slidejax.prune.model.program`). Stage 0 ends at the inputs of the first layers, and stage 1 at the
inputs of the layers that need their outputs. In a transformer the layers of the stages are queries,
keys and values; the output projection; gate and up; down; then those of the next block.

Values that cross from one stage to the next are kept for each batch. So when the layers of a stage
are pruned, the next stage runs with the new kernels, and nothing is computed twice. Stages that are
the same program, such as those of equal blocks, are traced and compiled once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.prune.model.ahead import CompileAhead, jitted
from slidejax.prune.model.inputs import rounded
from slidejax.prune.model.program import Program, Step, Tap

__all__ = ["SeveralDepths", "Stages"]

# Steps that change only the form of a layer's result.
_LAYOUT = ("broadcast_in_dim", "convert_element_type", "reshape", "transpose")


class SeveralDepths(NotImplementedError):
    """A layer is called at several depths of the program, so it has no single stage."""


class Stages:
    """A traced model, cut into stages.

    Args:
      run: `(params, batch) -> anything`, which calls the model
        (`slidejax.functional.Functional.run`).
      params: its parameters: a tree whose keys make up the layers' paths.
      batch: an example. All batches have its shapes.
      qdtypes: path of each kernel that will be pruned -> dtype of its packed values, or None. With
        `round_inputs=True` the inputs of layers with 8-bit values are rounded as the packed layers
        will round them.

    Attributes:
      program: the whole program.
      taps: for each stage, the layers whose inputs are known when it has run.
      streams: path -> the value to which the layer's result is added, if it is known with the
        layer's input; else None.

    Raises:
      NotImplementedError: if chosen layers run where the program cannot be opened
        (`slidejax.prune.model.program.Program`); `SeveralDepths` if one is called at several depths
        of the program.
    """

    def __init__(
        self, run: Callable[[Any, Any], Any], params: Any, batch: Any, qdtypes: Mapping[str, Any]
    ):
        self.qdtypes = dict(qdtypes)
        self.program = Program(run, params, batch, self.qdtypes)
        taps = [(step, step.tap) for step in self.program.steps if step.tap is not None]
        self.qdtypes |= {tap.path: self.qdtypes[tap.parameter] for _, tap in taps}
        unknown = [tap.path for _, tap in taps if tap.path not in self.program.leaf]
        if unknown:
            raise ValueError(
                f"layers whose kernels are not among the parameters: {', '.join(unknown[:3])}"
            )
        self._place()
        count = max((step.stage for step, _ in taps), default=0)
        self.taps: list[list[Tap]] = [[] for _ in range(count)]
        for step, tap in taps:
            self.taps[step.stage - 1].append(tap)
            if step.stage == count:
                step.stage = -1  # nothing that is needed comes after the last inputs
        self.streams = {tap.path: self._stream(tap) for _, tap in taps}
        self._drop_unneeded()
        self._by_stage = [
            [step for step in self.program.steps if step.stage == at] for at in range(count)
        ]
        self._last_use = self._last_uses()
        self._programs: dict[tuple[int, bool], tuple[list[int], list[int], Any]] = {}

    # --- which step belongs to which stage

    def _place(self) -> None:
        """Gives each step the first stage in which it can run."""
        kernels: dict[int, int] = {}  # a kernel is known one stage after its layer's input
        while True:
            self._earliest = dict(kernels)  # value -> the first stage in which it can be known
            for step in self.program.steps:
                step.stage = max((self._earliest.get(v, 0) for v in step.inputs), default=0)
                if step.tap is not None:
                    step.stage += 1  # the tap's output belongs to the stage after its input's
                    first = kernels.setdefault(self.program.leaf[step.tap.path], step.stage)
                    if first != step.stage:
                        raise SeveralDepths(
                            f"{step.tap.path} is used at several depths of the model"
                        )
                self._earliest.update(dict.fromkeys(step.outputs, step.stage))
            if all(self._earliest.get(v) == at for v, at in kernels.items()):
                break

    def _drop_unneeded(self) -> None:
        """Takes steps that nothing needs out of the program, and moves steps that need no layer.

        Steps that need no layer (masks, positions) run in the first stage that needs them.
        """
        needed: dict[int, int] = {}
        for at, members in enumerate(self.taps):
            for tap in members:
                for v in (tap.value, self.streams[tap.path]):
                    if v is not None:
                        needed.setdefault(v, at)
        for step in reversed(self.program.steps):
            uses = [needed[v] for v in step.outputs if v in needed]
            if not uses:
                step.stage = -1
            elif step.stage == 0:
                step.stage = min(uses)
            if step.stage >= 0:
                needed |= {v: min(needed.get(v, step.stage), step.stage) for v in step.inputs}

    def _last_uses(self) -> dict[int, int]:
        """Value -> the last stage that reads it."""
        last: dict[int, int] = {}
        for at, steps in enumerate(self._by_stage):
            last |= {v: at for step in steps for v in step.inputs}
        for at, members in enumerate(self.taps):  # streams are read after the stage has run
            for stream in [self.streams[tap.path] for tap in members]:
                if stream is not None:
                    last[stream] = max(last.get(stream, 0), at + 1)
        return last

    def _stream(self, tap: Tap) -> int | None:
        """The value to which a layer's result is added, if it is known by then; else None."""
        # The kernel, the input, and the values that are computed from their product.
        ours = {self.program.leaf[tap.path]}
        for step in self.program.steps:
            if step.tap == tap:
                ours |= set(step.outputs)
            if step.tap is not None or not ours.intersection(step.inputs):
                continue
            others = [v for v in step.inputs if v not in ours]
            adds = step.name == "add" and bool(others)
            product = step.name == "dot_general" and not others
            bias = adds and self.program.of_parameters(others[0])
            if product or bias or step.name in _LAYOUT:
                ours |= set(step.outputs)
            elif adds and step.shape(0) == step.shape(1):
                return (
                    others[0]
                    if self._earliest.get(others[0], 0) < self._earliest[step.outputs[0]]
                    else None
                )
            else:
                return None
        return None

    def reads_after(self, stage: int, path: str) -> bool:
        """Whether a stage after this one reads a parameter."""
        return self._last_use.get(self.program.leaf[path], -1) > stage

    def reads(self, stage: int) -> set[str]:
        """The paths of the parameters that a stage's program reads."""
        read = {v for step in self._by_stage[stage] for v in step.inputs}
        return {path for path, v in self.program.leaf.items() if v in read}

    def kept_bytes(self, stage: int) -> int:
        """The bytes of the values of one batch that are kept when a stage has run."""
        made = dict.fromkeys(self.program.batch, -1)
        for at, steps in enumerate(self._by_stage):
            made |= {v: at for step in steps for v in step.outputs}
        shapes = [
            self.program.shape(v)
            for v, at in made.items()
            if at <= stage < self._last_use.get(v, -1)
        ]
        return sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in shapes)

    def outputs(self, tap: Tap) -> int:
        """The number of outputs of a layer."""
        size = math.prod(self.program.shape(self.program.leaf[tap.path]).shape)
        return size // self.program.width(tap)

    # --- running

    def start(self, batch: Any) -> dict[int, Any]:
        """The values that are known before stage 0, by number."""
        return dict(zip(self.program.batch, jax.tree.leaves(batch), strict=True))

    def begin(self, ahead: CompileAhead, *, round_inputs: bool = False) -> None:
        """Begins to compile the programs that `advance` will run."""
        for stage in range(len(self.taps)):
            reads, out, program = self._program(stage, round_inputs)
            if out:
                ahead.begin(program, *(self.program.shape(v) for v in reads))

    def advance(
        self,
        stage: int,
        values: dict[int, Any],
        leaves: Mapping[str, Any],
        *,
        round_inputs: bool = False,
        ahead: CompileAhead | None = None,
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        """Runs one stage on one batch.

        Args:
          stage: the number of the stage. Stages are run in order.
          values: the values that the stage before returned, or `start`. They are not changed.
          leaves: the parameters by path, with new kernels among them.
          round_inputs: whether layers with 8-bit values round their inputs.
          ahead: where `begin` has begun to compile.

        Returns:
          `(values, inputs)`: the values that later stages need; and the inputs of this stage's
          `taps`, by `Tap.value`, before any rounding.
        """
        reads, out, program = self._program(stage, round_inputs)

        def given(v: int) -> jax.Array:
            path = self.program.parameter(v)
            return jnp.asarray(
                leaves[path] if path is not None else self.program.constants.get(v, values.get(v))
            )

        known = dict(values)
        if out:
            arrays = [given(v) for v in reads]
            known |= zip(
                out,
                program(*arrays) if ahead is None else ahead.call(program, *arrays),
                strict=True,
            )
        inputs = {
            v: known[v] if v in known else given(v) for v in {tap.value for tap in self.taps[stage]}
        }
        return {v: array for v, array in known.items() if self._last_use.get(v, -1) > stage}, inputs

    def _program(self, stage: int, round_inputs: bool) -> tuple[list[int], list[int], Any]:
        """`(reads, out, program)`: the values that a stage reads and makes, and its program."""
        if (stage, round_inputs) in self._programs:
            return self._programs[stage, round_inputs]
        steps = self._by_stage[stage]
        made = {v for step in steps for v in step.outputs}
        reads = [
            v for v in dict.fromkeys(v for step in steps for v in step.inputs) if v not in made
        ]
        wanted = {tap.value for tap in self.taps[stage]}
        out = [
            v
            for step in steps
            for v in step.outputs
            if v in wanted or self._last_use.get(v, -1) > stage
        ]
        dtypes = [
            self.qdtypes[step.tap.path] if step.tap is not None and round_inputs else None
            for step in steps
        ]
        signatures = tuple(_signature(self.program.shape(v)) for v in reads)
        key = signatures, *_key(steps, dtypes, reads, out)
        run = functools.partial(_run, steps, dtypes, reads, out)
        self._programs[stage, round_inputs] = reads, out, _jitted(_StageProgram(key, run))
        return self._programs[stage, round_inputs]


@dataclasses.dataclass(frozen=True)
class _StageProgram:
    """The computation of a stage. Programs with equal keys are equal.

    It holds the equations, so that the objects in a key live as long as the key.
    """

    key: tuple
    run: Callable[..., Any] = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=256)
def _jitted(program: _StageProgram) -> Any:
    """The jitted program. Equal stages share it, also in another conversion of the same model."""
    return jitted(program.run)


def _run(
    steps: Sequence[Step], dtypes: Sequence[Any], reads: Sequence[int], out: Sequence[int], *arrays
) -> list[jax.Array]:
    """Runs the steps of a stage. A tap rounds its value where its dtype is 8-bit."""
    env = dict(zip(reads, arrays, strict=True))
    for step, dtype in zip(steps, dtypes, strict=True):
        inputs = [env[v] for v in step.inputs]
        if step.tap is None:
            env.update(zip(step.outputs, step(*inputs), strict=True))
        elif dtype is not None and dtype.itemsize == 1:
            env[step.outputs[0]] = rounded(inputs[0], step.tap.axes, dtype)
        else:
            env[step.outputs[0]] = inputs[0]
    return [env[v] for v in out]


def _key(
    steps: Sequence[Step], dtypes: Sequence[Any], reads: Sequence[int], out: Sequence[int]
) -> tuple:
    """The computation of some steps, as a hashable value.

    Values are numbered in the order in which they come, so equal blocks have equal keys.
    """
    number: dict[int, int] = {}
    for v in (*reads, *(v for step in steps for v in step.outputs)):
        number.setdefault(v, len(number))
    of_steps = tuple(
        step.key(number) if step.tap is None else (number[step.tap.value], step.tap.axes, dtype)
        for step, dtype in zip(steps, dtypes, strict=True)
    )
    return tuple(number[v] for v in out), of_steps


def _signature(aval: Any) -> tuple:
    return (
        aval.shape,
        np.dtype(aval.dtype)
        if not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
        else aval.dtype,
        aval.weak_type,
    )

"""A model's program cut into stages, so that layers can be pruned in order while every part of the model runs once.

The model, Linen, NNX or of transformers, is traced to a jaxpr in which the input of each chosen linear layer is marked
(a *tap*). What depends on a layer's kernel lies in a later stage than its tap: stage 0 ends at the inputs of the first
layers, stage 1 at those of the layers that need their outputs, and so on (queries, keys and values; the output
projection; gate and up; down; the next block). Values that cross from one stage to the next are kept for each batch. So
when a stage's layers are pruned, the next stage runs with the new kernels, and nothing is computed twice. Stages that
are the same program, as the blocks of a transformer are, are traced and compiled once.
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
from jax.extend import core

from slidejax.contraction import Contraction
from slidejax.prune.model.ahead import Ahead, jitted
from slidejax.prune.model.inputs import rounded, seeing_inputs

__all__ = ["SeveralDepths", "Stages", "Step", "Tap", "named_leaves"]

# Calls whose body is a part of the program like any other; a loop's is not.
_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
)
# Steps that change a layer's result in form only.
_LAYOUT = ("broadcast_in_dim", "convert_element_type", "reshape", "transpose")


class SeveralDepths(NotImplementedError):
    """A layer is called at several depths of the program, so that there is no one stage to prune it in."""


_tap = core.Primitive("slidejax_tap")
_tap.def_abstract_eval(lambda x, **_: x)


def named_leaves(params: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters by path; a leading "params" is left out, as it is in rules.

    >>> list(named_leaves({"params": {"up": {"kernel": 1}, "down": {"kernel": 2}}}))
    ['down/kernel', 'up/kernel']
    """

    def name(path) -> str:
        parts = [
            str(
                next(getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field))
            )
            for key in path
        ]
        return "/".join(parts[1:] if parts[:1] == ["params"] else parts)

    return {name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


@dataclasses.dataclass(frozen=True)
class Tap:
    """The input of a linear layer.

    Attributes:
      path: of its kernel.
      axes: how the layer contracts input and kernel.
      value: number of the input among the values of the program; layers with the same input have the same number.
    """

    path: str
    axes: Contraction
    value: int


@dataclasses.dataclass(eq=False)
class Step:
    """One equation of the program, between numbered values.

    Attributes:
      eqn: the equation.
      operands: what it reads: numbers of values, or literals.
      outputs: the values that it makes.
      tap: if it is one.
      debug_info: of the jaxpr that it comes from.
      stage: when it runs; -1: nothing that is needed depends on it.
    """

    eqn: Any
    operands: tuple[Any, ...]
    outputs: tuple[int, ...]
    debug_info: Any
    tap: Tap | None = None
    stage: int = -1

    @property
    def name(self) -> str:
        """Of its primitive."""
        return self.eqn.primitive.name

    @property
    def inputs(self) -> tuple[int, ...]:
        """The values that it reads, each once."""
        return tuple(dict.fromkeys(v for v in self.operands if isinstance(v, int)))

    def shape(self, operand: int) -> tuple[int, ...]:
        """The shape of one of its operands, by place."""
        return self.eqn.invars[operand].aval.shape

    def key(self, number: Mapping[int, int]) -> tuple:
        """What it computes: equal for equal steps, values going by their numbers."""
        literals = (
            (v.aval.shape, str(v.aval.dtype), v.aval.weak_type, np.asarray(v.val).tobytes())
            for v in self.operands
            if not isinstance(v, int)
        )
        operands = tuple(number[v] if isinstance(v, int) else None for v in self.operands)
        params = tuple((name, _hashable(self.eqn.params[name])) for name in sorted(self.eqn.params))
        return self.name, operands, tuple(number[v] for v in self.outputs), tuple(literals), params

    def __call__(self, *arrays: jax.Array) -> list[jax.Array]:
        """Its outputs, from its `inputs`."""
        var = {
            v: atom
            for v, atom in zip(self.operands, self.eqn.invars, strict=True)
            if isinstance(v, int)
        }
        eqn = self.eqn.replace(invars=[var[v] if isinstance(v, int) else v for v in self.operands])
        jaxpr = core.Jaxpr(
            (),
            [var[v] for v in self.inputs],
            list(eqn.outvars),
            [eqn],
            eqn.effects,
            self.debug_info,
        )
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*arrays)


def _hashable(param: Any) -> Any:
    """A parameter of an equation, or what stands for it alone: steps that differ in such a parameter count as different."""
    try:
        hash(param)
    except TypeError:
        return type(param), id(param)
    return param


class Stages:
    """A traced model.

    Args:
      run: `(params, batch) -> anything`, which calls the model.
      params: its parameters: a tree whose keys make the layers' paths.
      batch: an example; all batches have its shapes.
      qdtypes: path of each kernel whose layer is to be pruned -> dtype of its packed values, or None. A run
        `round_inputs=True` rounds the inputs of layers with 8-bit values as they will.

    Attributes:
      taps: for each stage, the layers whose inputs are known when it has run.
      streams: path -> the value to which the layer's result is added and that is known with its input, or None.
      steps: the program.

    Raises:
      NotImplementedError: if chosen layers run inside a loop (`nn.scan`, `jax.lax`) or under `vmap`; `SeveralDepths` if
        one is called at several depths of the program.
    """

    def __init__(
        self, run: Callable[[Any, Any], Any], params: Any, batch: Any, qdtypes: Mapping[str, Any]
    ):
        self.qdtypes = dict(qdtypes)
        leaves, tree = jax.tree.flatten(params)
        batch_leaves, batch_tree = jax.tree.flatten(batch)

        def see(path, x, axes):
            return (
                _tap.bind(x, path=path, axes=axes)
                if path in self.qdtypes and not axes.kernel_batch
                else x
            )

        def program(leaves, batch_leaves):
            with seeing_inputs(see):
                run(jax.tree.unflatten(tree, leaves), jax.tree.unflatten(batch_tree, batch_leaves))
            return ()

        try:
            closed = jax.make_jaxpr(program)(leaves, batch_leaves)
        except NotImplementedError as error:
            if _tap.name in str(error):
                raise NotImplementedError(
                    "calibration cannot look into layers under vmap (nn.vmap)"
                ) from error
            raise
        self.steps: list[Step] = []
        self._shapes: list[jax.ShapeDtypeStruct] = []  # of each value
        self._constants: dict[int, Any] = {}
        inputs = [self._new(var.aval) for var in closed.jaxpr.invars]
        self.leaf = dict(
            zip(named_leaves(params), inputs, strict=False)
        )  # path of a parameter -> its value
        self._paths = {v: path for path, v in self.leaf.items()}
        self._batch = inputs[len(leaves) :]
        self._inline(closed.jaxpr, closed.consts, inputs)
        self._parameters = {*self._paths, *self._constants}
        for step in self.steps:
            if step.tap is None and self._parameters.issuperset(step.inputs):
                self._parameters |= set(step.outputs)
        self.taps: list[list[Tap]] = []
        self._schedule()
        self._programs: dict[tuple[int, bool], tuple[list[int], list[int], Any]] = {}

    def _new(self, aval: Any) -> int:
        self._shapes.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type))
        return len(self._shapes) - 1

    def _inline(self, jaxpr, consts, inputs: Sequence[Any]) -> list[Any]:
        """Adds the steps of a jaxpr, with calls that hold taps opened; returns its outputs."""
        env: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self._new(var.aval)
            self._constants[env[var]] = value

        def read(atom):
            return atom if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(read(atom) for atom in eqn.invars)
            body = _body_with_taps(eqn)
            if body is None:
                outputs = tuple(self._new(var.aval) for var in eqn.outvars)
                tap = (
                    Tap(eqn.params["path"], eqn.params["axes"], operands[0])
                    if eqn.primitive is _tap
                    else None
                )
                self.steps.append(Step(eqn, operands, outputs, jaxpr.debug_info, tap))
            elif eqn.primitive.name in _CALLS:
                jaxpr_inside, consts_inside = body
                outputs = tuple(self._inline(jaxpr_inside, consts_inside, operands))
            else:
                raise NotImplementedError(
                    f"calibration cannot look into layers inside {eqn.primitive.name} (nn.scan or a loop)"
                )
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    # --- which step belongs to which stage

    def _schedule(self) -> None:
        taps = [(step, step.tap) for step in self.steps if step.tap is not None]
        unknown = [tap.path for _, tap in taps if tap.path not in self.leaf]
        if unknown:
            raise ValueError(
                f"layers whose kernels are not among the parameters: {', '.join(unknown[:3])}"
            )
        kernels: dict[int, int] = {}  # a kernel is known one stage after its layer's input
        while True:
            self.earliest = dict(kernels)  # value -> the first stage in which it can be known
            for step in self.steps:
                step.stage = max((self.earliest.get(v, 0) for v in step.inputs), default=0)
                if step.tap is not None:
                    step.stage += 1  # the tap's output belongs to the stage after its input's
                    first = kernels.setdefault(self.leaf[step.tap.path], step.stage)
                    if first != step.stage:
                        raise SeveralDepths(
                            f"{step.tap.path} is used at several depths of the model"
                        )
                self.earliest.update(dict.fromkeys(step.outputs, step.stage))
            if all(self.earliest.get(v) == at for v, at in kernels.items()):
                break
        count = max((step.stage for step, _ in taps), default=0)
        self.taps = [[] for _ in range(count)]
        for step, tap in taps:
            self.taps[step.stage - 1].append(tap)
            if step.stage == count:
                step.stage = -1  # nobody needs what comes after the last inputs
        self.streams = {tap.path: self._stream(tap) for _, tap in taps}
        # backwards: what is not needed does not run, and what needs no layer (masks, positions) runs where it is needed
        needed: dict[int, int] = {}
        for at, members in enumerate(self.taps):
            for v in [
                v for tap in members for v in (tap.value, self.streams[tap.path]) if v is not None
            ]:
                needed.setdefault(v, at)
        for step in reversed(self.steps):
            uses = [needed[v] for v in step.outputs if v in needed]
            if not uses:
                step.stage = -1
            elif step.stage == 0:
                step.stage = min(uses)
            if step.stage >= 0:
                needed |= {v: min(needed.get(v, step.stage), step.stage) for v in step.inputs}
        self._by_stage = [[step for step in self.steps if step.stage == at] for at in range(count)]
        self._last_use: dict[int, int] = {}
        for at, steps in enumerate(self._by_stage):
            self._last_use |= {v: at for step in steps for v in step.inputs}
        for at, members in enumerate(self.taps):  # streams are read when the stage has run
            for stream in [self.streams[tap.path] for tap in members]:
                if stream is not None:
                    self._last_use[stream] = max(self._last_use.get(stream, 0), at + 1)

    def _stream(self, tap: Tap) -> int | None:
        """The value to which a layer's result is added and that is known with the layer's input; None if there is none."""
        ours = {self.leaf[tap.path]}  # the kernel, the input, and what becomes of their product
        for step in self.steps:
            if step.tap == tap:
                ours |= set(step.outputs)
            if step.tap is not None or not ours.intersection(step.inputs):
                continue
            others = [v for v in step.inputs if v not in ours]
            adds = step.name == "add" and bool(others)
            product = step.name == "dot_general" and not others
            bias = adds and self.of_parameters(others[0])
            if product or bias or step.name in _LAYOUT:
                ours |= set(step.outputs)
            elif adds and step.shape(0) == step.shape(1):
                return (
                    others[0]
                    if self.earliest.get(others[0], 0) < self.earliest[step.outputs[0]]
                    else None
                )
            else:
                return None
        return None

    def parameter(self, value: int) -> str | None:
        """The path of the parameter that a value is, or None."""
        return self._paths.get(value)

    def shape(self, value: int) -> jax.ShapeDtypeStruct:
        """The shape and dtype of a value."""
        return self._shapes[value]

    def width(self, tap: Tap) -> int:
        """The number of inputs of a layer."""
        shape = self.shape(tap.value).shape
        return math.prod(shape[a] for a in tap.axes.x_in)

    def of_parameters(self, value: int) -> bool:
        """Whether a value depends on parameters and constants alone."""
        return value in self._parameters

    def reads_after(self, stage: int, path: str) -> bool:
        """Whether a stage after this one reads a parameter."""
        return self._last_use.get(self.leaf[path], -1) > stage

    # --- running

    def start(self, batch: Any) -> dict[int, Any]:
        """The values that are known before stage 0."""
        return dict(zip(self._batch, jax.tree.leaves(batch), strict=True))

    def begin(self, ahead: Ahead, *, round_inputs: bool = False) -> None:
        """Begins to compile what `advance` will run."""
        for stage in range(len(self.taps)):
            reads, out, program = self._program(stage, round_inputs)
            if out:
                ahead.begin(program, *(self._shapes[v] for v in reads))

    def advance(
        self,
        stage: int,
        values: dict[int, Any],
        leaves: Mapping[str, Any],
        *,
        round_inputs: bool = False,
        ahead: Ahead | None = None,
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        """Runs one stage on one batch.

        Args:
          stage: the stages are run in order.
          values: what the stage before left (`start` before the first); it is not changed.
          leaves: the parameters by path, new kernels among them.
          round_inputs: whether layers with 8-bit values round their inputs.
          ahead: where `begin` has begun to compile.

        Returns:
          `(values, inputs)`: what later stages need; and the inputs of this stage's `taps`, by `Tap.value`, before any
          rounding.
        """
        reads, out, program = self._program(stage, round_inputs)

        def given(v: int) -> jax.Array:
            path = self._paths.get(v)
            return jnp.asarray(
                leaves[path] if path is not None else self._constants.get(v, values.get(v))
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
        """`(reads, out, program)`: the values that a stage reads and leaves, and the jitted program between them."""
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
        # equal jaxprs are one program: values by the order in which they come, so that the same block has the same key
        number: dict[int, int] = {}
        for v in (*reads, *(v for step in steps for v in step.outputs)):
            number.setdefault(v, len(number))
        dtypes = [
            self.qdtypes[step.tap.path] if step.tap is not None and round_inputs else None
            for step in steps
        ]
        key = (
            tuple(_signature(self._shapes[v]) for v in reads),
            tuple(number[v] for v in out),
            tuple(
                step.key(number)
                if step.tap is None
                else (number[step.tap.value], step.tap.axes, dtype)
                for step, dtype in zip(steps, dtypes, strict=True)
            ),
        )

        def program(*arrays):
            env = dict(zip(reads, arrays, strict=True))
            for step, dtype in zip(steps, dtypes, strict=True):
                inputs = [env[v] for v in step.inputs]
                if step.tap is None:
                    env.update(zip(step.outputs, step(*inputs), strict=True))
                else:
                    env[step.outputs[0]] = (
                        rounded(inputs[0], step.tap.axes, dtype)
                        if dtype is not None and dtype.itemsize == 1
                        else inputs[0]
                    )
            return [env[v] for v in out]

        jitted = _jitted(_Program(key, program))
        self._programs[stage, round_inputs] = reads, out, jitted
        return reads, out, jitted


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a stage computes; equal if the keys are. It holds the equations, so that an object in a key stays itself."""

    key: tuple
    run: Callable[..., Any] = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=256)
def _jitted(program: _Program) -> Any:
    """The jitted program: one for equal stages, also of another conversion of the same model."""
    return jitted(program.run)


def _signature(aval: Any) -> tuple:
    return (
        aval.shape,
        np.dtype(aval.dtype)
        if not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
        else aval.dtype,
        aval.weak_type,
    )


def _body_with_taps(eqn):
    """`(jaxpr, consts)` of the call that an equation is, if taps are inside; else None."""
    for value in eqn.params.values():
        for body in value if isinstance(value, (tuple, list)) else (value,):
            consts = getattr(body, "consts", None) or ()
            jaxpr = getattr(body, "jaxpr", body)
            if isinstance(jaxpr, core.Jaxpr) and any(
                e.primitive is _tap or _body_with_taps(e) for e in jaxpr.eqns
            ):
                return jaxpr, consts
    return None

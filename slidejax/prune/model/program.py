"""A model's program: the equations of its trace, with the inputs of chosen linear layers marked.

A mark is a *tap*: an identity that knows the path of the layer's kernel. Calls that hold taps are
opened, so that the program is one list of steps between numbered values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from slidejax.contraction import Contraction
from slidejax.functional import watching_inputs

__all__ = ["Program", "Step", "Tap", "named_leaves"]

# Calls whose body belongs to the program like the equations around it. The body of a loop does not.
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

_tap = core.Primitive("slidejax_tap")
_tap.def_abstract_eval(lambda x, **_: x)


def named_leaves(params: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters by path.

    A leading "params" is left out, as it is in rules.

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
      path: the path of the layer's kernel.
      axes: how the layer contracts its input with its kernel.
      value: the number of the input among the values of the program. Layers with the same input
        have the same number.
    """

    path: str
    axes: Contraction
    value: int


@dataclasses.dataclass(eq=False)
class Step:
    """One equation of the program, between numbered values.

    Attributes:
      eqn: the equation.
      operands: the numbers of the values that it reads, and literals.
      outputs: the numbers of the values that it makes.
      debug_info: the debugging information of its jaxpr.
      tap: the tap that it is, or None.
      stage: the stage in which it runs (`slidejax.prune.model.stages`). -1: it does not run,
        because nothing that is needed depends on it.
    """

    eqn: Any
    operands: tuple[Any, ...]
    outputs: tuple[int, ...]
    debug_info: Any
    tap: Tap | None = None
    stage: int = -1

    @property
    def name(self) -> str:
        """The name of its primitive."""
        return self.eqn.primitive.name

    @property
    def inputs(self) -> tuple[int, ...]:
        """The values that it reads, each once."""
        return tuple(dict.fromkeys(v for v in self.operands if isinstance(v, int)))

    def shape(self, operand: int) -> tuple[int, ...]:
        """The shape of one of its operands; `operand` counts from 0."""
        return self.eqn.invars[operand].aval.shape

    def key(self, number: Mapping[int, int]) -> tuple:
        """Its computation, with new numbers for the values: equal steps have equal keys."""
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
    """A parameter of an equation, or a stand-in for one that has no hash.

    Each such parameter has its own stand-in, so steps that hold different objects count as
    different.
    """
    try:
        hash(param)
    except TypeError:
        return type(param), id(param)
    return param


class Program:
    """A traced model.

    Args:
      run: `(params, batch) -> anything`, which calls the model
        (`slidejax.functional.Functional.run`).
      params: its parameters: a tree whose keys make up the layers' paths.
      batch: an example; all batches have its shapes.
      paths: the kernels whose layers get a tap.

    Attributes:
      steps: the program.
      leaf: path of a parameter -> the number of its value.
      batch: the numbers of the values of a batch, in the order of its leaves.
      constants: number of a value -> array.

    Raises:
      NotImplementedError: if chosen layers run inside a loop (`nn.scan`, `jax.lax`) or under
        `vmap`.
    """

    def __init__(
        self,
        run: Callable[[Any, Any], Any],
        params: Any,
        batch: Any,
        paths: Collection[str],
    ):
        closed = _traced(run, params, batch, paths)
        count = len(jax.tree.leaves(params))
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self._shapes: list[jax.ShapeDtypeStruct] = []  # of each value
        inputs = [self._new(var.aval) for var in closed.jaxpr.invars]
        self.leaf = dict(zip(named_leaves(params), inputs, strict=False))
        self.batch = inputs[count:]
        self._paths = {v: path for path, v in self.leaf.items()}
        self._inline(closed.jaxpr, closed.consts, inputs)
        self._parameters = {*self._paths, *self.constants}
        for step in self.steps:
            if step.tap is None and self._parameters.issuperset(step.inputs):
                self._parameters |= set(step.outputs)

    def _new(self, aval: Any) -> int:
        self._shapes.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type))
        return len(self._shapes) - 1

    def _inline(self, jaxpr, consts, inputs: Sequence[Any]) -> list[Any]:
        """Adds the steps of a jaxpr and opens calls that hold taps; returns the outputs."""
        env: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self._new(var.aval)
            self.constants[env[var]] = value

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
                    f"calibration cannot look into layers inside {eqn.primitive.name} "
                    "(nn.scan or a loop)"
                )
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

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


def _traced(run: Callable[[Any, Any], Any], params: Any, batch: Any, paths: Collection[str]) -> Any:
    """The jaxpr of a model with taps.

    Its inputs are the leaves of the parameters and of the batch.
    """
    leaves, tree = jax.tree.flatten(params)
    batch_leaves, batch_tree = jax.tree.flatten(batch)

    def mark(path, x, axes):
        chosen = path in paths and not axes.kernel_batch
        return _tap.bind(x, path=path, axes=axes) if chosen else x

    def program(leaves, batch_leaves):
        with watching_inputs(mark):
            run(jax.tree.unflatten(tree, leaves), jax.tree.unflatten(batch_tree, batch_leaves))
        return ()

    try:
        return jax.make_jaxpr(program)(leaves, batch_leaves)
    except NotImplementedError as error:
        if _tap.name in str(error):
            raise NotImplementedError(
                "calibration cannot look into layers under vmap (nn.vmap)"
            ) from error
        raise


def _body_with_taps(eqn):
    """`(jaxpr, consts)` of the function that an equation calls, if taps are inside; else None."""
    for value in eqn.params.values():
        for body in value if isinstance(value, (tuple, list)) else (value,):
            consts = getattr(body, "consts", None) or ()
            jaxpr = getattr(body, "jaxpr", body)
            if isinstance(jaxpr, core.Jaxpr) and any(
                e.primitive is _tap or _body_with_taps(e) for e in jaxpr.eqns
            ):
                return jaxpr, consts
    return None

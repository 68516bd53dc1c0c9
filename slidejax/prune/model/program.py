"""A model's program: the equations of its trace, with the inputs of chosen linear layers marked.

A mark is a *tap* (`slidejax.prune.model.tracing`). Calls and loops that hold taps are opened, so
that the program is one list of steps between numbered values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from slidejax.contraction import Contraction
from slidejax.prune.model.stacked import Elements, Stacked, element_path
from slidejax.prune.model.tracing import TAP, body_with_taps, first_tap, traced

__all__ = ["Program", "Step", "Tap", "named_leaves"]

# Calls whose body belongs to the program like the equations around it.
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

# Operations on one array that act on each element of a stack alone.
_BY_ELEMENT = ("convert_element_type", "copy", "reduce_precision", "stop_gradient")


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
      parameter: the path of the parameter that the kernel is, or that it is an element of.
    """

    path: str
    axes: Contraction
    value: int
    parameter: str


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

    A loop (`nn.scan`, `jax.lax.scan`) with chosen layers is written out, step after step, and
    layers that `vmap` runs at once become layers beside each other. The parameters that hold the
    kernels of such layers are seen as their elements (`slidejax.prune.model.stacked`).

    Args:
      run: `(params, batch) -> anything`, which calls the model
        (`slidejax.functional.Functional.run`).
      params: its parameters: a tree whose keys make up the layers' paths.
      batch: an example; all batches have its shapes.
      paths: the kernels whose layers get a tap. None: all.

    Attributes:
      steps: the program.
      leaf: path of a parameter, or of an element of one -> the number of its value.
      stacks: path of a parameter that is seen as its elements -> sizes of the axes along which they
        are stacked.
      batch: the numbers of the values of a batch, in the order of its leaves.
      constants: number of a value -> array.

    Raises:
      NotImplementedError: if chosen layers run inside a loop whose length is not known, or a
        branch; or if it cannot be told which part of a parameter their kernel is.
    """

    def __init__(
        self,
        run: Callable[[Any, Any], Any],
        params: Any,
        batch: Any,
        paths: Collection[str] | None,
    ):
        closed = traced(run, params, batch, paths)
        leaves = list(named_leaves(params))
        depths: dict[str, int] = {}  # how many leading axes of a parameter are those of a stack
        while True:
            self._number(closed, leaves, depths)
            if not self._deeper:
                break
            depths = depths | self._deeper  # and once more, with these parameters in elements
        self._parameters = {*self._paths, *self.constants}
        for step in self.steps:
            if step.tap is None and self._parameters.issuperset(step.inputs):
                self._parameters |= set(step.outputs)

    def _number(self, closed, leaves: Sequence[str], depths: Mapping[str, int]) -> None:
        """Makes the program, with the parameters of `depths` in elements."""
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self._shapes: list[jax.ShapeDtypeStruct] = []  # of each value
        self.leaf: dict[str, int] = {}
        self.stacks: dict[str, tuple[int, ...]] = {}
        # The element of a parameter that a value is, also after a cast.
        self._element_of: dict[int, tuple[str, tuple[int, ...]]] = {}
        self._deeper: dict[str, int] = {}  # parameters that were found to be stacks
        invars = closed.jaxpr.invars
        inputs: list[Any] = [
            self._parameter(path, var.aval, depths.get(path, 0))
            for path, var in zip(leaves, invars, strict=False)
        ]
        self.batch = [self._new(var.aval) for var in invars[len(inputs) :]]
        self._paths = {v: path for path, v in self.leaf.items()}
        self._inline(closed.jaxpr, closed.consts, [*inputs, *self.batch])

    def _parameter(self, path: str, aval: Any, depth: int) -> Any:
        """A new value for a parameter, or one for each of its elements."""
        lead, shape = aval.shape[:depth], aval.shape[depth:]
        elements = np.empty(lead, object)
        for index in np.ndindex(*lead):
            v = elements[index] = self._new(aval.update(shape=shape))
            self.leaf[element_path(path, index)] = v
            self._element_of[v] = path, index
        if not depth:
            return elements[()]
        self.stacks[path] = lead
        return Stacked(elements)

    def _new(self, aval: Any) -> int:
        self._shapes.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type))
        return len(self._shapes) - 1

    def _inline(self, jaxpr, consts, inputs: Sequence[Any]) -> list[Any]:
        """Adds the steps of a jaxpr and opens calls and loops that hold taps.

        Args:
          jaxpr: the jaxpr.
          consts: its constants.
          inputs: a number, a literal or a `Stacked` for each of its arguments.

        Returns:
          One of these for each of its results.
        """
        env: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self._new(var.aval)
            self.constants[env[var]] = value

        def read(atom):
            return atom if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(read(atom) for atom in eqn.invars)
            body = body_with_taps(eqn)
            if body is None:
                outputs = self._add(eqn, operands, jaxpr.debug_info)
            elif eqn.primitive.name in _CALLS:
                outputs = self._inline(body[0], body[1], operands)
            elif eqn.primitive.name == "scan" and eqn.params["length"]:
                outputs = self._write_out(eqn, operands)
            else:
                raise NotImplementedError(
                    f"calibration cannot look into layers inside {eqn.primitive.name}, such as "
                    f"{first_tap(body[0])}: skip them with the rule (their path, None)"
                )
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _add(self, eqn, operands: Sequence[Any], debug_info: Any) -> list[Any]:
        """Adds an equation as a step, and returns its outputs."""
        if eqn.primitive is TAP:
            return [self._tapped(eqn, operands, debug_info)]
        one = operands[0] if len(operands) == 1 else None
        by_element = eqn.primitive.name in _BY_ELEMENT
        if isinstance(one, Stacked) and by_element:
            return [self._by_element(eqn, one)]
        if isinstance(one, Stacked) and eqn.primitive.name == "transpose":
            depth, order = one.elements.ndim, eqn.params["permutation"]
            if order[depth:] == tuple(range(depth, len(order))):  # among the stacked axes alone
                return [Stacked(one.elements.transpose(order[:depth]))]
        outputs = [self._new(var.aval) for var in eqn.outvars]
        if by_element and one in self._element_of:
            self._element_of[outputs[0]] = self._element_of[one]
        operands = tuple(self._whole(v) for v in operands)
        self.steps.append(Step(eqn, operands, tuple(outputs), debug_info))
        return outputs

    def _call(self, fn: Callable[..., Any], *values: int) -> int:
        """Adds the steps of a function of arrays, and returns its result."""
        closed = jax.make_jaxpr(fn)(*(self.shape(v) for v in values))
        return self._inline(closed.jaxpr, closed.consts, values)[0]

    # --- stacks

    def _whole(self, v: Any) -> Any:
        """A value as one array: a stack is put together once, where it is first read."""
        if not isinstance(v, Stacked):
            return v
        if v.whole is None:
            lead = v.elements.shape

            def stack(*parts):
                joined = lax.concatenate([lax.expand_dims(part, (0,)) for part in parts], 0)
                return lax.reshape(joined, (*lead, *parts[0].shape))

            v.whole = self._call(stack, *v.elements.flat)
        return v.whole

    def _by_element(self, eqn, stack: Stacked) -> Stacked:
        result: Any = np.empty(stack.elements.shape, object)
        for index in np.ndindex(*result.shape):
            v: Any = stack.elements[index]
            result[index] = self._call(lambda x: eqn.primitive.bind(x, **eqn.params), v)
            if v in self._element_of:
                self._element_of[result[index]] = self._element_of[v]
        return Stacked(result)

    def _at(self, v: Any, index: tuple[int, ...]) -> Any:
        """The element of a value along its first axes."""
        if isinstance(v, Stacked) and v.elements.ndim >= len(index):
            return v[index]
        self._needs_elements(v, len(index))

        def element(x):
            for i in index:
                x = lax.index_in_dim(x, i, 0, keepdims=False)
            return x

        return self._call(element, self._whole(v))

    def _needs_elements(self, v: Any, depth: int) -> None:
        """Notes that a value is read by element; if it is a parameter, the numbering is redone."""
        first = v.elements.flat[0] if isinstance(v, Stacked) else v
        if first in self._element_of:
            path, index = self._element_of[first]
            more = depth - (v.elements.ndim if isinstance(v, Stacked) else 0)
            self._deeper[path] = max(self._deeper.get(path, 0), len(index) + more)

    def _write_out(self, eqn, operands: Sequence[Any]) -> list[Any]:
        """Adds the steps of a loop of known length, one turn after the other."""
        params = eqn.params
        body, length = params["jaxpr"], params["length"]
        first, end = params["num_consts"], params["num_consts"] + params["num_carry"]
        fixed, carry, stacked = operands[:first], list(operands[first:end]), operands[end:]
        turns: list[list[Any]] = [[]] * length
        for i in reversed(range(length)) if params["reverse"] else range(length):
            inputs = [*fixed, *carry, *(self._at(v, (i,)) for v in stacked)]
            results = self._inline(body.jaxpr, body.consts, inputs)
            carry = results[: len(carry)]
            turns[i] = [self._value(v) for v in results[len(carry) :]]
        return [*carry, *(Stacked.of(list(values)) for values in zip(*turns, strict=True))]

    def _value(self, v: Any) -> int:
        """The number of a value, also of a literal."""
        return self._call(lambda: v.val) if isinstance(v, core.Literal) else self._whole(v)

    def _tapped(self, eqn, operands: Sequence[Any], debug_info: Any) -> Any:
        """Adds taps, one for each of the layers that `vmap` runs at once; returns their outputs."""
        x, *kernels = operands
        kernel = kernels[0] if kernels else None
        levels = eqn.params["levels"]
        if not levels:
            return self._tap_one(eqn, self._whole(x), kernel, debug_info)
        if not isinstance(kernel, Stacked) or kernel.elements.ndim < levels:
            self._needs_elements(kernel, levels)
            if not self._deeper:
                raise _unknown_part(eqn.params["path"])
            return x
        outputs = np.empty(kernel.elements.shape[:levels], object)
        for index in np.ndindex(*outputs.shape):
            of_one = self._whole(self._at(x, index))
            outputs[index] = self._tap_one(eqn, of_one, kernel[index], debug_info)
        return Stacked(outputs)

    def _tap_one(self, eqn, x: int, kernel: Any, debug_info: Any) -> int:
        path, axes = eqn.params["path"], eqn.params["axes"]
        known = None if kernel is None else self._element_of.get(self._whole(kernel))
        index = known[1] if known is not None and known[0] == path else ()
        element = element_path(path, index)
        of_model = path in self.stacks or element in self.leaf
        if kernel is not None and of_model and not self._deeper:
            shape = self.shape(self.leaf[element]).shape if element in self.leaf else ()
            if len(shape) != sum(map(len, axes.kernel)):
                raise _unknown_part(path)
        output = self._new(self.shape(x))
        if not self._deeper:  # otherwise these steps will be made again
            tap = Tap(element, axes, x, path)
            self.steps.append(Step(eqn, (x,), (output,), debug_info, tap))
        return output

    # --- facts about values

    def elements(self, leaves: Mapping[str, Any]) -> Elements:
        """Parameters by path as the program sees them: stacks in elements."""
        return Elements(leaves, self.stacks)

    def parameter(self, value: int) -> str | None:
        """The path of the parameter, or of the element of one, that a value is, or None."""
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

    def watch(
        self, leaves: Mapping[str, Any], batch: Any, watch: Callable[[Tap, jax.Array], None]
    ) -> None:
        """Runs the whole program, and calls `watch` with each tap and its value.

        Args:
          leaves: the parameters, as `elements` gives them.
          batch: a batch.
          watch: what to call.
        """
        env: dict[int, Any] = dict(self.constants)
        env |= zip(self.batch, jax.tree.leaves(batch), strict=True)
        env |= {v: jnp.asarray(leaves[path]) for path, v in self.leaf.items()}
        for step in self.steps:
            inputs = [env[v] for v in step.inputs]
            if step.tap is None:
                env.update(zip(step.outputs, step(*inputs), strict=True))
            else:
                watch(step.tap, inputs[0])
                env[step.outputs[0]] = inputs[0]


def _unknown_part(path: str) -> NotImplementedError:
    return NotImplementedError(
        f"{path}: its layers compute their kernels from the parameter, so calibration cannot tell "
        "which part of it each of them has: skip it with the rule (its path, None)"
    )

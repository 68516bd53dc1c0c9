"""Flax NNX as a model family (`slidejax.functional.Family`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
from flax import nnx

from slidejax.contraction import Contraction
from slidejax.functional import Family, Functional, arguments_of, show_input, show_output
from slidejax.kinds import check_kind
from slidejax.nnx.conversion import convert
from slidejax.nnx.layers import general_contraction
from slidejax.nnx.registered import parameter_of, registered
from slidejax.rules import Skipped

__all__ = ["FAMILY", "functional"]


class _Showing(nnx.Module):
    """A linear layer that shows its input and output (`slidejax.functional`)."""

    shown_path: str

    def __call__(self, inputs, *args, **kwargs):
        known = registered(type(self).__mro__[2])  # the layer's own class
        try:
            if known is not None:
                axes = known.contraction(self, inputs.ndim)
            elif isinstance(self, nnx.Linear):
                axes = Contraction.dense(inputs.ndim)
            elif isinstance(self, nnx.LinearGeneral):
                axes = general_contraction(self, inputs.ndim)
            else:
                given = args[0] if args else kwargs.get("einsum_str")
                axes = Contraction.einsum(given or self.einsum_str, inputs.ndim)  # type: ignore[attr-defined]
        except Skipped:  # a conversion leaves this layer as it is, and says why
            return super().__call__(inputs, *args, **kwargs)
        kernel = getattr(self, "kernel" if known is None else known.parameter).get_value()
        inputs = show_input(self.shown_path, inputs, axes, kernel)
        y = super().__call__(inputs, *args, **kwargs)
        return show_output(self.shown_path, y)


@functools.cache
def _showing(cls: type) -> type | None:
    """The class of layers of this class that show their inputs and outputs; None if not known."""
    if cls not in (nnx.Linear, nnx.LinearGeneral, nnx.Einsum) and registered(cls) is None:
        return None
    return type(cls.__name__, (_Showing, cls), {})


def functional(model: nnx.Module, params: dict | None = None, example: tuple = ()) -> Functional:
    """An NNX module as a function of its parameters.

    Args:
      model: the module; it stays as it is.
      params: nested dicts that take the place of the module's own state.
      example: not needed.

    >>> import jax.numpy as jnp
    >>> made = functional(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    >>> made.run(made.params, jnp.ones((2, 8))).shape
    (2, 4)
    >>> made.pack(made.params, "6:8").kernel.shape
    (8, 4)
    """
    if params is not None:
        check_kind(params, Mapping, "params", "nested dicts of the module's parameters")
    graph, state = nnx.split(model)
    showing = nnx.clone(model)
    names: dict[int, str] = {}  # of kernels: one that layers share has the path of the first
    for path, layer in list(nnx.iter_graph(showing)):
        cls = _showing(type(layer)) if isinstance(layer, nnx.Module) else None
        if cls is None:
            continue
        parameter = parameter_of(layer)
        kernel = vars(layer).get(parameter)
        if isinstance(kernel, nnx.Variable):
            name = "/".join(map(str, (*path, parameter)))
            layer.shown_path = names.setdefault(id(kernel), name)
            layer.__class__ = cls
    showing_graph, _ = nnx.split(showing)

    def merged(graph, params):
        fresh = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(fresh, params)
        return nnx.merge(graph, fresh)

    def run(params, batch):
        return merged(showing_graph, params)(*arguments_of(batch))

    def pack(params, rules, *, prune=None, report=None):
        return convert(merged(graph, params), rules, prune=prune, report=report)

    return Functional(run, nnx.to_pure_dict(state) if params is None else params, pack)


FAMILY = Family("a module of flax.nnx", lambda model: isinstance(model, nnx.Module), functional)

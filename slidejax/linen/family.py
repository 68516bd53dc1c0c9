"""Flax Linen as a model family (`slidejax.functional.Family`)."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn

from slidejax.functional import Family, Functional, arguments_of, watched
from slidejax.kinds import check_kind
from slidejax.linen.conversion import convert
from slidejax.linen.intercept import apply, show_layers, traced_anew

__all__ = ["FAMILY", "functional"]


def functional(model: nn.Module, variables: Mapping | None, example: tuple = ()) -> Functional:
    """A Linen module as a function of its variables.

    Args:
      model: the module.
      variables: the variables that `model.init` returns. They may be boxed with the names of axes.
      example: the arguments of one call. `pack` traces it to see how the layers use their kernels.

    Raises:
      ValueError: if there are no variables.

    >>> import jax, jax.numpy as jnp
    >>> model, x = nn.Dense(4), jnp.ones((2, 8))
    >>> made = functional(model, model.init(jax.random.key(0), x), (x,))
    >>> made.run(made.params, x).shape, made.pack(made.params, "6:8")["params"]["kernel"].shape
    ((2, 4), (8, 4))
    """
    if variables is None:
        raise ValueError("a Linen module needs params=, its variables")
    check_kind(variables, Mapping, "params", "the variables of the module, a mapping")
    boxed, variables = variables, nn.meta.unbox(variables)

    def run(variables, batch):
        rngs = traced_anew() if watched() else None
        with nn.intercept_methods(show_layers):
            return apply(model, variables, *arguments_of(batch), rngs=rngs)

    def pack(params, rules, *, prune=None, report=None):
        # The boxes of the axes' names hold the parameters again, so that packed leaves get names.
        params = nn.meta.replace_boxed(boxed, params)
        return convert(params, rules, model, *example, prune=prune, report=report)

    return Functional(run, variables, pack)


FAMILY = Family("a module of flax.linen", lambda model: isinstance(model, nn.Module), functional)

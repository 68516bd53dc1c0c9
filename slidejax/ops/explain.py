"""`explain`: which implementation each op of a function runs, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from slidejax.ops.choice import Choice, choose
from slidejax.ops.problem import Problem

__all__ = ["explain"]


def explain(
    fn: Callable[..., Any], *args, platform: str | None = None, **kwargs
) -> list[tuple[Problem, Choice]]:
    """Says which implementation each slidejax op of `fn(*args, **kwargs)` runs, and why.

    The function is traced, and nothing is computed.

    Args:
      fn: any traceable function.
      *args, **kwargs: its arguments; a `jax.ShapeDtypeStruct` may stand for an array.
      platform: "cuda" or "cpu"; None for the platform of this process.

    Returns:
      A list of `(Problem, Choice)`, in the order of the program.

    Raises:
      ValueError: if `platform` is something else.

    >>> import jax.numpy as jnp
    >>> import slidejax as sj
    >>> w = sj.pack(jnp.ones((64, 32)), "6:8", dtype="int8")
    >>> [(problem, choice)] = sj.explain(sj.linear, jnp.ones((4, 64)), w, platform="cpu")
    >>> choice.implementation, problem.rows
    ('dense', 4)
    """
    if platform is None:
        platform = "cuda" if jax.default_backend() in ("gpu", "cuda") else "cpu"
    if platform not in ("cuda", "cpu"):
        raise ValueError(f"platform must be 'cuda', 'cpu' or None, got {platform!r}")
    found: list[tuple[Problem, Choice]] = []
    _walk(
        jax.make_jaxpr(fn)(*args, **kwargs).jaxpr,
        "cuda" if platform == "cuda" else "default",
        found,
    )
    return found


def _walk(jaxpr, platform: str, found: list) -> None:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("slidejax_linear", "slidejax_sparse_matmul"):
            settings = eqn.params["settings"]
            op = eqn.primitive.name.removeprefix("slidejax_")
            avals = [v.aval for v in eqn.invars]
            w, _ = settings.weight(avals)
            problem = Problem.of(op, avals[0], w, settings, platform)
            found.append((problem, choose(problem)))
        for inner in _sub_jaxprs(eqn.params.values()):
            _walk(inner, platform, found)


def _sub_jaxprs(values):
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
        elif isinstance(value, (tuple, list)):
            yield from _sub_jaxprs(value)

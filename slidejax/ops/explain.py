"""`explain`: which implementation each op of a function runs, and why."""

from __future__ import annotations

import dataclasses
import numbers
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax

from slidejax.kinds import check_function, check_name
from slidejax.ops import shards
from slidejax.ops.chain import linear_chain_p, runs_in
from slidejax.ops.choice import Choice, choose
from slidejax.ops.problem import Problem, device_kind

__all__ = ["Explanation", "explain"]


class Explanation(list[tuple[Problem, Choice]]):
    """A list of `(Problem, Choice)` that prints one line for each op."""

    def __str__(self) -> str:
        return "\n".join(f"{problem}: {choice}" for problem, choice in self)

    __repr__ = __str__


def explain(fn: Callable[..., Any], *args, platform: str | None = None, **kwargs) -> Explanation:
    """Says which implementation each slidejax op of `fn(*args, **kwargs)` runs, and why.

    The function is traced, and nothing is computed. A program over several devices is compiled,
    too: only the partitioner knows what each device has to multiply. Its problems are those of one
    device. A product with K split is a "sparse_matmul" there, which gives accumulators to be
    summed. The products of a `linear_chain` that is one custom call name the implementation of that
    call.

    Args:
      fn: any traceable function.
      *args, **kwargs: its arguments; a `jax.ShapeDtypeStruct` may stand for an array. Shardings
        over several devices count. Names, booleans and other settings are given to it as they are.
      platform: "cuda" or "cpu"; None for the platform of this process.

    Returns:
      A list of `(Problem, Choice)`, in the order of the program. Printed, it is a line for each op,
      with the layer's name where the model gives one (`jax.named_scope`; Flax's modules do).

    Raises:
      ValueError: if `platform` is something else.
      TypeError: if `fn` is no function.

    >>> import jax.numpy as jnp
    >>> import slidejax as sj
    >>> w = sj.pack(jnp.ones((64, 32)), "6:8", dtype="int8")
    >>> [(problem, choice)] = sj.explain(sj.linear, jnp.ones((4, 64)), w, platform="cpu")
    >>> choice.implementation, problem.rows
    ('dense', 4)
    >>> sj.explain(sj.linear, jnp.ones((4, 64)), w, platform="cpu")
    linear: [4, 64] float32 x 6:8 int8 -> [4, 32] float32: dense (plain JAX; ...
    """
    check_function(fn, "fn")
    if platform is None:
        platform = "cuda" if jax.default_backend() in ("gpu", "cuda") else "cpu"
    check_name(platform, ("cuda", "cpu"), "platform", optional=True)
    platform = "cuda" if platform == "cuda" else "default"
    traced, rest = _apart((args, kwargs))
    found = list(_products(jax.make_jaxpr(_with(fn, rest))(traced).jaxpr, platform))
    if jax.device_count() > 1 and any(product.automatic for product in found):
        found = _of_shards(found, _partitioned(_with(fn, rest), (traced,)), platform)
    return Explanation((product.problem, product.choice()) for product in found)


@dataclasses.dataclass(frozen=True)
class _Product:
    """One product of a program.

    Attributes:
      problem: as the program has it, before it is partitioned.
      key: by which `slidejax.ops.shards` knows it.
      automatic: whether the partitioner may cut it.
      chain: the implementation of the custom call that it is a part of, or None.
    """

    problem: Problem
    key: Any
    automatic: bool
    chain: str | None

    def choice(self) -> Choice:
        if self.chain is None:
            return choose(self.problem)
        return Choice(self.chain, "one call with the products around it")


def _products(
    jaxpr, platform: str, scope: str = "", automatic: bool = False, chain: str | None = None
) -> Iterator[_Product]:
    for eqn in jaxpr.eqns:
        name = _layer(str(eqn.source_info.name_stack))
        inside = f"{scope}/{name}" if scope and name else scope or name
        if eqn.primitive.name in ("slidejax_linear", "slidejax_sparse_matmul"):
            settings = eqn.params["settings"]
            op = eqn.primitive.name.removeprefix("slidejax_")
            avals = [v.aval for v in eqn.invars]
            w, _ = settings.weight(avals)
            problem = Problem.of(op, avals[0], w, settings, platform)
            key = shards.product_key(settings, avals[0].shape, w.values.shape)
            yield _Product(dataclasses.replace(problem, layer=inside), key, automatic, chain)
        kernel = chain
        if eqn.primitive is linear_chain_p:
            found = runs_in([v.aval for v in eqn.invars], eqn.params["settings"], platform, 1)
            kernel = None if found is None else found.name
        cut = automatic or eqn.primitive.name == "custom_partitioning"
        for inner in _sub_jaxprs(eqn.params.values()):
            yield from _products(inner, platform, inside, cut, kernel)


def _layer(stack: str) -> str:
    """A layer's name without the transformations that JAX wraps around it.

    >>> _layer("jvp(mlp)/up"), _layer("transpose(jvp(vmap()))")
    ('mlp/up', '')
    """
    while (name := re.sub(r"(?:jvp|transpose|vmap)\(([^()]*)\)", r"\1", stack)) != stack:
        stack = name
    return name.strip("/")


def _apart(arguments: Any) -> tuple[Any, Any]:
    """A tree of arguments as two, each with None for the leaves of the other.

    Arrays, what stands for them, and numbers are traced. All else is as it is in the function: the
    names, functions and settings that `jax.jit` would want to be static.
    """

    def traces(leaf: Any) -> bool:
        is_array = isinstance(getattr(leaf, "shape", None), tuple) and hasattr(leaf, "dtype")
        return is_array or (isinstance(leaf, numbers.Number) and not isinstance(leaf, bool))

    return (
        jax.tree.map(lambda leaf: leaf if traces(leaf) else None, arguments),
        jax.tree.map(lambda leaf: None if traces(leaf) else leaf, arguments),
    )


def _with(fn: Callable[..., Any], rest: Any) -> Callable[[Any], Any]:
    """`fn` as a function of the traced part of its arguments."""

    def called(traced: Any) -> Any:
        args, kwargs = jax.tree.map(
            lambda mine, other: other if mine is None else mine,
            traced,
            rest,
            is_leaf=lambda leaf: leaf is None,
        )
        return fn(*args, **kwargs)

    return called


def _partitioned(fn: Callable[..., Any], args: tuple) -> shards.Shards:
    """The problems of the shards of each product; empty if the program runs on one device."""

    def explained(*args):
        return fn(*args)

    # A program that is in JAX's cache is not partitioned again, so this one has a name of its own.
    explained.__name__ = f"explained_{uuid.uuid4().hex}"
    with shards.recording() as found:
        lowered = jax.jit(explained).lower(*args)
        module: Any = lowered.compiler_ir()
        if module.operation.attributes["mhlo.num_partitions"].value > 1:
            lowered.compile()
        return dict(found)


def _of_shards(products: list[_Product], cuts: shards.Shards, platform: str) -> list[_Product]:
    """The products as one device computes them."""
    remaining = {key: [s for s in lists if s] for key, lists in cuts.items()}
    result = []
    for product in products:
        mine = remaining.get(product.key)
        if not product.automatic or not mine:
            result.append(product)
            continue
        # Equal products may have been merged, so the last cut stays for those that follow.
        of_shard = mine.pop(0) if len(mine) > 1 else mine[0]
        for problem in of_shard:
            here = dataclasses.replace(
                problem,
                platform=platform,
                device=device_kind(platform),
                layer=product.problem.layer,
            )
            result.append(dataclasses.replace(product, problem=here, chain=None))
    return result


def _sub_jaxprs(values):
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
        elif isinstance(value, (tuple, list)):
            yield from _sub_jaxprs(value)

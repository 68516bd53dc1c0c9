"""The kinds of linear layers that race in a whole decoder, and its weights of each kind."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.bench import contenders, decoder
from slidejax.bench.shapes import Sizes
from slidejax.bench.timing import FAILURES, nbytes, reason
from slidejax.ops.linear import linear
from slidejax.variants.prepared import prepare
from slidejax.weights import numerics
from slidejax.weights.packed import pack
from slidejax.weights.pattern import UNPRUNED, Pattern

__all__ = ["BF16", "JAX_8_BIT", "NO_LINEARS", "OURS_DENSE", "Kind", "kinds", "weights_of_kinds"]

BF16 = "jax bf16"
JAX_8_BIT = ("jax int8", "jax fp8", contenders.WEIGHTS_ALONE)
OURS_DENSE = "dense int8"
NO_LINEARS = "no linear layers"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of linear layer.

    Attributes:
      name: its name in tables.
      make: the weights of one layer, from W `[out, in]` in bfloat16. Kinds with the same function
        share their weights.
      multiply: `(x [..., in], weights) -> [..., out]`.
      after: what is done to all blocks' weights once they are made.
    """

    name: str
    make: Callable[[jax.Array], Any]
    multiply: decoder.Multiply
    after: Callable[[Any], Any] | None = None

    @property
    def exchanged(self) -> decoder.Multiply | None:
        """The function in place of `slidejax.linear` in the decoder; None for slidejax itself."""
        return None if self.multiply is linear else self.multiply


def _of_rows(layer: contenders.JaxLayer) -> decoder.Multiply:
    """The layer of rows for any leading axes."""

    def multiply(x: jax.Array, weights: Any) -> jax.Array:
        y = layer.apply(x.reshape(-1, x.shape[-1]), weights)
        return y.reshape(*x.shape[:-1], -1)

    return multiply


def _packed(pattern: Pattern, dtype: Any, w: jax.Array) -> Any:
    return pack(w.T, pattern, dtype=dtype)


def kinds(patterns: Sequence[Pattern], dtypes: Sequence[Any]) -> list[Kind]:
    """The kinds that race.

    Args:
      patterns: of slidejax's weights; `dense` is always there, too.
      dtypes: of their values; the dense one is always int8, too.
    """
    found = [Kind(layer.name, layer.weights, _of_rows(layer)) for layer in contenders.JAX_LAYERS]
    int8 = numerics.check_dtype("int8")
    pairs = [(p, d) for p in patterns for d in dtypes] + [(UNPRUNED, int8)]
    for pattern, dtype in dict.fromkeys(pairs):
        name = f"{pattern} {dtype.name}"
        make = functools.partial(_packed, pattern, dtype)
        if pattern.prunes:
            found.append(Kind(f"{name} raw", make, linear))
            found.append(Kind(f"{name} prepared", make, linear, prepare))
        else:
            found.append(Kind(name, make, linear))
    # One output of W takes the place of each product. The step then takes the time of all the rest.
    found.append(Kind(NO_LINEARS, lambda w: w[:, 0], lambda x, w: x[..., :1] * w))
    return found


@functools.partial(jax.jit, static_argnums=1)
def _kernel(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """W `[out, in]` in bfloat16, with the spread of an initialised layer."""
    return jax.random.normal(key, shape, jnp.bfloat16) * shape[1] ** -0.5


def _made(kind: Kind, sizes: Sizes, layers: int) -> list[dict[str, Any]]:
    """The weights of all blocks; every layer has values of its own."""
    make = jax.jit(kind.make)
    return jax.block_until_ready(
        [
            {
                name: make(_kernel(jax.random.fold_in(jax.random.key(layer), i), shape))
                for i, (name, shape) in enumerate(sizes.linears.items())
            }
            for layer in range(layers)
        ]
    )


def weights_of_kinds(
    racing: Sequence[Kind], sizes: Sizes, layers: int, note: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The weights of a decoder, in every kind that fits into the memory.

    Args:
      racing: the kinds, with distinct names.
      sizes: of the decoder.
      layers: its blocks.
      note: called with a line of text for each kind.

    Returns:
      The weights of all blocks by kind, and the reasons of the kinds that cannot be made.
    """
    found: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    shared: dict[Callable, Any] = {}
    for kind in racing:
        note(f"weights of {kind.name}")
        try:
            if kind.make not in shared:
                shared[kind.make] = _made(kind, sizes, layers)
            weights = shared[kind.make]
            if kind.after is not None:
                weights = jax.block_until_ready(kind.after(weights))
                if nbytes(weights) == nbytes(shared[kind.make]):
                    reasons[kind.name] = "sj.prepare adds nothing on this device"
                    continue
            found[kind.name] = weights
        except FAILURES as error:
            reasons[kind.name] = reason(error)
    return found, reasons

"""Choosing the next token: the likeliest, or a draw among the likeliest."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slidejax import bounds
from slidejax.weights.numerics import of_rank

__all__ = ["Draw", "Sampling", "choose", "keep", "whole"]


def whole(value: Any) -> int:
    """A whole number of Python, NumPy or JAX; a TypeError for anything else, and for booleans.

    >>> whole(np.int64(3))
    3
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError("a boolean is no number")
    return operator.index(value)


def _whole(name: str, value: Any) -> int:
    """A whole number of any kind, as Python's."""
    try:
        return whole(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r:.80}") from None


def _number(name: str, value: Any) -> float:
    """A number as a float, whatever kind it is."""
    try:
        if isinstance(value, (str, bytes, bool, np.bool_)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number, got {value!r:.80}") from None


_BOUNDS = {
    "temperature": bounds.TEMPERATURE,
    "top_k": bounds.TOP_K,
    "top_p": bounds.TOP_P,
    "seed": bounds.SEED,
}
_COLDEST = np.finfo(np.float32).tiny  # a device may take less for 0


class Draw(NamedTuple):
    """The numbers of a `Sampling`, as arguments of a compiled program."""

    seed: Any  # uint32
    temperature: Any  # float32
    top_k: Any  # int32
    top_p: Any  # float32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Only these numbers count; files beside a model do not change them.

    Attributes:
      temperature: 0 takes the likeliest token. Above 0 one is drawn, with logits divided by it;
        at most 1e38.
      top_k: draw among the k likeliest tokens; 0 is all.
      top_p: draw among the fewest likeliest tokens whose probabilities sum to this; 1 is all
        (nucleus sampling, arXiv 1904.09751). Probabilities are those after `top_k`.
      seed: of the draws, 0 to 2**32 - 1. Each row of a batch draws from its own stream.

    Raises:
      ValueError: naming the number that is out of range.

    >>> Sampling().kind, Sampling(temperature=0.7).kind, Sampling(temperature=0.7, top_p=0.9).kind
    ('greedy', 'all', 'filtered')
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, bound in _BOUNDS.items():
            value = getattr(self, name)
            if (_whole if bound.whole else _number)(name, value) not in bound:
                raise ValueError(f"{name} must be {bound}, got {value!r:.80}")

    @property
    def kind(self) -> str:
        """The one of three programs that it needs; the numbers themselves are not compiled in."""
        if self.temperature == 0:
            return "greedy"
        return "all" if self.top_k == 0 and self.top_p == 1 else "filtered"

    def draw(self) -> Draw:
        """The numbers as NumPy scalars."""
        return Draw(
            np.uint32(self.seed),
            max(np.float32(self.temperature), _COLDEST),
            np.int32(self.top_k),
            np.float32(self.top_p),
        )


def keep(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The tokens that can be drawn, when tokens are in order of their logits.

    Args:
      logits: float32 `[..., vocab]`, the largest first, divided by the temperature.
      top_k: int32; 0 is all.
      top_p: float32.

    Returns:
      bool `[..., vocab]`. The first token is always kept.

    >>> keep(jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125])), 0, 0.6).tolist()
    [True, True, False, False]
    """
    rank = of_rank(jnp.arange(logits.shape[-1]), logits.ndim)
    kept = (top_k == 0) | (rank < top_k)
    chance = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    before = jnp.cumsum(chance, axis=-1) - chance
    # Rounding may leave the sum below 1, so 1 is not compared with it.
    return (kept & ((top_p >= 1) | (before < top_p))) | (rank == 0)


def choose(logits: jax.Array, positions: jax.Array, draw: Draw, kind: str) -> jax.Array:
    """The next token of each row.

    Args:
      logits: float32 `[batch, vocab]`.
      positions: int32 `[batch]`, those of the tokens that are chosen. A draw depends on the seed,
        the row and the position, so it does not matter how many tokens one call computes.
      draw: the numbers.
      kind: "greedy", "all" or "filtered". Static.

    Returns:
      int32 `[batch]`. Of equal logits the lowest id is the likelier.
    """
    if kind == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # From the largest on, so that no small temperature overflows.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / draw.temperature
    batch, vocab = logits.shape
    ids = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), logits.shape)
    if kind == "filtered":
        falling, ids = jax.lax.sort((-logits, ids), num_keys=1, is_stable=True)
        logits = jnp.where(keep(-falling, draw.top_k, draw.top_p), -falling, -jnp.inf)
    root = jax.random.key(draw.seed)

    def one(row: jax.Array, position: jax.Array, logits: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(root, row), position)
        return jax.random.categorical(key, logits)

    drawn = jax.vmap(one)(jnp.arange(batch), positions, logits)
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0]

"""The two compiled programs of generation: one reads prompts, one writes tokens.

Both are `jax.jit` of a function of pytrees. The parameters are arguments, so other parameters of
the same structure share the programs. Shapes come in few sizes:

- the number of rows, the length of prompts and the length of the cache are powers of two;
- a prompt that is longer than a chunk is read in chunks, in a loop inside the program, so that no
  array has the prompt's length squared;
- a call of the second program writes up to `BLOCK` tokens on a CPU. How many is an argument, and
  the call ends early when all rows have ended.
- On other devices a call always takes `STEPS` steps. A loop that asks whether to go on must bring
  the answer to the host in every step, and the device would wait for it. Steps beyond the end
  change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from slidejax.bounds import COUNT, COUNT_OR_NONE
from slidejax.kinds import check_function
from slidejax.lm.generation.sampling import Draw, choose

__all__ = ["BLOCK", "CHUNK", "STEPS", "Programs", "State", "bucket"]

CHUNK = 512  # tokens of a prompt that are read at once
BLOCK = 32  # tokens that one call writes at most, where the loop may end early
STEPS = 8  # steps of one call, where it may not
_SHORTEST = 16  # the smallest length that is compiled for

Apply = Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two that is not below `size` or `least`.

    >>> bucket(3), bucket(5, least=16), bucket(600)
    (4, 16, 1024)
    """
    return 1 << (max(size, least) - 1).bit_length()


class State(NamedTuple):
    """The state that goes from one call to the next. It is donated.

    Attributes:
      cache: keys and values of all tokens before the last one.
      tokens: int32 `[batch]`, the last token of each row, which has not been read yet.
      positions: int32 `[batch]`, its position.
      live: bool `[batch]`, whether the row goes on.
    """

    cache: Any
    tokens: jax.Array
    positions: jax.Array
    live: jax.Array


class Programs:
    """The compiled programs of one decoder.

    Args:
      init_cache: `init_cache(batch, length)` makes an empty cache, a pytree.
      apply: `apply(params, ids, positions, cache)` gives float32 logits `[batch, vocab]` of the
        last token of each row and the new cache. `ids` and `positions` are int32 `[batch, tokens]`;
        a position of -1 marks padding, which is not written. The slot of a token is its position.
      chunk: tokens of a prompt that are read at once, a power of two.
      start: `apply` for the first chunk of prompts, where token i of a row is at position i or is
        padding behind the row. None takes `apply`.
      steps: how many steps each call of `decode` takes; 0: as many as it is asked for, at most
        `BLOCK`. None is 0 on a CPU and `STEPS` elsewhere.

    Raises:
      TypeError, ValueError: naming it, if an argument is of a wrong kind or out of its range.

    Attributes:
      steps: as given, or the number that None stands for.
      traced: the programs that were traced so far: `("prefill", rows, tokens, slots, kind)` or
        `("decode", rows, elements of the cache, kind)`. A test counts them.
    """

    def __init__(
        self,
        init_cache: Callable[[int, int], Any],
        apply: Apply,
        *,
        chunk: int = CHUNK,
        start: Apply | None = None,
        steps: int | None = None,
    ):
        for name, function in (("init_cache", init_cache), ("apply", apply)):
            check_function(function, name)
        check_function(start, "start", optional=True)
        chunk = COUNT.check(chunk, "chunk")
        if steps is not None:
            steps = COUNT_OR_NONE.check(steps, "steps")
        else:
            steps = 0 if jax.default_backend() == "cpu" else STEPS
        self.steps = steps
        self._init_cache, self._apply, self._chunk = init_cache, apply, chunk
        self._start = apply if start is None else start
        self.traced: list[tuple] = []
        # Functions of their own, so that profiles and compilation logs name them.
        self.prefill = jax.jit(self._prefill, static_argnames=("length", "kind"))
        self.decode = jax.jit(self._decode, static_argnames="kind", donate_argnames="state")

    @property
    def block(self) -> int:
        """The tokens that one call of `decode` writes at most."""
        return self.steps or BLOCK

    @staticmethod
    def prompt_length(tokens: int) -> int:
        """The length that prompts are padded to."""
        return bucket(tokens, _SHORTEST)

    @staticmethod
    def cache_length(tokens: int, context: int) -> int:
        """The length of the cache for a number of tokens in all, at most the model's context."""
        return min(bucket(tokens, 4 * _SHORTEST), max(context, tokens))

    def _prefill(
        self,
        params: Any,
        ids: jax.Array,
        lengths: jax.Array,
        live: jax.Array,
        ends: jax.Array,
        draw: Draw,
        *,
        length: int,
        kind: str,
    ) -> tuple[State, jax.Array, jax.Array]:
        """Reads prompts and chooses the first new token of each.

        Args:
          params: the decoder's parameters.
          ids: int32 `[batch, tokens]`, prompts with anything behind them.
          lengths: int32 `[batch]`, at least 1.
          live: bool `[batch]`, False for rows that only fill up the batch.
          ends: int32 `[ends]`, the tokens that end a row; -1 is none.
          draw: how tokens are chosen.
          length: slots of the cache. Static.
          kind: as in `choose`. Static.

        Returns:
          The state, int32 `[batch]` of tokens, and bool `[batch]`: rows whose logits have a nan.
        """
        batch, tokens = ids.shape
        self.traced.append(("prefill", batch, tokens, length, kind))
        cache = self._init_cache(batch, length)
        chunk = min(tokens, self._chunk)

        def read(index: Any, cache: Any, apply: Apply) -> tuple[jax.Array, Any]:
            part = lax.dynamic_slice_in_dim(ids, index * chunk, chunk, axis=1)
            at = jnp.broadcast_to(index * chunk + jnp.arange(chunk), part.shape)
            at = jnp.where(at < lengths[:, None], at, -1).astype(jnp.int32)
            return apply(params, part, at, cache)

        def step(index: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            logits, cache = read(index, carry[1], self._apply)
            here = (lengths - 1) // chunk == index  # the row's last token is in this chunk
            return jnp.where(here[:, None], logits, carry[0]), cache

        logits, cache = read(0, cache, self._start)
        if tokens > chunk:
            count = (jnp.max(lengths) + chunk - 1) // chunk
            logits, cache = lax.fori_loop(1, count, step, (logits, cache))
        chosen, live, bad = _choose(logits, lengths, live, ends, draw, kind)
        return State(cache, chosen, lengths, live), chosen, bad

    def _decode(
        self,
        params: Any,
        state: State,
        live: jax.Array,
        ends: jax.Array,
        draw: Draw,
        limit: jax.Array,
        *,
        kind: str,
    ) -> tuple[State, jax.Array, jax.Array]:
        """Writes up to `limit` tokens to each row that goes on.

        Args:
          params, ends, draw, kind: as for prefill.
          state: what the last call returned. It is donated.
          live: bool `[batch]`, False ends a row, as a stop that was found in its text does.
          limit: int32, at most `block`; or one for each row, `[batch]`. A row beyond its own would
            leave the cache.

        Returns:
          The state, int32 `[batch, block]` of tokens with -1 where a row has none, and bool
          `[batch]`: rows whose logits have a nan.
        """
        batch = state.tokens.shape[0]
        size = sum(leaf.size for leaf in jax.tree.leaves(state.cache))
        self.traced.append(("decode", batch, size, kind))

        def go_on(carry: tuple) -> jax.Array:
            index, state, _, _ = carry
            return jnp.any((index < limit) & state.live)

        def step(carry: tuple) -> tuple:
            index, state, written, bad = carry
            counts = index < limit
            live = state.live & counts
            ids = jnp.where(live, state.tokens, 0)[:, None]
            at = jnp.where(live, state.positions, -1)[:, None]
            logits, cache = self._apply(params, ids, at, state.cache)
            positions = state.positions + 1
            chosen, live, now = _choose(logits, positions, live, ends, draw, kind)
            written = lax.dynamic_update_slice_in_dim(written, chosen[:, None], index, axis=1)
            after = (
                jnp.where(counts, new, old)
                for new, old in zip((chosen, positions, live), state[1:], strict=True)
            )
            return index + 1, State(cache, *after), written, bad | now

        carry = (
            jnp.int32(0),
            state._replace(live=state.live & live),
            jnp.full((batch, self.block), -1, jnp.int32),
            jnp.zeros(batch, bool),
        )
        if self.steps:
            carry = lax.fori_loop(0, self.steps, lambda _, carry: step(carry), carry)
        else:
            carry = lax.while_loop(go_on, step, carry)
        _, state, written, bad = carry
        return state, written, bad


def _choose(
    logits: jax.Array,
    positions: jax.Array,
    live: jax.Array,
    ends: jax.Array,
    draw: Draw,
    kind: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tokens (-1 for a row that has ended), which rows go on, and which have a nan."""
    # Not by a maximum: on some devices it passes over nan.
    bad = jnp.any(jnp.isnan(logits), axis=-1) & live
    chosen = choose(logits.astype(jnp.float32), positions, draw, kind)
    ended = jnp.any(chosen[:, None] == ends[None], axis=1)
    return jnp.where(live, chosen, -1), live & ~ended & ~bad, bad

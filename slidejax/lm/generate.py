"""Generating text with a Hugging Face Flax model, original or converted, as one jitted program."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bounds import COUNT
from slidejax.lm.generation.sampling import Sampling
from slidejax.token_ids import int32_ids

__all__ = ["Generated", "Generator"]


def check_generates(model: Any) -> None:
    """Raises a TypeError unless the model is a causal language model."""
    kind = type(model).__name__
    if not hasattr(model, "config") or not hasattr(model, "can_generate"):
        raise TypeError(f"model must be a Flax language model of transformers, got {kind}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"{kind} has an encoder: it is no causal model, which continues its prompt")
    if not model.can_generate():
        raise TypeError(f"{kind} has no language model head: it cannot generate")


def end_tokens(model: Any) -> set[int]:
    """All tokens that end a text, by the model's `generation_config`."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {ends}


def generation_options(
    model: Any,
    max_new_tokens: int,
    ends: set[int],
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Any:
    """A `transformers.GenerationConfig` with these settings and no others.

    The settings of the model's own one would take the place of those that are not given: a number
    of beams, for one, would make a search of what is to be the likeliest token each time.
    """
    from transformers import GenerationConfig

    sampled = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        do_sample=temperature > 0,
        **(sampled if temperature > 0 else {}),
        # An id that is never produced where generation must not stop; transformers wants some id,
        # and one only.
        eos_token_id=min(ends) if ends else model.config.vocab_size,
        pad_token_id=model.generation_config.pad_token_id or 0,
    )


class Generated(NamedTuple):
    """Tokens that a model wrote.

    Attributes:
      tokens: the new token ids, up to and without the end-of-text token.
      steps: how many tokens were computed.
      seconds: the time they took, without compiling.
    """

    tokens: list[int]
    steps: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.steps / self.seconds


class Generator:
    """A model's `.generate` as one jitted program, from the prompt to the tokens.

    It compiles once for each prompt length. Parameters are an argument of the compiled program, so
    the same generator serves other parameters of the same kind.

    Args:
      model: a Hugging Face Flax causal language model, original or converted. The settings of its
        `generation_config` do not count, but for the tokens that end a text.
      max_new_tokens: how many tokens to write at most.
      temperature: 0 takes the likeliest token each time; above 0 samples.
      top_k: sample among the likeliest k only; 0: among all.
      top_p: sample among the likeliest tokens that have this probability together; 1: among all.
      stop: end at the model's end-of-text token; False to always write `max_new_tokens`, for
        timing.

    Raises:
      ValueError: an argument is out of range.
      TypeError: the model cannot generate, or does not continue its prompt (an encoder-decoder).
    """

    def __init__(
        self,
        model: Any,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: bool = True,
    ):
        max_new_tokens = COUNT.check(max_new_tokens, "max_new_tokens")
        Sampling(temperature, top_k, top_p)  # raises for values out of range
        check_generates(model)
        self._max_new_tokens = max_new_tokens
        self._positions = getattr(model.config, "max_position_embeddings", None)
        self._vocab_size = model.config.vocab_size
        self._ends = end_tokens(model) if stop else set()
        self._params = model.params
        options = generation_options(
            model, max_new_tokens, self._ends, temperature=temperature, top_k=top_k, top_p=top_p
        )

        def run(params: Any, ids: jax.Array, key: jax.Array) -> jax.Array:
            return model.generate(
                ids, params=params, prng_key=key, generation_config=options
            ).sequences

        self._run = jax.jit(run)
        self._compiled: dict[Any, Any] = {}

    def check(self, prompt: Sequence[int]) -> np.ndarray:
        """The prompt as an array.

        Raises:
          ValueError: it is empty, leaves the vocabulary, or does not fit the model's positions.
        """
        ids = int32_ids(prompt, "prompt")
        if ids.ndim != 1 or ids.size == 0 or ids.min() < 0 or ids.max() >= self._vocab_size:
            raise ValueError(
                f"prompt must be at least one token id in 0..{self._vocab_size - 1}, "
                f"got {list(prompt)[:8]}"
            )
        if self._positions is not None and ids.size + self._max_new_tokens > self._positions:
            raise ValueError(
                f"prompt of {ids.size} tokens and {self._max_new_tokens} new ones exceed the "
                f"model's {self._positions} positions"
            )
        return ids

    def compile(self, prompt_tokens: int, *, params: Any = None) -> None:
        """Compiles for prompts of this many tokens before they come; a thread may do that."""
        self._program(self._args(np.zeros(prompt_tokens, np.int32), params, 0))

    def _args(self, ids: np.ndarray, params: Any, seed: int) -> tuple[Any, jax.Array, jax.Array]:
        return (
            self._params if params is None else params,
            jnp.asarray(ids)[None],
            jax.random.PRNGKey(seed),
        )

    def _program(self, args: tuple[Any, jax.Array, jax.Array]) -> Any:
        signature = (
            args[1].size,
            jax.tree.structure(args[0]),
            *(x.dtype for x in jax.tree.leaves(args[0])),
        )
        if signature not in self._compiled:
            self._compiled[signature] = self._run.lower(*args).compile()
        return self._compiled[signature]

    def __call__(self, prompt: Sequence[int], *, params: Any = None, seed: int = 0) -> Generated:
        """Continues a prompt.

        Args:
          prompt: token ids, at least one.
          params: parameters to run with; None: the model's own.
          seed: for sampling.

        Raises:
          ValueError: as `check`.
        """
        ids = self.check(prompt)
        args = self._args(ids, params, seed)
        run = self._program(args)
        begin = time.perf_counter()
        sequence = np.asarray(run(*args))[0]
        seconds = time.perf_counter() - begin
        new = sequence[ids.size :].tolist()
        end = next((i for i, token in enumerate(new) if token in self._ends), None)
        # the end-of-text token was computed too; what follows it is padding
        steps = len(new) if end is None else end + 1
        return Generated(new[:end], steps, seconds)

"""Distillation: a pruned model, the student, learns from the original one, the teacher.

The loss is the Kullback-Leibler divergence of the student's distribution of the next token from the
teacher's, averaged over positions (Hinton et al., arXiv 1503.02531). The distance between the
hidden states can be added. No labels are needed, so any tokens will do, also tokens that the
teacher writes (`sample`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bounds import COUNT, SEED, Bound
from slidejax.kinds import check_function
from slidejax.prune.model.divergence import TEMPERATURE, kl_divergence
from slidejax.token_ids import check_rows, int32_ids

__all__ = ["check_model", "distillation_loss", "kl_divergence", "rows_of", "sample"]


def check_model(model: Any, name: str, needs: tuple[str, ...] = ("config", "params")) -> Any:
    """A language model: a decoder of slidejax, or a Flax model of transformers.

    Args:
      model: what a caller gave.
      name: of the argument, for the error.
      needs: the attributes that it must have.

    Raises:
      TypeError: naming the argument, if it is something else.
    """
    if not all(hasattr(model, one) for one in needs):
        raise TypeError(
            f"{name} must be a slidejax.lm.Decoder or a Flax language model of transformers, got "
            f"{type(model).__name__}: train other models with slidejax.trainable.masters"
        )
    return model


def distillation_loss(
    model: Any, teacher: Any, *, temperature: float = 1.0, hidden: float = 0.0
) -> Callable[..., jax.Array]:
    """The loss of a converted language model against the original one, for `slidejax.train.fit`.

    Args:
      model: the student, a converted `slidejax.lm.Decoder` or Hugging Face Flax model.
      teacher: the original model, with the same vocabulary.
      temperature: see `kl_divergence`.
      hidden: weight of the hidden states' loss: their squared distance divided by the squared
        length of the teacher's, averaged over all layers.

    Returns:
      `(params, ids, teacher_params) -> loss`, with integer ids `[batch, length]`.

    Raises:
      TypeError, ValueError: naming the number that is none, or out of range.
    """
    for name, one in (("model", model), ("teacher", teacher)):
        if not hasattr(one, "outputs"):
            check_function(one, name)
    TEMPERATURE.check(temperature, "temperature")
    Bound(0).check(hidden, "hidden")

    def loss(params: Any, ids: jax.Array, teacher_params: Any) -> jax.Array:
        mine, my_states = _outputs(model, params, ids, bool(hidden))
        theirs, their_states = jax.lax.stop_gradient(
            _outputs(teacher, teacher_params, ids, bool(hidden))
        )
        total = kl_divergence(mine, theirs, temperature)
        if hidden:
            # The first pair are the embeddings, which are the same in both.
            pairs = list(zip(my_states[1:], their_states[1:], strict=True))
            total += hidden * sum(_distance(a, b) for a, b in pairs) / len(pairs)
        return total

    return loss


def _outputs(model: Any, params: Any, ids: jax.Array, states: bool) -> tuple[jax.Array, tuple]:
    """Logits and hidden states of a decoder of slidejax, or of a model of transformers."""
    if hasattr(model, "outputs"):
        return model.outputs(params, ids)
    made = model(ids, params=params, **({"output_hidden_states": True} if states else {}))
    return made.logits, made.hidden_states if states else ()


def _distance(mine: jax.Array, theirs: jax.Array) -> jax.Array:
    """Squared distance over the squared length of `theirs`, averaged over positions."""
    mine, theirs = mine.astype(jnp.float32), theirs.astype(jnp.float32)
    return jnp.mean(jnp.sum((mine - theirs) ** 2, -1) / jnp.maximum(jnp.sum(theirs**2, -1), 1e-6))


def rows_of(tokens: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """Token ids as int32 rows `[n, length]`; tokens that fill no row are dropped.

    Args:
      tokens: one long text `[n]`, or a matrix whose rows are cut.
      length: tokens in a row.

    Raises:
      ValueError: if no row can be filled, or the ids are not integers.

    >>> rows_of([1, 2, 3, 4, 5], 2).tolist()
    [[1, 2], [3, 4]]
    """
    ids = np.asarray(tokens)
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"tokens must be token ids [n] or [rows, length], got {ids.dtype} {ids.shape}"
        )
    count = ids.shape[-1] // length if length > 0 else 0
    if count == 0 or ids.size == 0:
        raise ValueError(
            f"tokens fill no row of {length}: their shape is {ids.shape}; give longer text or "
            "shorter rows"
        )
    return int32_ids(ids[..., : count * length].reshape(-1, length))


def sample(
    model: Any,
    prompts: np.ndarray,
    length: int,
    *,
    params: Any = None,
    temperature: float = 1.0,
    batch: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """Text that a model writes itself, for distillation without other data (arXiv 2305.17888).

    Args:
      model: a `slidejax.lm.Decoder` or a Hugging Face Flax language model.
      prompts: token ids `[n, prompt]` at the beginning of the rows; single random tokens will do.
      length: tokens in a row, with its prompt.
      params: the parameters to run with; None: the model's own.
      temperature: divides the logits; 1 draws from the model's own distribution.
      batch: rows written at a time.
      seed: the seed of the draws.

    Returns:
      int32 `[n, length]`.

    Raises:
      TypeError: if the model is of another kind.
      ValueError: if a number is out of its range; if the prompts are not a matrix of the model's
        tokens, or not shorter than `length`; if that is more than the model's context.
    """
    check_model(model, "model", ("generate", "config"))
    length, batch = COUNT.check(length, "length"), COUNT.check(batch, "batch")
    TEMPERATURE.check(temperature, "temperature")
    SEED.check(seed, "seed")
    prompts = np.asarray(prompts)
    if prompts.ndim != 2 or prompts.size == 0 or not prompts.shape[1] < length:
        raise ValueError(
            f"prompts must be token ids [n, prompt] with prompt < {length}, the length, "
            f"got shape {prompts.shape}"
        )
    config = model.config
    check_rows(prompts, config.vocab_size, name="prompts")
    context = getattr(config, "max_positions", getattr(config, "max_position_embeddings", None))
    if context is not None and length > context:
        raise ValueError(f"length must be at most the model's context, {context}, got {length}")
    batch = min(batch, len(prompts))
    if hasattr(model, "outputs"):  # a decoder of slidejax
        return _sample_decoder(model, prompts, length, params, temperature, batch, seed)
    never = model.config.vocab_size  # This is no token, so no text ends before the end of its row.
    options = {
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "max_length": length,
        "eos_token_id": never,
        "pad_token_id": 0,
    }

    @jax.jit
    def write(params, ids, key):
        return model.generate(ids, params=params, prng_key=key, **options).sequences

    short = -len(prompts) % batch
    padded = int32_ids(np.concatenate([prompts, prompts[:1].repeat(short, 0)]), "prompts")
    params = model.params if params is None else params
    keys = jax.random.split(jax.random.PRNGKey(seed), len(padded) // batch)
    rows = [
        np.asarray(write(params, padded[i * batch : (i + 1) * batch], key))
        for i, key in enumerate(keys)
    ]
    return np.concatenate(rows)[: len(prompts)]


def _sample_decoder(
    model: Any,
    prompts: np.ndarray,
    length: int,
    params: Any,
    temperature: float,
    batch: int,
    seed: int,
) -> np.ndarray:
    """`sample` with a decoder's own loop."""
    rows = []
    for at in range(0, len(prompts), batch):
        part = prompts[at : at + batch]
        made = model.generate(
            part.tolist(),
            max_new_tokens=length - prompts.shape[1],
            temperature=temperature,
            seed=(seed * 1_000_003 + at) % 2**32,  # no two batches draw alike
            ends=(),
            params=params,
        )
        rows += [[*prompt, *new.tokens] for prompt, new in zip(part.tolist(), made, strict=True)]
    return np.asarray(rows, np.int32)

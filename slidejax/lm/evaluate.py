"""The quality of a language model on a text: perplexity, accuracy, agreement with another model.

The model runs as it will serve: its own `__call__` under `jax.jit`, with the parameters that it
has, packed or not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.lm.texts import WINDOW
from slidejax.ops.meshes import automatic, on_mesh
from slidejax.token_ids import int32_ids
from slidejax.weights.numerics import of_rank

__all__ = [
    "Agreement",
    "Evaluation",
    "Evaluator",
    "default_batch",
    "evaluate",
    "fitting",
    "windows",
]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How close a model's predictions are to those of another model.

    Attributes:
      top1: the share of positions at which both models rank the same token first.
      kl: mean Kullback-Leibler divergence of this model's distribution from the other's, in nats.
    """

    top1: float
    kl: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
      perplexity: exp of the mean negative log-likelihood of a token.
      next_token_accuracy: the share of tokens that the model ranked first.
      tokens: the number of predicted tokens.
      agreement: the agreement with the reference model, or None without one.
      losses: float32 `[tokens]`, the negative log-likelihood of each token in nats.
    """

    perplexity: float
    next_token_accuracy: float
    tokens: int
    agreement: Agreement | None = None
    losses: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.float32), repr=False, compare=False
    )


def windows(tokens: Sequence[int] | np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts tokens into windows, in which every token but the first is predicted exactly once.

    Args:
      tokens: at least two token ids.
      length: the number of predictions in a window.

    Returns:
      int32 [n, length + 1] and float32 [n, length]: the windows, and 1 where a prediction counts.
      Neighbours share one token, and the last window is padded with zeros.

    Raises:
      ValueError: if there are fewer than two tokens, or `length` is not positive.

    >>> windows([1, 2, 3, 4], 2)[0].tolist(), windows([1, 2, 3, 4], 2)[1].tolist()
    ([[1, 2, 3], [3, 4, 0]], [[1.0, 1.0], [1.0, 0.0]])
    """
    ids = int32_ids(tokens)
    if ids.ndim != 1 or ids.size < 2:
        raise ValueError(f"tokens must be at least two token ids, got shape {ids.shape}")
    if length < 1:
        raise ValueError(f"length must be positive, got {length}")
    count = -(-(ids.size - 1) // length)
    padded = np.zeros(count * length + 1, np.int32)
    padded[: ids.size] = ids
    counts = np.zeros(count * length, np.float32)
    counts[: ids.size - 1] = 1
    index = np.arange(count)[:, None] * length + np.arange(length + 1)
    return padded[index], counts.reshape(count, length)


def default_batch() -> int:
    """The number of windows that the commands run at a time on this device."""
    return 2 if jax.default_backend() == "cpu" else 8


def fitting(window: int, *models: Any) -> int:
    """The largest window, up to the given one, that fits into the positions of all models."""
    names = ("max_position_embeddings", "max_positions")  # transformers', and a decoder's
    return min(window, *(getattr(m.config, name, window) for m in models for name in names))


class Evaluator:
    """Evaluates a model with its own or with other parameters.

    Parameters of the same structure share one compiled program.

    Args:
      model: a Hugging Face Flax causal language model, converted or not.
      window: the number of predictions in one sequence. The context of a window begins with its
        first token.
      batch: the number of windows that run at a time.
      reference: another model with the same vocabulary, to measure agreement with.
      start: token ids that stand before each window, as they do before a text in use. They are not
        predicted.

    Raises:
      ValueError: if the window is longer than the model's positions.
      TypeError: if the model has an encoder.
    """

    def __init__(
        self,
        model: Any,
        *,
        window: int = WINDOW,
        batch: int = 4,
        reference: Any = None,
        start: Sequence[int] = (),
    ):
        if getattr(model.config, "is_encoder_decoder", False):
            raise TypeError(f"{type(model).__name__} has an encoder: it is no causal model")
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and window + len(start) > positions:
            begun = f" and {len(start)} tokens before it" if start else ""
            raise ValueError(
                f"window must be at most the model's {positions} positions, got {window}{begun}"
            )
        self._window, self._batch = window, batch
        self._vocab_size = model.config.vocab_size
        self._params = automatic(model.params)
        self._reference_params = None if reference is None else automatic(reference.params)
        before = tuple(int(i) for i in start)
        self._step = jax.jit(functools.partial(_step, model, reference, before))

    def __call__(
        self,
        tokens: Sequence[int] | np.ndarray,
        params: Any = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        """Perplexity and next-token accuracy on a text.

        Args:
          tokens: the token ids of the text.
          params: the parameters to run with; None: the model's own.
          progress: called after each batch with the numbers of predicted and of all tokens.

        Raises:
          ValueError: if there are too few tokens, or a token outside the vocabulary.
        """
        window, params = self._window, self._params if params is None else automatic(params)
        ids, counts = windows(tokens, window)
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise ValueError(
                f"tokens must be in 0..{self._vocab_size - 1}, got {ids.min()}..{ids.max()}"
            )
        batch = min(self._batch, len(ids))
        short = -len(ids) % batch
        ids = np.concatenate([ids, np.zeros((short, window + 1), np.int32)])
        counts = np.concatenate([counts, np.zeros((short, window), np.float32)])

        losses = np.zeros(counts.shape, np.float32)
        total = int(counts.sum())
        # float64, because float32 would round away the last tokens of a long text
        sums = np.zeros(2 if self._reference_params is None else 4)
        for i in range(0, len(ids), batch):
            with on_mesh(params):
                part, losses[i : i + batch] = self._step(
                    params, self._reference_params, ids[i : i + batch], counts[i : i + batch]
                )
            sums += np.asarray(part, np.float64)
            if progress is not None:
                progress(int(counts[: i + batch].sum()), total)
        mean = sums / total
        agreement = (
            None
            if self._reference_params is None
            else Agreement(top1=float(mean[2]), kl=float(mean[3]))
        )
        loss = float(mean[0])
        # exp of a large mean overflows. nan stays nan: a ruined model should show it.
        perplexity = math.exp(loss) if not loss > 700 else math.inf
        return Evaluation(perplexity, float(mean[1]), total, agreement, losses[counts == 1])


def _step(
    model: Any,
    reference: Any,
    start: tuple[int, ...],
    params: Any,
    reference_params: Any,
    ids: jax.Array,
    counts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sums over a batch of windows, and the loss of each prediction."""
    before = jnp.broadcast_to(jnp.asarray(start, ids.dtype), (len(ids), len(start)))
    read = jnp.concatenate([before, ids[:, :-1]], axis=1)
    logits = model(read, params=params).logits[:, len(start) :].astype(jnp.float32)
    target = ids[:, 1:]
    # The log-softmax is computed for the target only. For all tokens it would be the largest array.
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    score = jnp.take_along_axis(logits, target[..., None], axis=-1)
    loss = normaliser - score[..., 0]
    # This is target == argmax(logits), where argmax takes the first of equal values. Written as a
    # comparison it is several times cheaper on a CPU.
    earlier = of_rank(jnp.arange(logits.shape[-1], dtype=target.dtype), 3) < target[..., None]
    ahead = ~(logits <= score) | (earlier & (logits == score))
    sums = [jnp.sum(loss * counts), jnp.sum(counts, where=~ahead.any(axis=-1))]
    if reference is not None:
        other = reference(read, params=reference_params).logits[:, len(start) :]
        other = other.astype(jnp.float32)
        log_p = other - jax.nn.logsumexp(other, axis=-1, keepdims=True)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - (logits - normaliser[..., None])), axis=-1)
        same = jnp.argmax(logits, axis=-1) == jnp.argmax(other, axis=-1)
        sums += [jnp.sum(counts, where=same), jnp.sum(kl * counts)]
    return jnp.stack(sums), loss


def evaluate(
    model: Any,
    tokens: Sequence[int] | np.ndarray,
    params: Any = None,
    *,
    window: int = WINDOW,
    batch: int = 4,
    reference: Any = None,
    start: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity and next-token accuracy of a causal language model on a text.

    This calls an `Evaluator` once.

    Args:
      model, window, batch, reference, start: arguments of `Evaluator`.
      tokens, params, progress: arguments of its call.

    Raises:
      ValueError: if there are too few tokens, a token is outside the vocabulary, or the window is
        longer than the model's positions.
    """
    evaluator = Evaluator(model, window=window, batch=batch, reference=reference, start=start)
    return evaluator(tokens, params, progress=progress)

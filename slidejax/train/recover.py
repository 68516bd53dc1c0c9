"""Recovery: training the kept values of a pruned model until it predicts as the original does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from slidejax.bounds import COUNT, COUNT_OR_NONE, SEED
from slidejax.files import check_path
from slidejax.train.distill import check_model, distillation_loss, rows_of
from slidejax.train.loop import Fitted, Shuffled, fit
from slidejax.variants.prepared import drop_prepared, weights_of
from slidejax.variants.trainable import Selection

__all__ = ["HIDDEN", "recover", "usual_rate"]

# All parameters but the embeddings of tokens and positions and the output head: pruned kernels,
# biases, norms.
HIDDEN = r"(?!.*(?:embed|wte|wpe|lm_head|predictions/decoder)).*"

# The root mean square of SmolLM2-135M's kernels, on which the learning rate was chosen. Those of
# Qwen2.5-Coder-0.5B are a tenth of it, and steps of the same size ruined that model.
_TYPICAL = 0.2

# Learning rates, and the tokens in a step from which on the larger one is good. A step of 1,024
# tokens has a gradient that is mostly noise, and more than 2e-4 makes a model worse
# (docs/journal/2026-11-23-recovery.md). With 16,384 tokens 5e-4 learns more in the same time
# (docs/journal/2026-11-27-eight-minutes-of-recovery.md).
_RATE, _LARGE_RATE, _LARGE_STEP = 2e-4, 5e-4, 8192


def recover(
    model: Any,
    teacher: Any,
    tokens: Sequence[int] | np.ndarray,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    qdtype: Any = None,
    window: int = 512,
    batch: int | None = None,
    accumulate: int = 1,
    learning_rate: float | None = None,
    warmup: int = 20,
    temperature: float = 1.0,
    hidden: float = 1.0,
    trained: Selection = HIDDEN,
    held_out: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 200,
    progress: Callable[[int, int | None, float], None] | None = None,
) -> tuple[Any, Fitted]:
    """Distils the original model into its pruned version.

    Masks stay as they are, and 8-bit rounding is in the loop.

    Args:
      model: a converted language model, 8-bit or float-packed: a `slidejax.lm.Decoder`
        (`slidejax.lm.convert`) or a Hugging Face Flax model (`slidejax.huggingface.convert`).
      teacher: the original model.
      tokens: token ids to train on, one long text `[n]` or rows `[rows, length]`. Labels are not
        needed.
      steps, minutes: how long to train; give one of the two (`slidejax.train.fit`). With `steps`
        the result is the same each time.
      qdtype: int8 or float8_e4m3fn quantises a float-packed model during the training; None leaves
        the dtype as it is.
      window: tokens in a row, at most as many as the model's context has. An evaluation has windows
        of the same default length.
      batch: rows in a step; None: 32 on a GPU and 8 elsewhere, at most as many as there are.
      accumulate: the number of parts of a batch that run one after the other, which takes less
        memory.
      learning_rate, warmup: see `slidejax.train.fit`. Kernels whose values have a root mean square
        below 0.2 take smaller steps in proportion. None: 5e-4 where a step has 8,192 tokens or
        more, else 2e-4.
      temperature, hidden: see `slidejax.train.distillation_loss`. With few tokens in a step the
        gradient of the hidden states' loss is less noisy than the other one.
      trained: the parameters to train (`slidejax.partition`); by default all but the embeddings and
        the output head.
      held_out: the number of rows that are not trained on, a multiple of `accumulate`. The loss on
        them says which parameters are the best and whether the learning rate is too high
        (`slidejax.train.fit`), so a recovery does not end worse than it began. None: as many as a
        batch has, at most an eighth of the rows. 0: none.
      seed: the seed of the order of the rows, and of the choice of those that are held out.
      checkpoint, every: a directory for the state, and the number of steps between saved states. If
        the directory holds a state, the training goes on from there.
      progress: called with the number of steps done, the number of all steps (None while it is
        unknown), and the loss.

    Returns:
      `(model, fitted)`: a new model with the trained parameters, packed as they will serve, and the
      `Fitted`.

    Raises:
      TypeError, ValueError: naming it, if an argument is of a wrong kind or out of its range; if
        the vocabularies differ, `model` has no packed weights, or `held_out` leaves too few rows.

    Example::

        sparse = sj.huggingface.convert(original, "6:8", method="sparsegpt", calibration=tokens)
        sparse, fitted = sj.recover(sparse, original, tokens, minutes=5)
    """
    for name, one in (("model", model), ("teacher", teacher)):
        check_model(one, name)
    window, accumulate = COUNT.check(window, "window"), COUNT.check(accumulate, "accumulate")
    batch = None if batch is None else COUNT.check(batch, "batch")
    seed = SEED.check(seed, "seed")
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint")
    if model.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"teacher has a vocabulary of {teacher.config.vocab_size} tokens, "
            f"the model one of {model.config.vocab_size}"
        )
    if not weights_of(model.params):
        raise ValueError("model has no packed weights: nothing to recover, convert it first")
    for name in ("max_positions", "max_position_embeddings"):  # a decoder's, and transformers'
        window = min(window, getattr(model.config, name, window))
    rows = rows_of(tokens, window)
    if rows.min() < 0 or rows.max() >= model.config.vocab_size:
        raise ValueError(
            f"tokens must be in 0..{model.config.vocab_size - 1}, got {rows.min()}..{rows.max()}"
        )
    if batch is None:
        batch = min(32 if jax.default_backend() == "gpu" else 8, len(rows))
    elif batch > len(rows):
        raise ValueError(
            f"batch must be at most {len(rows)}, the rows of {window} tokens that there are, got "
            f"{batch}"
        )
    rows, aside = set_aside(rows, batch, accumulate, held_out, seed)
    loss = distillation_loss(model, teacher, temperature=temperature, hidden=hidden)
    fitted = fit(
        loss,
        drop_prepared(model.params),
        Shuffled(rows, batch, seed),
        teacher.params,
        steps=steps,
        minutes=minutes,
        qdtype=qdtype,
        trained=trained,
        learning_rate=usual_rate(batch * window) if learning_rate is None else learning_rate,
        warmup=warmup,
        typical=_TYPICAL,
        accumulate=accumulate,
        held_out=aside,
        checkpoint=checkpoint,
        every=every,
        progress=progress,
    )
    if hasattr(model, "with_params"):
        return model.with_params(fitted.params), fitted
    from slidejax import huggingface

    return huggingface.with_params(model, fitted.params), fitted


def usual_rate(tokens: int) -> float:
    """The default of `learning_rate`.

    Args:
      tokens: in a step.

    >>> usual_rate(32 * 512), usual_rate(4 * 256)
    (0.0005, 0.0002)
    """
    return _LARGE_RATE if tokens >= _LARGE_STEP else _RATE


def set_aside(
    rows: np.ndarray, batch: int, accumulate: int, count: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows to train on, and those that are held out: see `recover`."""
    count = None if count is None else COUNT_OR_NONE.check(count, "held_out")
    if count is None:
        count = min(batch, len(rows) // 8, max(0, len(rows) - batch))
        count -= count % max(accumulate, 1)
    elif not 0 <= count <= len(rows) - batch or count % accumulate:
        raise ValueError(
            f"held_out must be a multiple of accumulate, {accumulate}, from 0 to "
            f"{max(0, len(rows) - batch)}, the rows beside a batch; got {count}"
        )
    if count == 0:
        return rows, None
    order = np.random.default_rng((seed, len(rows))).permutation(len(rows))
    return rows[np.sort(order[count:])], rows[np.sort(order[:count])]

"""How far the predictions of two models are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bounds import Bound
from slidejax.weights.layout import as_array

__all__ = ["TEMPERATURE", "divergences", "kl_divergence", "scalar"]

TEMPERATURE = Bound(0, above=True)  # what divides logits


def scalar(loss: Any, name: str) -> jax.Array:
    """Checks the result of a user's loss.

    Raises:
      TypeError: naming the argument that was the loss, if it is no floating scalar.
    """
    dtype, shape = getattr(loss, "dtype", None), getattr(loss, "shape", None)
    if dtype is None or shape != () or not jnp.issubdtype(dtype, jnp.floating):
        got = type(loss).__name__ if dtype is None else f"{dtype} of shape {shape}"
        raise TypeError(f"{name} must return one floating number, a scalar array, got {got}")
    return loss


def kl_divergence(student: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Mean over positions of `KL(teacher || student)`, in nats.

    Args:
      student, teacher: logits `[..., vocabulary]`.
      temperature: divides both; the result is multiplied by its square, which keeps the size of the
        gradient.

    Returns:
      float32 scalar.

    Raises:
      TypeError: naming the argument, if it is of another kind.
      ValueError: if the shapes differ, or the temperature is not above 0.

    >>> half, most = jnp.array([[0.0, 0.0]]), jnp.log(jnp.array([[0.75, 0.25]]))
    >>> round(float(kl_divergence(half, most)), 4)
    0.1308
    """
    student, teacher = as_array(student, "student"), as_array(teacher, "teacher")
    if student.shape != teacher.shape or not student.ndim:
        raise ValueError(
            f"student and teacher must be logits of one shape, got {student.shape} and "
            f"{teacher.shape}"
        )
    if not isinstance(temperature, jax.core.Tracer):
        TEMPERATURE.check(temperature, "temperature")
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def divergences(
    run: Callable[[Any, Any], Any], params: Any, candidates: Sequence[Any], batches: Sequence[Any]
) -> list[float]:
    """How far a model's predictions with other parameters are from its own.

    The measure is the mean Kullback-Leibler divergence.

    Args:
      run: `(params, batch) -> output` with logits.
      params: the model's parameters.
      candidates: other parameters of the same structure.
      batches: batches of one shape.

    Returns:
      One divergence for each candidate, in nats.
    """

    @jax.jit
    def of(params, candidates, batch):
        ours = run(params, batch).logits
        return jnp.stack([kl_divergence(run(other, batch).logits, ours) for other in candidates])

    mean = np.mean(
        [np.asarray(of(params, list(candidates), batch), np.float64) for batch in batches], axis=0
    )
    return [float(one) for one in mean]

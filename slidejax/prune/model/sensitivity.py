"""How much pruning a layer costs the whole model, measured on text that it was not fitted to.

To second order, a change `dW` of a layer's kernel moves the distribution that a model predicts by a
Kullback-Leibler divergence of `E (g . x dW)^2 / 2`, summed over the layer's inputs `x`. Here `g` is
the gradient of the loss with respect to the layer's output, for targets that are drawn from the
original model's own predictions (the Fisher information, as in WoodFisher, Singh and Alistarh,
arXiv 2004.14340).

Each term is computed with the gradient and the change of the same token. A product of means would
take the two as independent. It would overrate the few tokens that attention collects on: their
inputs are huge and their gradients tiny.

One pass forward and back for each sequence measures all layers. The estimates are noisy; `shrunk`
allows for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.functional import watching_inputs, watching_outputs
from slidejax.prune.model.inputs import as_rows

__all__ = ["Estimate", "drawn_loss", "sensitivities", "shrunk"]


class Estimate(NamedTuple):
    """A measured sensitivity.

    Attributes:
      value: the estimated change of the loss, summed over the batches that were measured.
      noise: the variance of the value, divided by the square of the value.
    """

    value: float
    noise: float


def drawn_loss(output: Any, batch: Any) -> jax.Array:
    """The cross-entropy of a language model's predictions with tokens drawn from them, summed.

    Raises:
      ValueError: if the output has no logits.
    """
    if not hasattr(output, "logits"):
        raise ValueError("loss= is needed: the model's output has no logits")
    logits = output.logits.astype(jnp.float32)
    drawn = jax.random.categorical(jax.random.key(0), jax.lax.stop_gradient(logits))
    return jnp.sum(
        jax.nn.logsumexp(logits, axis=-1)
        - jnp.take_along_axis(logits, drawn[..., None], axis=-1)[..., 0]
    )


@jax.custom_vjp
def _probe(y, x, changes, sums):
    """Returns `y`.

    The gradient with respect to `sums` tells what changes of the kernel would cost
    (`_probe_backward`).

    Args:
      y: `[rows, out]`, a layer's output.
      x: `[rows, in]`, the layer's input.
      changes: changes of the layer's kernel, `[in, out]` each.
      sums: `[len(changes), 2]`, zeros.
    """
    return y


def _probe_forward(y, x, changes, sums):
    return y, (x, changes)


def _probe_backward(residuals, g):
    """For each change the sums of `(g . x dW)^2 / 2` and of its square over the rows."""
    x, changes = residuals
    each = [
        jnp.sum(g.astype(jnp.float32) * (x @ change.astype(jnp.float32)), axis=1) ** 2 / 2
        for change in changes
    ]
    return g, None, None, jnp.stack([jnp.stack([jnp.sum(q), jnp.sum(q * q)]) for q in each])


_probe.defvjp(_probe_forward, _probe_backward)


def sensitivities(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Sequence[Any],
    changes: Mapping[str, Sequence[jax.Array]],
) -> dict[str, list[Estimate]]:
    """Estimates how much changes of kernels, each by itself, raise the loss.

    Args:
      loss: `(params, batch) -> scalar`, which calls the model: a sum over the model's predictions.
      params: the original model's parameters.
      batches: batches of one shape. The changes must have been chosen on other batches.
      changes: path of a kernel -> changes of it, `[in, out]` each.

    Returns:
      Path -> an estimate for each change.

    >>> import flax.nnx
    >>> from slidejax import nnx
    >>> model = nnx.functional(flax.nnx.Linear(2, 1, use_bias=False, rngs=flax.nnx.Rngs(0)))
    >>> loss = lambda params, x: jnp.sum(model.run(params, x))
    >>> changes = {"kernel": [jnp.ones((2, 1))]}
    >>> found = sensitivities(loss, model.params, [jnp.ones((3, 2))], changes)
    >>> found["kernel"][0].value  # the gradient is 1, each of three rows changes by 2
    6.0
    """

    @jax.jit
    def measured(params, batch, changes):
        def probed(sums):
            inputs: dict[str, Any] = {}  # the input of a layer, until its output is seen

            def see_input(path, x, axes):
                if path in changes:
                    inputs[path] = as_rows(x, axes), axes
                return x

            def see_output(path, y):
                if path not in inputs:
                    return y
                x, axes = inputs.pop(path)
                order = tuple(range(y.ndim)) if axes.result is None else axes.result
                back = [order.index(a) for a in range(y.ndim)]
                rows = jnp.transpose(y, back).reshape(len(x), -1)
                rows = _probe(rows, jax.lax.stop_gradient(x), changes[path], sums[path])
                return jnp.transpose(rows.reshape([y.shape[a] for a in back]), order)

            with watching_inputs(see_input), watching_outputs(see_output):
                return loss(params, batch)

        return jax.grad(probed)({path: jnp.zeros((len(of), 2)) for path, of in changes.items()})

    total = None
    for batch in batches:
        found = jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float64), measured(params, batch, dict(changes))
        )
        total = found if total is None else jax.tree.map(np.add, total, found)
    return {
        path: [Estimate(float(s), float(q / s**2) if s > 0 else 0.0) for s, q in sums]
        for path, sums in (total or {}).items()
    }


def shrunk(found: Mapping[str, Estimate], sizes: Mapping[str, int]) -> dict[str, float]:
    """Pulls noisy sensitivities towards their mean (empirical Bayes).

    The logarithms of the sensitivities per weight are pulled to their mean by `n / (t + n)`. Here
    `n` is the noise of a layer, and `t` is the variance over the layers, less the variance that
    noise explains. If noise explains all of the spread, all weights count alike.

    Args:
      found: path -> estimate, above 0.
      sizes: path -> number of weights.

    Returns:
      Path -> sensitivity of the layer.

    >>> def of(noise):
    ...     found = {"a": Estimate(1.0, noise), "b": Estimate(9.0, noise)}
    ...     return [round(value, 2) for value in shrunk(found, {"a": 1, "b": 1}).values()]
    >>> of(noise=0.01), of(noise=3.0)
    ([1.01, 8.92], [3.0, 3.0])
    """
    if not found:
        return {}
    logs = np.array([np.log(one.value / sizes[path]) for path, one in found.items()])
    noise = np.array([one.noise for one in found.values()])
    spread = max(0.0, float(np.var(logs) - np.mean(noise)))
    believed = np.divide(spread, spread + noise, out=np.ones_like(noise), where=spread + noise > 0)
    kept = np.exp(np.mean(logs) + believed * (logs - np.mean(logs)))
    return {path: float(density) * sizes[path] for path, density in zip(found, kept, strict=True)}

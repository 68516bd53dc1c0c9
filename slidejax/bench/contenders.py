"""The contenders: linear layers in plain JAX, and `slidejax.linear` with every implementation.

All of them take bfloat16 x and return bfloat16 y. Baselines keep W as `[out, in]`, which suits the
vendor's 8-bit products best. The last two baselines are a bound. They are slidejax's quantisation
of x without lifting, followed by the bare product of the codes, without scales. No dense layer made
of these parts is faster.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bench.timing import Contender
from slidejax.ops import registry
from slidejax.ops.explain import explain
from slidejax.ops.lift_quantize import lift_rows
from slidejax.ops.linear import linear
from slidejax.ops.problem import Problem
from slidejax.ops.tuning import Variant
from slidejax.variants.prepared import drop_prepared, prepare
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import UNPRUNED

__all__ = ["BASELINES", "BEST_DENSE", "baselines", "best_dense", "kernel_of", "sparse", "variants"]

_UNSCALED = ("dense int8 unscaled", "dense fp8 unscaled")
BEST_DENSE = "best dense 8 bit"  # the faster of the two for each layer
BASELINES = ("jax bf16", "jax int8", "jax fp8", "jax fp8 per tensor", *_UNSCALED, BEST_DENSE)
_LAST = (((1,), (1,)), ((), ()))  # contract the last axis of x with the last of W
_E4M3 = jnp.dtype(jnp.float8_e4m3fn)


def kernel_of(out: int, inputs: int, seed: int = 0) -> jax.Array:
    """A kernel `[in, out]` in bfloat16 with the spread of an initialised layer."""
    key = jax.random.key(seed)
    return (jax.random.normal(key, (inputs, out), jnp.float32) * inputs**-0.5).astype(jnp.bfloat16)


def _bf16(x: jax.Array, w: Any) -> jax.Array:
    return jax.lax.dot_general(x, w, _LAST)


def _quantise(
    x: jax.Array, qmax: float, dtype: Any, axis: int | None
) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axis, keepdims=True), 1e-12) / qmax
    codes = jnp.clip(x / scale, -qmax, qmax)
    return (jnp.round(codes) if dtype == jnp.int8 else codes).astype(dtype), scale


def _per_row(x: jax.Array, weights: Any) -> jax.Array:
    """A layer with dynamic scales for each token, and scales for each output channel."""
    w, scale_w = weights
    codes, scale_x = _quantise(x, numerics.QMAX[np.dtype(w.dtype)], w.dtype, axis=1)
    acc = jax.lax.dot_general(
        codes, w, _LAST, preferred_element_type=jnp.int32 if w.dtype == jnp.int8 else jnp.float32
    )
    return (acc.astype(jnp.float32) * scale_x * scale_w).astype(x.dtype)


def _per_tensor(x: jax.Array, weights: Any) -> jax.Array:
    """A layer that XLA turns into one scaled FP8 product of cuBLASLt.

    x is quantised with a scale that is known beforehand.
    """
    w, scale_x, scale_w = weights
    codes = jnp.clip(x / scale_x, -448, 448).astype(w.dtype)
    return jax.lax.dot_general(codes.astype(x.dtype) * scale_x, w.astype(x.dtype) * scale_w, _LAST)


def _unscaled(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes by slidejax's kernel, and their product: int32 for int8, bfloat16 for FP8.

    The product uses XLA's default accumulation, which is fast.
    """
    codes, scale = lift_rows([x], UNPRUNED, w.dtype, pads=False)
    return jax.lax.dot_general(
        codes, w, _LAST, preferred_element_type=jnp.int32 if w.dtype == jnp.int8 else x.dtype
    ), scale


def best_dense(us: dict[str, float | None]) -> float | None:
    """The time of `BEST_DENSE`, from the times of the baselines."""
    return min((t for name in _UNSCALED if (t := us.get(name)) is not None), default=None)


def baselines(kernel: jax.Array) -> list[Contender]:
    """Layers without slidejax for a kernel `[in, out]`, and the bounds of a dense layer."""
    w = kernel.T

    def per_row(dtype: Any) -> Any:
        codes, scale = _quantise(w, numerics.QMAX[np.dtype(dtype)], dtype, axis=1)
        return codes, scale[:, 0]

    codes, scale_w = _quantise(w, 448.0, _E4M3, axis=None)
    static = (codes, jnp.asarray(4 / 448, w.dtype), scale_w.reshape(()).astype(w.dtype))
    return [
        Contender("jax bf16", _bf16, w),
        Contender("jax int8", _per_row, per_row(jnp.int8)),
        Contender("jax fp8", _per_row, per_row(_E4M3)),
        Contender("jax fp8 per tensor", _per_tensor, static),
        *(
            Contender(name, _unscaled, per_row(dtype)[0])
            for name, dtype in zip(_UNSCALED, (jnp.int8, _E4M3), strict=True)
        ),
    ]


def problem_of(w: SlideWeight, rows: int) -> Problem:
    """The problem of `linear` with `rows` rows of bfloat16 on this machine."""
    [(problem, _)] = explain(linear, jax.ShapeDtypeStruct((rows, w.in_features), jnp.bfloat16), w)
    return problem


def variants(w: SlideWeight, rows: int) -> tuple[list[Variant], dict[str, str]]:
    """The ways to run `linear` of `rows` rows here.

    Returns:
      Every implementation that competes, without and with its prepared form; and the reasons of
      those that refuse, by name.
    """
    refused = registry.refusals(problem_of(w, rows))
    found = []
    for implementation in registry.competing():
        if implementation.name not in refused:
            found.append(Variant(implementation.name))
            if implementation.form is not None and w.pattern.prunes:
                found.append(Variant(implementation.name, implementation.form.name))
    return found, refused


def sparse(
    w: SlideWeight, rows: int, *, both: bool = False
) -> tuple[dict[Variant, Contender], dict[str, str]]:
    """`linear` with every implementation that runs here.

    Args:
      w: the weight.
      rows: of x.
      both: time each implementation without and with its prepared form. Otherwise with the form,
        if it has one.

    Returns:
      Contenders by `variants`, and the reasons of those that refuse.
    """
    found, refused = variants(w, rows)
    if not both:  # the last variant of each implementation
        found = list({variant.implementation: variant for variant in found}.values())
    return {variant: _contender(w, variant) for variant in found}, refused


def _contender(w: SlideWeight, variant: Variant) -> Contender:
    name = variant.implementation
    plain = drop_prepared(w)
    weight = plain if variant.form is None else prepare(plain, name)
    return Contender(str(variant), lambda x, w: linear(x, w, implementation=name), weight)

"""The contenders: linear layers in plain JAX, and `slidejax.linear` with every implementation.

All of them take bfloat16 x and return bfloat16 y. Baselines keep W as `[out, in]`, which suits the
vendor's 8-bit products best. The "unscaled" baselines are a bound. They are slidejax's quantisation
of x without lifting, followed by the bare product of the codes, without scales. No dense layer made
of these parts is faster.

XLA has two ways to compile the products of plain JAX for a GPU: with its Triton kernels and without
them. Up to 64 rows a layer is timed with both, because each is the faster for some layers. With
more rows the products of cuBLAS are the faster, and Triton's take minutes to compile.

A layer alone pays for its own quantisation. Behind a norm XLA fuses the two, so a second group of
contenders computes the norm as well (`behind_norm`, `fastest_behind_norm`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bench.timing import Contender
from slidejax.ops import registry
from slidejax.ops.cuda import library
from slidejax.ops.explain import explain
from slidejax.ops.lift_quantize import lift_rows
from slidejax.ops.linear import linear
from slidejax.ops.problem import Problem
from slidejax.ops.prologue import RMSNorm
from slidejax.ops.tuning import Variant
from slidejax.variants.prepared import drop_prepared, prepare
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import UNPRUNED

__all__ = [
    "BASELINES",
    "BEST_DENSE",
    "JAX_LAYERS",
    "NORMED",
    "SLIDEJAX",
    "WEIGHTS_ALONE",
    "WEIGHTS_ALONE_ROWS",
    "JaxLayer",
    "baselines",
    "behind_norm",
    "best_dense",
    "fastest_behind_norm",
    "for_rows",
    "kernel_of",
    "settings_of_xla",
    "sparse",
    "variants",
]

WEIGHTS_ALONE = "jax int8 weights"  # int8 weights alone, x stays bfloat16
WEIGHTS_ALONE_ROWS = 64  # with more rows nobody would leave x unquantised
_TRITON = "xla_gpu_enable_triton_gemm"
_TRITON_ROWS = 64
_UNSCALED = ("dense int8 unscaled", "dense fp8 unscaled")
BEST_DENSE = "best dense 8 bit"  # the faster of the two for each layer
BASELINES = (
    "jax bf16",
    "jax int8",
    "jax fp8",
    WEIGHTS_ALONE,
    "jax fp8 per tensor",
    *_UNSCALED,
    BEST_DENSE,
)
NORMED = ("jax int8", "jax fp8")  # the baselines that are also timed behind a norm
SLIDEJAX = "slidejax"  # behind a norm: the implementation that was the fastest without one
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


def _weights_alone(x: jax.Array, weights: Any) -> jax.Array:
    """A layer whose weights alone are int8. XLA turns them into x's dtype on their way."""
    w, scale_w = weights
    acc = jax.lax.dot_general(x, w.astype(x.dtype), _LAST, preferred_element_type=jnp.float32)
    return (acc * scale_w).astype(x.dtype)


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


def _codes(dtype: Any, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codes of W `[out, in]`, and their scales `[out]`."""
    codes, scale = _quantise(w, numerics.QMAX[np.dtype(dtype)], dtype, axis=1)
    return codes, scale[:, 0]


@dataclasses.dataclass(frozen=True)
class JaxLayer:
    """A linear layer as users of plain JAX write it.

    Attributes:
      name: its name in tables.
      weights: what `apply` takes, from W `[out, in]` in bfloat16. Layers that can share their
        weights have the same function here.
      apply: `(x [M, in], weights) -> y [M, out]`.
    """

    name: str
    weights: Callable[[jax.Array], Any]
    apply: Callable[[jax.Array, Any], jax.Array]


_INT8 = functools.partial(_codes, jnp.int8)
_FP8 = functools.partial(_codes, _E4M3)
JAX_LAYERS = (
    JaxLayer("jax bf16", lambda w: w, _bf16),
    JaxLayer("jax int8", _INT8, _per_row),
    JaxLayer("jax fp8", _FP8, _per_row),
    JaxLayer(WEIGHTS_ALONE, _INT8, _weights_alone),
)


def settings_of_xla(rows: int) -> tuple[dict[str, Any], ...]:
    """The options of XLA with which products of plain JAX are timed.

    Options that `XLA_FLAGS` names are the user's.
    """
    if jax.default_backend() != "gpu" or _TRITON in os.environ.get("XLA_FLAGS", ""):
        return ({},)
    return tuple({_TRITON: on} for on in ((False, True) if rows <= _TRITON_ROWS else (False,)))


def best_dense(us: Mapping[str, float | None]) -> float | None:
    """The time of `BEST_DENSE`, from the times of the baselines."""
    return min((t for name in _UNSCALED if (t := us.get(name)) is not None), default=None)


def baselines(kernel: jax.Array) -> list[Contender]:
    """Layers without slidejax for a kernel `[in, out]`, and the bounds of a dense layer.

    `for_rows` gives them XLA's options.
    """
    w = kernel.T
    made = {layer.weights: layer.weights(w) for layer in JAX_LAYERS}
    codes, scale_w = _quantise(w, 448.0, _E4M3, axis=None)
    static = (codes, jnp.asarray(4 / 448, w.dtype), scale_w.reshape(()).astype(w.dtype))
    return [
        *(Contender(layer.name, layer.apply, made[layer.weights]) for layer in JAX_LAYERS),
        Contender("jax fp8 per tensor", _per_tensor, static),
        *(
            Contender(name, _unscaled, made[weights][0])
            for name, weights in zip(_UNSCALED, (_INT8, _FP8), strict=True)
        ),
    ]


def for_rows(layers: Iterable[Contender], rows: int) -> list[Contender]:
    """Layers of plain JAX with the options of XLA for a number of rows of x."""
    return [dataclasses.replace(c, settings=settings_of_xla(rows)) for c in layers]


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
      both: time each implementation without and with its prepared form, and search for nothing.
        Otherwise with the form, if it has one, and with its fastest settings for these rows.

    Returns:
      Contenders by `variants`, and the reasons of those that refuse.
    """
    found, refused = variants(w, rows)
    if not both:  # the last variant of each implementation
        found = list({variant.implementation: variant for variant in found}.values())
    return {variant: _contender(w, variant, rows, search=not both) for variant in found}, refused


def _contender(w: SlideWeight, variant: Variant, rows: int, *, search: bool) -> Contender:
    name = variant.implementation
    if search and library.on_gpu():
        registry.get(name).search_missing(w, (rows,))
    return Contender(
        str(variant),
        lambda x, w: linear(x, w, implementation=name),
        _weight_for(w, variant),
        _settings(name, rows),
    )


def _settings(implementation: str, rows: int) -> tuple[dict[str, Any], ...]:
    """The options of XLA for `linear`. A kernel of this library needs none."""
    return ({},) if registry.get(implementation).cuda_only else settings_of_xla(rows)


def _weight_for(w: SlideWeight, variant: Variant) -> SlideWeight:
    plain = drop_prepared(w)
    return plain if variant.form is None else prepare(plain, variant.implementation, tune=False)


def _norm_for(inputs: int) -> RMSNorm:
    return RMSNorm(jnp.ones(inputs, jnp.bfloat16))


def behind_norm(contender: Contender, inputs: int) -> Contender:
    """A layer of plain JAX behind an RMS norm of its `inputs` columns, which XLA fuses with it."""

    def apply(x: jax.Array, weights: Any) -> Any:
        norm, w = weights
        return contender.apply(norm.apply(x), w)

    return dataclasses.replace(
        contender, apply=apply, weights=(_norm_for(inputs), contender.weights)
    )


def fastest_behind_norm(
    w: SlideWeight, rows: int, us: Mapping[Variant, float | None], name: str
) -> tuple[Variant, Contender] | None:
    """`linear` with an RMS norm as its prologue, in the variant that was the fastest without one.

    Args:
      w: the weight.
      rows: of x.
      us: microseconds without the norm, by variant; None if it did not run.
      name: of the contender.

    Returns:
      The variant and the contender, or None if nothing ran.
    """
    timed = {variant: time for variant, time in us.items() if time is not None}
    if not timed:
        return None
    fastest = min(timed, key=timed.__getitem__)

    def apply(x: jax.Array, weights: Any) -> jax.Array:
        norm, w = weights
        return linear(x, w, implementation=fastest.implementation, prologue=norm)

    weights = _norm_for(w.in_features), _weight_for(w, fastest)
    return fastest, Contender(name, apply, weights, _settings(fastest.implementation, rows))

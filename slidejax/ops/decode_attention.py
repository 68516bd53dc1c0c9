"""`decode_attention`: attention of one new token in each row to a cache of keys and values.

Rotary positions (arXiv 2104.09864), writing the new key and value into the cache, and attention
with grouped heads (arXiv 2305.13245) are one op. On CUDA it is one kernel, which splits the cache
among thread blocks and adds up their softmaxes (arXiv 2205.14135); elsewhere it is the reference in
plain JAX. A row's position says how many tokens its cache holds, so rows have lengths of their own.

Rows, and heads where q, k and v are arrays of their own, can be split over a mesh.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slidejax.bounds import Bound
from slidejax.kinds import check_name
from slidejax.ops.cuda import calls, library
from slidejax.ops.primitive import check_input, make_primitive, on_cuda_alone, with_rules
from slidejax.ops.sharding import (
    partitioned,
    spec_axes,
    spec_entry,
    spec_of,
    vary,
    varying_axes,
    with_automatic_axes,
)
from slidejax.weights.layout import as_array
from slidejax.weights.registries import register_exported

__all__ = [
    "IMPLEMENTATIONS",
    "Attended",
    "decode_attention",
    "decode_attention_p",
    "put_tokens",
    "refuses",
]

# The score of an unseen key. It is finite, so that a query that sees nothing gives no nan.
_UNSEEN = -1e30

IMPLEMENTATIONS = ("attention", "reference")
_CUDA_ONLY = "runs on CUDA only"
_WINDOW = Bound(1, 2**30 - 1, whole=True)


class Attended(NamedTuple):
    """What `decode_attention` returns.

    Attributes:
      y: `[rows, heads, head_dim]` in q's dtype.
      keys, values: the cache with the new token, `[rows, kv_heads, length, head_dim]`.
    """

    y: jax.Array
    keys: jax.Array
    values: jax.Array


register_exported(Attended)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The parameters of the primitive.

    Attributes:
      together: whether q holds the heads of q, k and v side by side. k and v are `[rows, 0, 0]`.
      scale, window, implementation: as in `decode_attention`.
    """

    together: bool
    scale: float
    window: int | None
    implementation: str | None


class _Operands(NamedTuple):
    """The operands of the primitive: `[rows, heads, head_dim]` of q, k and v; the cache; int32
    `[rows]`; float32 `[rows, head_dim / 2]`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    cosines: jax.Array
    sines: jax.Array

    def heads(self, settings: _Settings) -> int:
        return self.q.shape[1] - (2 * self.keys.shape[1] if settings.together else 0)

    def apart(self, settings: _Settings) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v."""
        if not settings.together:
            return self.q, self.k, self.v
        heads, kv_heads = self.heads(settings), self.keys.shape[1]
        q, k, v = jnp.split(self.q, [heads, heads + kv_heads], axis=1)
        return q, k, v


# --- reference ------------------------------------------------------------------------------------


def _turn(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotates the pairs of channels of `[rows, heads, head_dim]`, in float32, rounded once."""
    cosines, sines = cosines[:, None], sines[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def put_tokens(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """The cache with new tokens in the rows' slots, where they exist.

    Args:
      cache: `[rows, kv_heads, length, ...]`.
      new: `[rows, kv_heads, ...]`, or `[rows, tokens, kv_heads, ...]`.
      slots: int32 `[rows]` or `[rows, tokens]`; what is at or beyond the length is not written.
    """
    new, dtype = new.astype(cache.dtype), cache.dtype
    rows = jnp.arange(cache.shape[0], dtype=jnp.int32)
    rows = rows.reshape(-1, *[1] * (slots.ndim - 1))
    if dtype.itemsize == 2:
        # XLA's CPU would turn the whole cache into float32 and back to write 16-bit floats.
        cache, new = (lax.bitcast_convert_type(x, jnp.uint16) for x in (cache, new))
    written = cache.at[rows, :, slots].set(new, mode="drop")
    return lax.bitcast_convert_type(written, dtype) if dtype.itemsize == 2 else written


def _reference(settings: _Settings, *operands: jax.Array) -> Attended:
    of = _Operands(*operands)
    q, k, v = of.apart(settings)
    q, k = (_turn(x, of.cosines, of.sines) for x in (q, k))
    rows, kv_heads, length, head_dim = of.keys.shape
    wraps = settings.window == length
    # A negative index would count from the end, and one beyond the end is dropped.
    slots = jnp.where(of.positions < 0, length, of.positions % length if wraps else of.positions)
    keys, values = put_tokens(of.keys, k, slots), put_tokens(of.values, v, slots)
    grouped = q.reshape(rows, kv_heads, -1, head_dim)
    key_at, position = jnp.arange(length, dtype=jnp.int32)[None], of.positions[:, None]
    seen = key_at <= position
    if settings.window is not None and not wraps:  # a ring has what is in the window, and no more
        seen &= key_at > position - settings.window
    scores = _products("rkgd,rksd->rkgs", grouped, keys, q.dtype) * jnp.float32(settings.scale)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, jnp.float32(_UNSEEN)), axis=-1)
    y = _products("rkgs,rksd->rkgd", weights, values, q.dtype)
    y = jnp.where(position[:, :, None, None] < 0, 0, y)  # padding
    return Attended(y.reshape(q.shape).astype(q.dtype), keys, values)


def _products(formula: str, x: jax.Array, cache: jax.Array, dtype: Any) -> jax.Array:
    """The float32 products of `[rows, kv_heads, group, n]` with a cache."""
    if jax.default_backend() == "cpu":
        # XLA's products on a CPU copy the cache to transpose it. Sums are fused with its reading.
        wide = cache[:, :, None].astype(jnp.float32)
        over_channels = formula.endswith("s")
        x = x.astype(jnp.float32)
        x = x[:, :, :, None] if over_channels else x[..., None]
        return (x * wide).sum(-1 if over_channels else -2)
    # A GPU would otherwise multiply float32 in 19 bits.
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        formula,
        x.astype(dtype),
        cache.astype(dtype),
        preferred_element_type=jnp.float32,
        precision=precision,
    )


# --- the kernel -----------------------------------------------------------------------------------

_MAX_ROWS, _HEAD_DIMS = 65535, range(16, 257, 16)
# The workspace depends on these constants of the kernel, which tests/cuda/test_limits.py compares.
_WANTED_BLOCKS, _MAX_SPLITS, _ALIGN = 128, 16, 16


def refuses(rows: int, head_dim: int) -> str | None:
    """Why the CUDA kernel cannot run a problem here, or None. Every dtype of a cache is taken."""
    if reason := library.unusable():
        return reason
    if not isinstance(rows, int):  # an export may leave their number open
        return f"needs a known number of rows, not {rows}"
    if head_dim not in _HEAD_DIMS:
        return f"head_dim must be a multiple of 16 up to 256, not {head_dim}"
    if rows > _MAX_ROWS:
        return f"takes at most {_MAX_ROWS} rows, not {rows}"
    return None


def workspace_bytes(rows: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of workspace of the kernel, which checks them (AttentionWorkspace)."""
    group = heads // kv_heads
    together = 8 if group > 4 else 4  # heads of a thread block
    blocks = rows * kv_heads * math.ceil(group / together)
    splits = 1
    while 2 * splits <= _MAX_SPLITS and splits * blocks < _WANTED_BLOCKS:
        splits *= 2
    lanes = 8 if head_dim <= 64 else 16 if head_dim <= 128 else 32  # each has 8 channels
    part = 16 * together * (2 * lanes + 1)
    return _ALIGN + (blocks * splits * part if splits > 1 else 0)


def _kernel(settings: _Settings, *operands: jax.Array) -> Attended:
    of = _Operands(*operands)
    rows, kv_heads, _, head_dim = of.keys.shape
    heads = of.heads(settings)
    flat = (x.reshape(rows, -1) for x in of[:3])
    out_types = (
        jax.ShapeDtypeStruct((rows, heads * head_dim), of.q.dtype),
        jax.ShapeDtypeStruct(of.keys.shape, of.keys.dtype),
        jax.ShapeDtypeStruct(of.values.shape, of.values.dtype),
        jax.ShapeDtypeStruct((workspace_bytes(rows, heads, kv_heads, head_dim),), jnp.uint8),
    )
    y, keys, values, _ = calls.call_in_place(
        "slidejax_decode_attention",
        out_types,
        {3: 1, 4: 2},
        *flat,
        *of[3:],
        heads=np.int64(heads),
        scale=np.float32(settings.scale),
        window=np.int64(settings.window or 0),
    )
    return Attended(y.reshape(rows, heads, head_dim), keys, values)


# --- primitive ------------------------------------------------------------------------------------


def _shapes(*operands, settings: _Settings):
    of = _Operands(*operands)
    y = ((of.q.shape[0], of.heads(settings), of.q.shape[2]), of.q.dtype)
    return [y, (of.keys.shape, of.keys.dtype), (of.values.shape, of.values.dtype)]


def _lowering(*operands, platform: str, settings: _Settings):
    of = _Operands(*operands)
    reason: str | None = _CUDA_ONLY
    if platform == "cuda":
        reason = refuses(of.keys.shape[0], of.keys.shape[3])
    if settings.implementation == "attention" and reason is not None:
        raise NotImplementedError(f"decode_attention: implementation 'attention' {reason}")
    runs = _reference if reason is not None or settings.implementation == "reference" else _kernel
    return list(runs(settings, *operands))


decode_attention_p = make_primitive("slidejax_decode_attention", _shapes, _lowering)


def _bind(settings: _Settings, *operands: jax.Array) -> tuple[jax.Array, ...]:
    together = vary(varying_axes(*operands), *operands)
    return tuple(decode_attention_p.bind(*together, settings=settings))


# --- sharding, batching, derivative ---------------------------------------------------------------


def _partitioned(settings: _Settings):
    def rule(mesh, operands, results):
        row, turns = ArrayMapping("r"), ArrayMapping("r", "t")
        whole: tuple[str, ...]
        sizes: dict[str, Any]
        if settings.together:
            q, k, y = (ArrayMapping("r", *rest) for rest in (("n", "d"), ("e", "f"), ("o", "d")))
            cache = ArrayMapping("r", "c", "s", "d")
            whole, sizes = ("n", "d", "e", "f", "c", "s", "t", "o"), {}
        else:
            group = _shape_of(operands[0])[1] // _shape_of(operands[3])[1]
            sizes = {"g": group} if group > 1 else {}
            heads = CompoundFactor("h", "g") if group > 1 else "h"
            q = y = ArrayMapping("r", heads, "d")
            k, cache = ArrayMapping("r", "h", "d"), ArrayMapping("r", "h", "s", "d")
            whole = (*sizes, "d", "s", "t")
        return SdyShardingRule(
            (q, k, k, cache, cache, row, turns, turns),
            (y, cache, cache),
            need_replication_factors=whole,
            **sizes,
        )

    def partition(mesh, operands, results):
        specs = [spec_of(x) for x in (*operands, *results)]
        rows = _first(spec[0] for spec in specs)
        heads = () if settings.together else _first(specs[i][1] for i in (3, 4, 0, 1, 2, 8))
        of_rows = spec_entry(rows)
        of_heads = spec_entry([axis for axis in heads if axis not in rows])
        cache = NamedSharding(mesh, P(of_rows, of_heads, None, None))
        q, row = NamedSharding(mesh, P(of_rows, of_heads, None)), NamedSharding(mesh, P(of_rows))
        turns = NamedSharding(mesh, P(of_rows, None))
        operands_cut = (q, q, q, cache, cache, row, turns, turns)
        return mesh, functools.partial(_bind, settings), (q, cache, cache), operands_cut

    return partitioned(functools.partial(_bind, settings), rule, partition)


def _shape_of(operand: Any) -> tuple[int, ...]:
    """The shape of an operand of a sharding rule."""
    return getattr(operand, "shape", None) or operand.type.shape


def _first(entries: Iterable) -> tuple[str, ...]:
    """The mesh axes of the first PartitionSpec entry that names one."""
    return next((axes for axes in map(spec_axes, entries) if axes), ())


@functools.cache
def _op(settings: _Settings):
    automatic = _partitioned(settings)

    def primal(q, *rest):
        if settings.implementation == "attention":
            q = on_cuda_alone(q, f"decode_attention: implementation 'attention' {_CUDA_ONLY}")
        return automatic(q, *rest)

    def vmap_rule(op, axis_size, in_batched, *operands):
        """A batch of rows becomes more rows."""

        def more_rows(x, batched):
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        ys = op(*map(more_rows, operands, in_batched))
        return tuple(y.reshape(axis_size, -1, *y.shape[1:]) for y in ys), (True, True, True)

    def backward(operands, gradients):
        *floats, positions, cosines, sines = operands

        def attend(*floats):
            return tuple(_reference(settings, *floats, positions, cosines, sines))

        _, pull = jax.vjp(attend, *floats)
        return (*pull(tuple(gradients)), None, None, None)

    return with_rules(primal, vmap_rule, backward)


# --- public ---------------------------------------------------------------------------------------


def decode_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    turns: tuple[jax.Array, jax.Array],
    *,
    scale: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> Attended:
    """Attention of one new token in each row, whose key and value are written to the cache.

    q and k are rotated by the row's position first: channels i and i + head_dim / 2 are one pair,
    computed in float32 and rounded once. Scores and their softmax are float32. The cache is written
    in place where the caller donates it, or carries it through a loop.

    Args:
      q: bfloat16, float16 or float32 `[rows, heads, head_dim]`. Without k and v it holds all three
        side by side, as one product makes them: `[rows, heads + 2 * kv_heads, head_dim]`.
      k, v: `[rows, kv_heads, head_dim]` in q's dtype, or both None.
      keys, values: bfloat16, float16 or float32 `[rows, kv_heads, length, head_dim]`. Slot i holds
        the token at position i. Where the length is the window, slots are a ring: the token at
        position p is in slot `p % length`, in which it takes the place of the one that it no longer
        sees.
      positions: int32 `[rows]`, those of the new tokens. A token sees the slots up to its own. What
        is at or beyond the length is not written, but in a ring, and sees all slots. A row of -1
        has no token: nothing is written, and its y is 0.
      turns: cosines and sines of the rows' angles, float32 `[rows, head_dim / 2]`.
      scale: what scores are multiplied by; None is `head_dim ** -0.5`.
      window: how many positions back a token sees, its own included; None is all.
      implementation: "attention" is the CUDA kernel, "reference" plain JAX. None takes the kernel
        where it runs.

    Returns:
      `Attended(y, keys, values)`.

    Raises:
      ValueError: for shapes, dtypes or settings that do not fit.
      TypeError: if one of the arrays is none.
      NotImplementedError: if the kernel was asked for and cannot run, with the reason.

    >>> cache = jnp.zeros((1, 1, 4, 2))
    >>> new = jnp.ones((1, 1, 2))
    >>> still = (jnp.ones((1, 1)), jnp.zeros((1, 1)))
    >>> y, keys, values = decode_attention(new, new, new, cache, cache, jnp.array([0]), still)
    >>> y.tolist(), keys[0, 0, :2].tolist()
    ([[[1.0, 1.0]]], [[1.0, 1.0], [0.0, 0.0]])
    """
    operands, together = _operands(q, k, v, keys, values, positions, turns)
    head_dim = operands.keys.shape[3]
    scale = head_dim**-0.5 if scale is None else Bound(-1e38).check(scale, "scale")
    window = None if window is None else _WINDOW.check(window, "window")
    check_name(implementation, IMPLEMENTATIONS, "implementation", optional=True)
    settings = _Settings(together, float(scale), window, implementation)
    results = with_automatic_axes(
        _op(settings),
        operands,
        lambda *specs: (
            P(specs[0][0], None if together else specs[0][1], None),
            P(*specs[3]),
            P(*specs[4]),
        ),
    )
    return Attended(*results)


def _operands(q, k, v, keys, values, positions, turns) -> tuple[_Operands, bool]:
    """The operands after checking, and whether q holds k and v."""
    q, keys, values = check_input(q, "q"), check_input(keys, "keys"), check_input(values, "values")
    if keys.ndim != 4 or 0 in keys.shape:
        raise ValueError(
            f"keys must be [rows, kv_heads, length, head_dim], none of them 0, got {keys.shape}"
        )
    rows, kv_heads, _, head_dim = keys.shape
    if (values.shape, values.dtype) != (keys.shape, keys.dtype):
        raise ValueError(
            f"values must be like keys, {keys.dtype} {keys.shape}, got {values.dtype} "
            f"{values.shape}"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given, or both be None")
    together = k is None
    heads = (q.shape[1] if q.ndim == 3 else 0) - (2 * kv_heads if together else 0)
    if (
        q.shape != (rows, q.shape[1] if q.ndim == 3 else 0, head_dim)
        or heads < 1
        or heads % kv_heads
    ):
        wanted = "heads + 2 * kv_heads" if together else "heads"
        raise ValueError(
            f"q must be [rows, {wanted}, head_dim] with a multiple of {kv_heads} heads for keys "
            f"of shape {keys.shape}, got {q.shape}"
        )
    if together:
        k = v = jnp.zeros((rows, 0, 0), q.dtype)
    else:
        k, v = check_input(k, "k"), check_input(v, "v")
        for name, x in (("k", k), ("v", v)):
            if (x.shape, x.dtype) != ((rows, kv_heads, head_dim), q.dtype):
                raise ValueError(
                    f"{name} must be {q.dtype} of shape {(rows, kv_heads, head_dim)}, got "
                    f"{x.dtype} of shape {x.shape}"
                )
    positions = as_array(positions, "positions")
    if positions.shape != (rows,) or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(
            f"positions must be integers of shape {(rows,)}, got {positions.dtype} of shape "
            f"{positions.shape}"
        )
    if not isinstance(turns, (tuple, list)) or len(turns) != 2:
        raise ValueError(f"turns must be (cosines, sines), got {type(turns).__name__}")
    cosines, sines = (check_input(x, "turns").astype(jnp.float32) for x in turns)
    if cosines.shape != (rows, head_dim // 2) or sines.shape != cosines.shape:
        raise ValueError(
            f"turns must be two arrays of shape {(rows, head_dim // 2)}, got {cosines.shape} and "
            f"{sines.shape}"
        )
    positions = positions.astype(jnp.int32)
    return _Operands(q, k, v, keys, values, positions, cosines, sines), together

"""Problems of `decode_attention`, and its formulas in float64, row by row and head by head."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """Random operands. `positions` are given by the test, or drawn from -1 to beyond the length.

    A length that is the window is a ring of slots.
    """

    rows: int = 2
    kv_heads: int = 2
    group: int = 2
    length: int = 24
    head_dim: int = 16
    dtype: Any = jnp.float32
    cache_dtype: Any = jnp.float32
    window: int | None = None
    seed: int = 0
    positions: tuple[int, ...] | None = None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def is_ring(self) -> bool:
        return self.window == self.length

    @property
    def scale(self) -> float:
        return 1.5 * self.head_dim**-0.5

    def arrays(self) -> dict[str, np.ndarray]:
        """q, k, v, keys, values, positions, cosines and sines, as numpy arrays."""
        rng = np.random.default_rng(self.seed)

        def normal(dtype: Any, *shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(jnp.dtype(dtype))

        cache = (self.rows, self.kv_heads, self.length, self.head_dim)
        given = self.positions
        if given is None:
            given = rng.integers(-1, self.length * (3 if self.is_ring else 1) + 1, self.rows)
        angles = 3 * rng.standard_normal((self.rows, self.head_dim // 2))
        return {
            "q": normal(self.dtype, self.rows, self.heads, self.head_dim),
            "k": normal(self.dtype, self.rows, self.kv_heads, self.head_dim),
            "v": normal(self.dtype, self.rows, self.kv_heads, self.head_dim),
            "keys": normal(self.cache_dtype, *cache),
            "values": normal(self.cache_dtype, *cache),
            "positions": np.asarray(given, np.int32),
            "cosines": np.cos(angles).astype(np.float32),
            "sines": np.sin(angles).astype(np.float32),
        }

    def expected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """y in float64, and keys and values with the new tokens."""
        of = self.arrays()
        keys, values = of["keys"].copy(), of["values"].copy()
        q, k = (_turned(of[name], of["cosines"], of["sines"]) for name in ("q", "k"))
        y = np.zeros(q.shape)
        for row, position in enumerate(of["positions"]):
            slot = position % self.length if self.is_ring else position
            if position >= 0 and slot < self.length:
                keys[row, :, slot] = k[row].astype(keys.dtype)
                values[row, :, slot] = of["v"][row].astype(values.dtype)
            ends_at_window = self.window is not None and not self.is_ring
            first = max(0, position - self.window + 1) if ends_at_window else 0
            seen = slice(first, min(position + 1, self.length))
            for head in range(self.heads):
                here = keys[row, head // self.group, seen].astype(np.float64)
                if len(here) == 0:
                    continue
                scores = here @ q[row, head].astype(np.float64) * self.scale
                weights = np.exp(scores - scores.max())
                of_head = values[row, head // self.group, seen].astype(np.float64)
                y[row, head] = weights / weights.sum() @ of_head
        return y, keys, values

    def compare(self, y: Any, keys: Any, values: Any) -> None:
        """Asserts that results are the expected ones, as far as their dtypes can say."""
        want, want_keys, want_values = self.expected()
        # Weights may be rounded to q's dtype, and a turned query or key to its other neighbour.
        eps = max(float(jnp.finfo(d).eps) for d in (self.dtype, self.cache_dtype))
        y = np.asarray(y).astype(np.float64)
        sizes = np.abs(np.asarray(want_values).astype(np.float64)).max()
        assert np.abs(y - want).max() <= 4 * eps * sizes
        for got, wanted, exact in ((keys, want_keys, False), (values, want_values, True)):
            got, wanted = (np.asarray(x).astype(np.float64) for x in (got, wanted))
            np.testing.assert_allclose(
                got, wanted, rtol=0 if exact else 2 * eps, atol=0 if exact else eps
            )


def _turned(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    first, second = x[..., :half].astype(np.float32), x[..., half:].astype(np.float32)
    cosines, sines = cosines[:, None], sines[:, None]
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return np.concatenate(turned, -1).astype(x.dtype)

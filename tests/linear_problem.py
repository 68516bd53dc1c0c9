"""A random `linear`, and a comparison of results, for the tests of the products."""

import jax
import jax.numpy as jnp
import numpy as np

import slidejax as sj

# One program for each shape, where `pack` is some.
_pack = jax.jit(sj.pack, static_argnames=("pattern", "dtype"))


def problem(seed, rows, columns, features, pattern, dtype, x_dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, columns)), x_dtype)
    kernel = jnp.asarray(rng.standard_normal((columns, features)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(features), jnp.float32)
    return x, _pack(kernel, pattern=pattern, dtype=dtype), bias


def close(actual, desired, tolerance):
    actual, desired = np.asarray(actual, np.float32), np.asarray(desired, np.float32)
    assert actual.shape == desired.shape
    assert np.abs(actual - desired).max(initial=0) <= tolerance * np.abs(desired).max(initial=1e-6)


def exact_problem(seed, rows, columns, features, pattern, x_dtype=np.float32):
    """A random int8 `linear` whose scales are powers of two: `(x, w, bias)`.

    Products with the scales are then exact, so that it does not matter whether XLA fuses them with
    the addition that follows, as it does on a CPU. The largest magnitude of a row of x, and of a
    column of the kernel, is 127 times its scale.
    """
    rng = np.random.default_rng(seed)

    def codes(lines, length):  # each line has a power of two of its own
        values = rng.integers(-126, 127, (lines, length))
        values[np.arange(lines), rng.integers(0, length, lines)] = 127
        return values * np.exp2(rng.integers(-6, 3, (lines, 1)))

    x = jnp.asarray(codes(rows, columns), x_dtype)
    w = _pack(codes(features, columns).T.astype(np.float32), pattern=pattern, dtype="int8")
    return x, w, jnp.asarray(rng.standard_normal(features) * 8, jnp.float32)


def residual_of(seed, shape, dtype):
    """A residual of the size of an exact problem's results."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 300, dtype)

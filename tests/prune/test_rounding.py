import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.prune import clip_search, layer_error, magnitude, round_kernel
from slidejax.weights import numerics

DTYPES = ["int8", "float8_e4m3fn"]


def problem(seed, columns=40, features=12):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, columns)) @ (
        np.eye(columns) + rng.standard_normal((columns, columns)) / 2
    )
    return jnp.asarray(rng.standard_normal((columns, features)), jnp.float32), jnp.asarray(
        x.T @ x, jnp.float32
    )


@pytest.mark.parametrize(
    ("pattern", "dtype"), [("6:8", "int8"), ("6:8", "float8_e4m3fn"), ("dense", "float8_e4m3fn")]
)
def test_codes_chosen_together_beat_nearest_ones(pattern, dtype):
    kernel, gram = problem(0)
    mask = magnitude(kernel, pattern)
    kept = jnp.where(mask, kernel, 0)
    nearest = sj.unpack(sj.pack(kernel, pattern, dtype, mask=mask))
    errors = [
        float(
            layer_error(
                kept, round_kernel(kept, mask, gram, kept, dtype, damping=0, sweeps=n)[0], gram
            )
        )
        for n in (1, 2, 4)
    ]
    assert errors[2] <= errors[1] <= errors[0] < float(layer_error(kept, nearest, gram))
    new, scale = round_kernel(kept, mask, gram, kept, dtype)
    w = sj.pack(new, pattern, dtype, mask=mask, scale=scale)
    np.testing.assert_allclose(sj.unpack(w), new, rtol=1e-6)
    assert not np.asarray(new)[~np.asarray(mask)].any()


def test_no_single_code_can_be_bettered():
    """Where sweeps have come to rest, every code is the best one given all others."""
    kernel, gram = problem(1, columns=16, features=3)
    mask = magnitude(kernel, "6:8")
    new, scale = (
        np.asarray(a, np.float64)
        for a in round_kernel(kernel, mask, gram, kernel, "int8", damping=0, sweeps=60)
    )
    exact, gram = np.asarray(kernel, np.float64), np.asarray(gram, np.float64)
    for o, k in itertools.product(range(3), range(16)):
        if mask[k, o]:
            for step in (-1, 1):
                other = new[:, o].copy()
                other[k] = np.clip(round(other[k] / scale[o]) + step, -127, 127) * scale[o]
                d, e = exact[:, o] - new[:, o], exact[:, o] - other
                assert d @ gram @ d <= e @ gram @ e * (1 + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_search_beats_the_largest_magnitude(dtype):
    # Of many values the largest may be clipped.
    kernel = jax.random.normal(jax.random.key(0), (4096, 8))
    energy = jnp.ones(4096)
    largest = clip_search(kernel, energy, dtype)

    def error(largest):
        codes, scale = numerics.encode(kernel, largest, dtype)
        return jnp.sum((codes.astype(jnp.float32) * scale - kernel) ** 2, axis=0)

    plain = numerics.absmax(kernel, 0)
    assert (largest <= plain).all() and (error(largest) <= error(plain)).all()
    assert error(largest).sum() < error(plain).sum()


def test_silent_outputs_and_inputs():
    kernel, gram = problem(2)
    kernel, gram = kernel.at[:, 0].set(0), gram.at[3].set(0).at[:, 3].set(0)
    new, scale = round_kernel(kernel, magnitude(kernel, "6:8"), gram, kernel, "int8")
    assert np.isfinite(new).all() and not np.asarray(new)[:, 0].any() and scale[0] == 1

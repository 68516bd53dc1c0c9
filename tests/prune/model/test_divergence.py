"""The divergence of two models' predictions."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from slidejax.prune.model.divergence import divergences, kl_divergence


def test_the_divergence_against_numpy():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 3, 7)), random.standard_normal((2, 3, 7))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in (b, a))
    expected = 4 * (p * np.log(p / q)).sum(-1).mean()
    assert float(kl_divergence(a, b, temperature=2.0)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_divergence(a, a)) == pytest.approx(0, abs=1e-6)


class Output(NamedTuple):
    logits: jax.Array


def test_divergences_are_means_over_batches():
    def run(params, batch):
        return Output(batch @ params)

    random = np.random.default_rng(1)
    params, far = random.standard_normal((2, 5, 7))
    near = params + 0.01 * random.standard_normal((5, 7))
    batches = [random.standard_normal((2, 3, 5)) for _ in range(3)]
    got = divergences(run, params, [params, near, far], batches)
    want = np.mean(
        [[kl_divergence(b @ other, b @ params) for other in (params, near, far)] for b in batches],
        axis=0,
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert abs(got[0]) < 1e-6 < got[1] < got[2]

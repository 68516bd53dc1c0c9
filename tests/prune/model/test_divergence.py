"""The divergence of two models' predictions."""

import numpy as np
import pytest

from slidejax.prune.model.divergence import kl_divergence


def test_the_divergence_against_numpy():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 3, 7)), random.standard_normal((2, 3, 7))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in (b, a))
    expected = 4 * (p * np.log(p / q)).sum(-1).mean()
    assert float(kl_divergence(a, b, temperature=2.0)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_divergence(a, a)) == pytest.approx(0, abs=1e-6)

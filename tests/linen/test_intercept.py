"""Converted Linen models as they run."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from linen_models import FLOAT, KEY, data

import slidejax as sj


def test_apply_runs_other_methods_and_converts_once_more():
    class Model(nn.Module):
        def setup(self):
            self.layer = nn.Dense(8)

        def __call__(self, x):
            return self.layer(x)

        def twice(self, x):
            return 2 * self.layer(x)

    x = data(2, 16)
    converted = sj.linen.convert(Model().init(KEY, x), FLOAT, Model(), x)
    np.testing.assert_allclose(
        sj.linen.apply(Model(), converted, x, method="twice"),
        2 * sj.linen.apply(Model(), converted, x),
    )
    report = sj.Report()
    assert (
        sj.linen.convert(converted, FLOAT, report=report)["params"]["layer"]["kernel"]
        is converted["params"]["layer"]["kernel"]
    )
    assert report.skipped == {"layer/kernel": "it is packed already"}


def test_dtypes_promote_as_in_the_layer():
    x = data(2, 16, dtype=jnp.bfloat16)
    for model, rule, want in [
        (nn.Dense(8), FLOAT, jnp.float32), (nn.Dense(8, dtype=jnp.bfloat16), FLOAT, jnp.bfloat16),
        (nn.Dense(8, use_bias=False), sj.Rule("6:8"), jnp.bfloat16), (nn.Dense(8), sj.Rule("6:8"), jnp.float32),
    ]:  # fmt: skip
        converted = sj.linen.convert(model.init(KEY, x), rule, model, x)
        assert sj.linen.apply(model, converted, x).dtype == want

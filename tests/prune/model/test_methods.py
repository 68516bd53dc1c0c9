"""The methods that a model can be pruned with."""

import jax.numpy as jnp
import pytest

import slidejax as sj
from slidejax.prune.model.methods import WANDA, calibrated_method


def test_bad_arguments():
    with pytest.raises(ValueError, match="method"):
        calibrated_method("magic")
    with pytest.raises(ValueError, match="no calibration inputs"):
        WANDA.pruner({})(jnp.ones((8, 8)), sj.Pattern.parse("6:8"), "a/kernel")
    with pytest.raises(ValueError, match="measured for other kernels"):
        WANDA.pruner({"a/kernel": jnp.ones(8)})(
            jnp.ones((2, 8, 8)), sj.Pattern.parse("6:8"), "a/kernel"
        )

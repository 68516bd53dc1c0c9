"""Token ids that need more than 32 bits do not wrap around into the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slidejax.lm.decoder import apply
from slidejax.lm.decoder.cache import init_cache
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.evaluate import windows
from slidejax.prune.model.calibration import cut
from slidejax.train.distill import rows_of

WIDE = np.array([1, 2**32 + 2, 3, 4])


@pytest.mark.parametrize(
    "use",
    [
        lambda ids: windows(ids, 2),
        lambda ids: cut(ids, 1, 2),
        lambda ids: rows_of(ids, 2),
        lambda ids: tiny(num_layers=1).generate([ids], max_new_tokens=1),
        lambda ids: tiny(num_layers=1)(ids[None]),
    ],
)
@pytest.mark.parametrize("ids", [WIDE, -WIDE], ids=["large", "negative"])
def test_they_are_refused(use, ids):
    with pytest.raises(ValueError, match="token"):
        use(ids)


def test_under_tracing_they_are_unknown():
    model = tiny(num_layers=1)
    # NumPy's, of which JAX takes 32 bits
    y, _ = jax.jit(lambda params: apply(model.config, params, WIDE[None]))(model.params)
    assert np.isnan(np.asarray(y)[0, 1]).all()
    with jax.enable_x64(True):
        run = jax.jit(lambda ids: apply(model.config, model.params, ids)[0])
        y = np.asarray(run(jnp.asarray(WIDE[None, :2])))
        assert np.isnan(y[0, 1]).all()
        np.testing.assert_array_equal(run(jnp.asarray([[1, 2]])), run(np.array([[1, 2]], np.uint8)))
        cache = init_cache(model.config, 1, 8, "float32")
        at = jnp.asarray([[2**32]])  # no place of the cache: not its first one
        run = jax.jit(lambda at: apply(model.config, model.params, jnp.asarray([[1]]), at, cache))
        logits, written = run(at)
        assert np.isnan(np.asarray(logits)).all()
        with pytest.raises(
            ValueError, match="from 0 to 7, the length of the cache, got 4294967296"
        ):
            apply(model.config, model.params, jnp.asarray([[1]]), at, cache)
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(written))

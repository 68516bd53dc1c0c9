import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.prune import calibration, layer_error


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(24, name="shared")
        return nn.Dense(8, name="last")(jnp.tanh(layer(jnp.tanh(layer(x)))))


def test_grams_add_up_over_calls_and_batches():
    model, x = Twice(), jax.random.normal(jax.random.key(0), (4, 5, 24))
    variables = model.init(jax.random.key(1), x)
    done = []
    grams = calibration.collect(model.apply, variables, list(x), done.append)
    assert set(grams) == {"shared/kernel", "last/kernel"} and done == [1, 2, 3, 4]
    _, state = model.apply(variables, x.reshape(20, 24), capture_intermediates=True)
    first, second = state["intermediates"]["shared"]["__call__"]
    inputs = np.concatenate([x.reshape(20, 24), np.tanh(first)])
    np.testing.assert_allclose(grams["shared/kernel"], inputs.T @ inputs, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(grams["last/kernel"], np.tanh(second).T @ np.tanh(second), rtol=1e-4, atol=1e-3)


def test_scanned_layers_are_refused():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(lambda layer, x, _: (layer(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return body(nn.Dense(8), x, None)[0]

    model, x = Scanned(), jnp.ones((3, 8))
    with pytest.raises(NotImplementedError, match="scan"):
        calibration.collect(model.apply, model.init(jax.random.key(0), x), [x])


def test_bad_arguments():
    with pytest.raises(ValueError, match="no batches"):
        calibration.collect(lambda p, b: None, {}, [])
    with pytest.raises(ValueError, match="method"):
        calibration.pruner("magic", {})
    with pytest.raises(ValueError, match="no calibration inputs"):
        calibration.pruner("wanda", {})(jnp.ones((8, 8)), sj.Pattern.parse("6:8"), "a/kernel")


def test_a_model_is_pruned_with_what_it_was_calibrated_on(tiny_llama):
    tokens = np.random.default_rng(0).integers(0, 256, (8, 32))
    dense = tiny_llama.params["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]
    grams = calibration.collect(lambda p, ids: tiny_llama(ids, params=p), tiny_llama.params, np.split(tokens, 2))
    gram = grams["model/layers/0/mlp/down_proj/kernel"]
    errors = []
    for method in ("magnitude", "wanda", "sparsegpt"):
        given = None if method == "magnitude" else tokens
        model = sj.huggingface.convert(tiny_llama, sj.rules.Rule("4:6", qdtype=None), method=method, calibration=given)
        packed = model.params["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]
        errors.append(float(layer_error(dense, sj.unpack(packed), gram)))
        assert np.isfinite(model(tokens[:1]).logits).all()
    assert errors[2] < errors[1] < errors[0]
    with pytest.raises(ValueError, match="needs calibration"):
        sj.huggingface.convert(tiny_llama, "6:8", method="wanda")
    with pytest.raises(ValueError, match="uses no calibration"):
        sj.huggingface.convert(tiny_llama, "6:8", calibration=tokens)

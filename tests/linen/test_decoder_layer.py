"""Decoder layers of transformers with fused projections, run as a whole."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers_models import gated, logits

import slidejax as sj
from slidejax.linen import decoder_layer

INT8 = sj.Rule("6:8", qdtype="int8")
IDS = jnp.arange(12).reshape(2, 6)


def fused(family="llama", rules=INT8, activation=None):
    model = gated(family, activation or (None if family == "gemma" else "silu"))
    return sj.huggingface.fuse_projections(sj.huggingface.convert(model, rules))


def chains(model, ids=IDS):
    """How many chains the model's program has."""
    program = jax.make_jaxpr(lambda params: model(ids, params=params).logits)(model.params)
    return str(program).count("= slidejax_linear_chain[")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
def test_what_follows_attention_is_one_chain(family, monkeypatch):
    model = fused(family)
    # Norms begin with weights that scale nothing.
    norm = model.params["model"]["layers"]["0"]["post_attention_layernorm"]
    norm["weight"] = norm["weight"] + jnp.linspace(-0.5, 0.5, 32)
    assert chains(model) == 1
    together = logits(model, IDS)
    monkeypatch.setattr(decoder_layer, "_NORM_OFFSETS", {})
    assert chains(model) == 0
    np.testing.assert_allclose(together, logits(model, IDS), rtol=1e-4, atol=1e-5)


def test_it_generates_the_same_tokens(monkeypatch):
    model = fused("mistral")
    options = {"max_new_tokens": 5, "eos_token_id": 64, "pad_token_id": 0}

    def tokens():
        run = lambda params: model.generate(IDS, params=params, **options).sequences  # noqa: E731
        return np.asarray(jax.jit(run)(model.params))

    together = tokens()
    monkeypatch.setattr(decoder_layer, "_NORM_OFFSETS", {})
    np.testing.assert_array_equal(together, tokens())


@pytest.mark.parametrize(
    ("rules", "activation"),
    [
        (sj.Rule("6:8", qdtype=None), "silu"),
        ([(".*o_proj.*", None), (".*", INT8)], "silu"),
        ([(".*down_proj.*", None), (".*", INT8)], "silu"),
        ([(".*gate_proj.*", None), (".*", INT8)], "silu"),
        (INT8, "tanh"),
    ],
    ids=["float values", "o dense", "down dense", "gate dense", "another activation"],
)
def test_other_layers_run_module_by_module(rules, activation):
    model = fused("llama", rules, activation)
    assert chains(model) == 0
    assert np.isfinite(np.asarray(logits(model, IDS))).all()


def test_other_ways_to_call_a_model_give_the_same():
    """An interceptor without a memory; attentions, and intermediates, which modules give."""
    model = fused()
    want = logits(model, IDS)
    module, variables = model.module, {"params": model.params}
    places = jnp.broadcast_to(jnp.arange(6), (2, 6))
    args = IDS, jnp.ones((2, 6), "i4"), places
    with nn.intercept_methods(sj.linen.interceptor):
        plain = type(model).module_class(model.config)
        np.testing.assert_allclose(plain.apply(variables, *args).logits, want, rtol=1e-4, atol=1e-5)
    found = model(IDS, output_attentions=True)
    assert len(found.attentions) == 1
    np.testing.assert_allclose(found.logits, want, rtol=1e-4, atol=1e-5)
    result, state = module.apply(variables, *args, capture_intermediates=True)
    np.testing.assert_allclose(result.logits, want, rtol=1e-4, atol=1e-5)
    assert "mlp" in state["intermediates"]["model"]["layers"]["0"]

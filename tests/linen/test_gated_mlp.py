"""Gated MLPs of transformers, run as a whole, and with fused projections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers_models import gated, logits

import slidejax as sj

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "FlaxPreTrainedModel"):
    pytest.skip("this transformers has no Flax classes", allow_module_level=True)

FLOAT = sj.Rule("6:8", qdtype=None)
IDS = np.arange(3, 11).reshape(2, 4)


def fused_products(model, ids):
    """How many products of the model have the gate's product in their lift."""
    jaxpr = jax.make_jaxpr(lambda params: model(ids, params=params).logits)(model.params)
    return str(jaxpr).count("PyTreeDef(CustomNode(GLU")


@pytest.mark.parametrize(
    ("family", "activation"),
    [("llama", "relu"), ("mistral", "silu"), ("gemma", "gelu"), ("gemma", None)],
)
def test_the_gate_goes_into_the_lift_of_an_8_bit_down_projection(family, activation, monkeypatch):
    model, ids = (
        sj.huggingface.convert(gated(family, activation), sj.Rule("6:8", qdtype="int8")),
        jnp.arange(18).reshape(2, 9),  # the decode kernel, which lifts nothing, takes up to 16 rows
    )
    assert fused_products(model, ids) == 1
    program = jax.jit(lambda params: model(ids, params=params).logits).trace(model.params)
    # This is the gated product of slidejax/ops/cuda/prologues.py.
    assert 'prologue = "glu"' in program.lower(lowering_platforms=("cuda",)).as_text()
    together = logits(model, ids)
    monkeypatch.setattr("slidejax.linen.gated_mlp._BODIES", ())
    assert fused_products(model, ids) == 0
    np.testing.assert_allclose(together, logits(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "rules"),
    [
        ("silu", FLOAT),
        ("silu", [(".*down_proj.*", None), (".*", sj.Rule("6:8", qdtype="int8"))]),
        ("tanh", sj.Rule("6:8", qdtype="int8")),
    ],
    ids=["float values", "down dense", "another activation"],
)
def test_other_gated_mlps_run_layer_by_layer(activation, rules):
    model, ids = sj.huggingface.convert(gated("llama", activation), rules), jnp.arange(6)[None]
    assert fused_products(model, ids) == 0
    assert np.isfinite(np.asarray(logits(model, ids))).all()


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_fused_projections(family):
    model, ids = (
        sj.huggingface.convert(
            gated(family, None if family == "gemma" else "silu"), sj.Rule("6:8", qdtype="int8")
        ),
        jnp.arange(12).reshape(2, 6),
    )
    fused = sj.huggingface.fuse_projections(model)

    def products(model):
        return sorted(
            problem.out_features
            for problem, _ in sj.explain(
                lambda params: model(ids, params=params).logits, model.params
            )
        )

    assert products(model) == [32, 32, 32, 32, 32, 48, 48] and products(fused) == [32, 32, 96, 96]
    np.testing.assert_allclose(logits(fused, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    if family == "llama":
        options = {"max_new_tokens": 5, "eos_token_id": 64, "pad_token_id": 0}
        one, other = (
            jax.jit(lambda params, m=m: m.generate(ids, params=params, **options).sequences)(
                m.params
            )
            for m in (fused, model)
        )
        np.testing.assert_array_equal(one, other)

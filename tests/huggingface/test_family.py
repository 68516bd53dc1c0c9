"""Hugging Face's Flax models as a model family."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny_logits import IDS

pytest.importorskip("transformers")

import slidejax as sj
from slidejax.huggingface.family import FAMILY, functional
from slidejax.weights.packed import SlideWeight


def test_it_runs_as_the_model_does(tiny_llama):
    made = functional(tiny_llama)
    want = tiny_llama(IDS).logits
    np.testing.assert_array_equal(made.run(made.params, IDS).logits, want)
    mask = np.ones_like(IDS)
    mask[:, :3] = 0
    masked = made.run(made.params, (IDS, mask)).logits
    np.testing.assert_array_equal(masked, tiny_llama(IDS, mask).logits)
    assert not np.array_equal(masked, want)


def test_it_knows_every_linear_layer(tiny_llama):
    found = functional(tiny_llama).layers(IDS)
    names = (
        "self_attn/q",
        "self_attn/k",
        "self_attn/v",
        "self_attn/o",
        "mlp/gate",
        "mlp/up",
        "mlp/down",
    )
    blocks = {f"model/layers/{i}/{name}_proj/kernel" for i in range(2) for name in names}
    assert blocks <= found.keys() and found.keys() - blocks <= {"lm_head/kernel"}


def test_a_single_pattern_leaves_the_output_embedding(tiny_llama):
    packed = functional(tiny_llama).pack(tiny_llama.params, "6:8")
    assert type(packed) is type(tiny_llama)
    assert isinstance(packed.params["lm_head"]["kernel"], jax.Array)
    q = packed.params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    assert isinstance(q, SlideWeight)
    everything = functional(tiny_llama).pack(tiny_llama.params, [(".*", sj.Rule("6:8"))])
    assert isinstance(everything.params["lm_head"]["kernel"], SlideWeight)


def test_which_models_are_its_own(tiny_llama):
    assert FAMILY.owns(tiny_llama) and not FAMILY.owns(nn.Dense(2))
    with pytest.raises(TypeError, match="must be a Flax model of transformers, got Dense"):
        functional(nn.Dense(2))

"""Hugging Face's Flax models as a model family."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny_logits import IDS

pytest.importorskip("transformers")

import slidejax as sj
from slidejax.huggingface.family import FAMILY, functional
from slidejax.train import sample
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


def test_calibration_that_the_model_would_read_wrongly_is_refused(tiny_llama):
    """Its rotations and embeddings end where the configuration says, and JAX would clamp."""
    good = np.ones((2, 16), np.int32)
    for batch, message in (
        (np.ones((2, 129), np.int32), "rows of 129 tokens, .* context of 128"),
        (good + 258, "token ids from 0 to 258, got 259"),
    ):
        for given in ([batch], [(batch, np.ones_like(batch))], [{"input_ids": batch}]):
            with pytest.raises(ValueError, match=message):
                sj.huggingface.convert(tiny_llama, "6:8", "wanda", sj.prune.Calibration(given))
        with pytest.raises(ValueError, match=message):
            sj.huggingface.calibrated(tiny_llama, "wanda", batch)
        with pytest.raises(ValueError, match=message):
            sj.prune.mixed(tiny_llama, "6:8", batch, patterns=("14:16", "2:4"))
    with pytest.raises(ValueError, match="length must be at most the model's context, 128"):
        sample(tiny_llama, good, 129)

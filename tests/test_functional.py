"""A model as a function of its parameters."""

import numpy as np
import pytest

import slidejax as sj
from slidejax.contraction import to_matrix


def test_kernels_are_read_as_their_layers_read_them():
    """GPT-2 keeps `[out, in]`, and a square kernel's shape does not tell."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    model, ids = transformers.FlaxGPT2LMHeadModel(config), np.arange(8)[None]
    path = "transformer/h/0/attn/c_proj/kernel"
    leaf = model.params["transformer"]["h"]["0"]["attn"]["c_proj"]["kernel"]
    found = sj.huggingface.functional(model).layers(ids)
    np.testing.assert_array_equal(to_matrix(leaf, found[path].kernel), leaf.T)

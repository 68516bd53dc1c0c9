"""Hugging Face directories that slidejax writes."""

import numpy as np
import pytest
from tiny_logits import logits

pytest.importorskip("transformers")

import slidejax.checkpoint.huggingface as hf
from slidejax.lm.models import load_model


def test_a_written_dense_model_comes_back(tmp_path, tiny_llama, tiny_tokenizer):
    tiny_llama.generation_config.max_new_tokens = 7
    hf.write_pretrained(tmp_path / "out", tiny_llama, tiny_tokenizer, {"note": [1, "a"]})
    again = load_model(tmp_path / "out")
    assert again.about == {"note": [1, "a"]} and again.name == "out"
    assert again.model.generation_config.max_new_tokens == 7
    np.testing.assert_array_equal(logits(again.model), logits(tiny_llama))
    assert again.encode("abc") == tiny_tokenizer.encode("abc")

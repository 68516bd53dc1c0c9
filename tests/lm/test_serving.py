"""Models as they serve: a summary of their weights, their form on this device, their text."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import slidejax as sj
from slidejax.lm import serving
from slidejax.lm.generate import Generator
from slidejax.lm.models import LoadedModel
from slidejax.variants.serving import ServingWeight

KERNEL = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
IDS = np.arange(24).reshape(2, 12)


def test_the_summary_of_several_patterns_and_dtypes():
    int8, wide = sj.pack(KERNEL, "6:8", dtype="int8"), sj.pack(KERNEL, "14:16", dtype="bfloat16")
    found = serving.summary({"a": int8, "b": [wide, int8], "c": KERNEL})
    assert (found.pattern, found.dtype) == ("14:16+6:8", "bfloat16+int8")
    assert found.bytes == 2 * int8.nbytes + wide.nbytes


def test_the_summary_leaves_out_prepared_forms():
    w = sj.pack(KERNEL, "6:8", dtype="int8")
    prepared = sj.prepare(w)
    assert prepared.nbytes > w.nbytes
    assert serving.summary(prepared) == serving.summary(w)


def test_the_summary_of_an_original_model():
    assert serving.summary({"a": KERNEL}) == serving.Summary("original", "original", 0)


def test_a_converted_model_is_ready_with_the_same_logits(tiny_llama):
    sparse, report, seconds = serving.convert(tiny_llama, sj.Rule("6:8", "int8"), "magnitude", None)
    assert len(report.converted) == 14 and seconds > 0
    served = serving.ready(sparse)
    np.testing.assert_allclose(served(IDS).logits, sparse(IDS).logits, rtol=1e-3, atol=1e-3)
    if jax.default_backend() == "cpu":
        kernel = served.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
        assert isinstance(kernel, ServingWeight)


def test_a_sample_is_the_likeliest_continuation(tiny_llama, tiny_tokenizer):
    loaded = LoadedModel(tiny_llama, tiny_tokenizer, "tiny")
    with ThreadPoolExecutor(1) as pool:
        sample = serving.Sample(tiny_llama, loaded, "The moon", 6, pool)
        text = sample.text()
    tokens = Generator(tiny_llama, 6)(loaded.encode("The moon")).tokens
    assert text == tiny_tokenizer.decode(tokens)


def test_a_prompt_that_does_not_fit_is_refused_at_once(tiny_llama, tiny_tokenizer):
    loaded = LoadedModel(tiny_llama, tiny_tokenizer, "tiny")
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="128"):
        serving.Sample(tiny_llama, loaded, "a" * 125, 6, pool)

"""Real models must speak. SLIDEJAX_TEST_MODELS names them, separated by colons: GGUF files, or the
demo's model.

    SLIDEJAX_TEST_MODELS=smollm2:qwen2.gguf:gemma3.gguf python -m pytest tests/lm/decoder

They are large, so nothing runs without the variable.
"""

import json
import os

import jax
import numpy as np
import pytest

import slidejax as sj
from slidejax.lm.decoder import apply, init_cache
from slidejax.lm.models import NAMED, packaged_file

NAMES = [name for name in os.environ.get("SLIDEJAX_TEST_MODELS", "").split(os.pathsep) if name]
MODELS = [str(packaged_file(name)) if name in NAMED else name for name in NAMES]
TEXT = "The capital of France is Paris , and the capital of Germany is Berlin"

pytestmark = pytest.mark.skipif(not MODELS, reason="SLIDEJAX_TEST_MODELS names no files")


def words_of(model):
    """Token ids of the words of TEXT, each of which is one token, and all tokens."""
    said = json.loads(model.files["gguf_tokenizer.json"])
    tokens = said["tokenizer.ggml.tokens"]
    number = {token: index for index, token in enumerate(tokens)}
    space = "Ġ" if "Ġthe" in number else "▁"
    first, *rest = TEXT.split(" ")
    ids = [number[first], *(number.get(space + word, number.get(word)) for word in rest)]
    start = [model.config.bos_token_id] if said.get("tokenizer.ggml.add_bos_token") else []
    return np.array([start + ids], np.int32), tokens, space


@pytest.mark.parametrize("path", MODELS)
def test_a_real_model_expects_the_text_and_not_its_words_in_disorder(path):
    model = sj.lm.load(path)
    ids, _, _ = words_of(model)
    mixed = ids.copy()
    mixed[0, 1:] = np.random.default_rng(0).permutation(ids[0, 1:])

    def loss(ids):
        log_p = jax.nn.log_softmax(model(ids[:, :-1]))
        return -float(np.take_along_axis(np.asarray(log_p), ids[:, 1:, None], 2).mean())

    assert loss(ids) < 4.0 < loss(mixed) - 1.0


@pytest.mark.parametrize("path", MODELS)
def test_a_real_model_continues_through_the_cache_as_without_one(path):
    model = sj.lm.load(path)
    ids, tokens, space = words_of(model)
    cache = init_cache(model.config, 1, 64, "float32")
    step = jax.jit(lambda *args: apply(model.config, *args, last=True))
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    text, new = ids, ids
    for _ in range(12):
        logits, cache = step(model.params, new, positions, cache)
        new = np.asarray(logits).argmax(-1)[:, None].astype(np.int32)
        positions = positions[:, -1:] + 1
        text = np.concatenate([text, new], axis=1)
    whole = np.asarray(model(text))[0, ids.shape[1] - 1 : -1].argmax(-1)
    print("".join(tokens[i] for i in text[0]).replace(space, " "))
    np.testing.assert_array_equal(whole, text[0, ids.shape[1] :])


@pytest.mark.parametrize("path", MODELS)
def test_a_real_model_writes_text(path):
    """Its tokenizer gives the words of the text, and it knows the capital of France."""
    model = sj.lm.load(path)
    ids, _, _ = words_of(model)
    assert model.tokenizer.encode(TEXT) == ids[0].tolist()
    prompt = "The capital of Germany is Berlin. The capital of France is"
    written = model.generate(prompt, max_new_tokens=12)
    assert "Paris" in written.text
    assert "".join(model.stream(prompt, max_new_tokens=12)) == written.text
    both = model.generate([prompt, "One, two, three, four,"], max_new_tokens=12)
    if model.dtype == np.float32:
        assert both[0] == written
    print(prompt, written.text, both[1].text)

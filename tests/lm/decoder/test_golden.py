"""The decoder's logits against those of PyTorch's transformers (`golden/make.py`)."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import slidejax as sj
from slidejax.checkpoint.arrays import ArrayFile
from slidejax.lm.decoder import apply, init_cache

GOLDEN = Path(__file__).parent / "golden"
QUANTIZED = ("w8a8_int8", "w8a8_fp8")
CASES = sorted({file.parent.name for file in GOLDEN.glob("*/golden.safetensors")} - {*QUANTIZED})


run = jax.jit(apply, static_argnums=0)


def golden(case):
    """Token ids `[2, 40]` and PyTorch's logits of them."""
    arrays = load_file(GOLDEN / case / "golden.safetensors")
    return arrays["ids"], arrays["logits"]


def off(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_pytorch(case):
    ids, logits = golden(case)
    model = sj.lm.load(GOLDEN / case, dtype="float32")
    assert off(model(ids), logits) < 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize("case", CASES)
def test_logits_through_a_cache_are_those_of_pytorch(case):
    """A prompt in two chunks, then token by token; the second row is shorter by seven."""
    ids, logits = golden(case)
    model = sj.lm.load(GOLDEN / case, dtype="float32")
    config, params, length = model.config, model.params, ids.shape[1]
    cache = init_cache(config, 2, 48, "float32")
    late = np.array([0, 7])[:, None]
    for begin, end in [(0, 16), (16, 32), *((t, t + 1) for t in range(32, length))]:
        positions = np.arange(begin, end, dtype=np.int32) - late
        tokens = np.take_along_axis(ids, np.maximum(positions, 0), axis=1)
        got, cache = run(config, params, tokens, np.maximum(positions, -1), cache)
        got = np.asarray(got)  # each number of real tokens would be a program on a device
        for row in range(2):
            real = positions[row] >= 0
            expected = logits[row, positions[row][real]]
            assert off(got[row][real], expected) < 1e-5 * np.abs(logits).max()


# The setting that each case is there for: without it the logits must be others.
_MATTERS = {
    "llama3": lambda c: {"ropes": tuple(dataclasses.replace(r, divisors=()) for r in c.ropes)},
    "llama_linear": lambda c: {
        "ropes": tuple(dataclasses.replace(r, divisors=()) for r in c.ropes)
    },
    "mistral": lambda c: {"windows": (8,) * c.num_layers},
    "qwen2_window": lambda c: {"windows": (None,) * c.num_layers},
    "gemma3": lambda c: {"ropes": c.ropes[:1] * c.num_layers},
    "llama": lambda c: {"norm_eps": 1e-2},
}


@pytest.mark.parametrize("case", sorted(_MATTERS))
def test_golden_logits_notice_another_configuration(case):
    ids, logits = golden(case)
    model = sj.lm.load(GOLDEN / case, dtype="float32")
    config = dataclasses.replace(model.config, **_MATTERS[case](model.config))
    assert off(run(config, model.params, ids)[0], logits) > 1e-2


def old_style(config):
    """The same configuration as transformers 4 wrote it."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    if "full_attention" in rope:
        wide, near = rope["full_attention"], rope["sliding_attention"]
        config["rope_local_base_freq"] = near["rope_theta"]
        rope = wide
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config


@pytest.mark.parametrize("case", CASES)
def test_keys_of_transformers_4_say_the_same(case, tmp_path):
    shutil.copytree(GOLDEN / case, tmp_path, dirs_exist_ok=True)
    new = sj.lm.load(tmp_path).config
    config = old_style(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sj.lm.load(tmp_path).config == new


@pytest.mark.parametrize("case", ["llama3", "qwen2", "gemma3"])
def test_bfloat16_logits_are_near(case):
    ids, logits = golden(case)
    model = sj.lm.load(GOLDEN / case, dtype="bfloat16")
    assert model.dtype.name == "bfloat16"
    assert off(model(ids), logits) < 0.1 * np.abs(logits).max()


# int8 activations: compressed-tensors divides by 127.5, and slidejax (like other servers) by 127.
@pytest.mark.parametrize(("case", "tolerance"), [("w8a8_int8", 0.1), ("w8a8_fp8", 1e-5)])
def test_logits_of_8_bit_checkpoints_are_those_of_pytorch(case, tolerance):
    ids, logits = golden(case)
    model = sj.lm.load(GOLDEN / case, dtype="float32")
    if jax.default_backend() == "gpu":  # Hopper adds up products of float8 in fewer bits
        tolerance = max(tolerance, 0.15)
    assert off(model(ids), logits) < tolerance * np.abs(logits).max()


@pytest.mark.parametrize("case", ["w8a8_int8", "w8a8_fp8"])
def test_codes_and_scales_are_kept_as_they_are(case):
    with ArrayFile(GOLDEN / case / "model.safetensors") as file:
        stored = {name: file.read(name) for name in file.entries}
    layers = sj.lm.load(GOLDEN / case).params["model"]["layers"]
    for index, layer in layers.items():
        for module in ("self_attn", "mlp"):
            for name, part in layer[module].items():
                key = f"model.layers.{index}.{module}.{name}.weight"
                w, codes = part["kernel"], stored[key]
                assert str(w.pattern) == "dense" and w.dtype == codes.dtype
                kept = np.asarray(w.values).reshape(len(codes), -1)[:, : codes.shape[1]]
                np.testing.assert_array_equal(kept.view(np.uint8), codes.view(np.uint8))
                np.testing.assert_array_equal(w.scale, stored[f"{key}_scale"][:, 0])

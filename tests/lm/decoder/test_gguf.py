"""GGUF files of each architecture, written here from the golden checkpoints."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from safetensors.numpy import load_file

import slidejax as sj
from slidejax.lm.decoder import apply
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.decoder.names import gguf_name

GOLDEN = Path(__file__).parent / "golden"


def leaves(tree, path=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", np.asarray(value, np.float32)


def interleave(rows, heads):
    """Rows i and i + dim / 2 of a head become neighbours, as llama.cpp's converter puts them."""
    dim = len(rows) // heads
    order = [
        h * dim + i + half * (dim // 2)
        for h in range(heads)
        for i in range(dim // 2)
        for half in (0, 1)
    ]
    return rows[order]


def metadata(config, arch):
    """A file as llama.cpp's converter writes it."""
    keys = {
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(max(rope.theta for rope in config.ropes)),
        "vocab_size": config.vocab_size,
    }
    return {f"{arch}.{key}": value for key, value in keys.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(config.vocab_size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write(path, model, arch="llama", change=None, tensors=None, drop=()):
    """Writes a decoder as a GGUF file.

    Args:
      change: metadata that is added or replaced; None removes a key.
      tensors: tensors that are added or replaced; a pair is bytes and their type.
      drop: names of tensors that are left out.
    """
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    for key, value in {**metadata(config, arch), **(change or {})}.items():
        if value is None:
            continue
        kinds = {str: "string", bool: "bool", int: "uint32", float: "float32", list: "array"}
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    stored = {}
    for path_, value in leaves(model.params):
        if path_.endswith("/kernel"):
            value = value.T
        if arch == "llama" and "/q_proj/" in path_:
            value = interleave(value, config.num_heads)
        if arch == "llama" and "/k_proj/" in path_:
            value = interleave(value, config.num_kv_heads)
        stored[gguf_name(path_, config.sandwich_norm)] = value
    for name, value in {**stored, **(tensors or {})}.items():
        if name in drop:
            continue
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# case -> (architecture, further metadata)
CASES = {
    "llama": ("llama", {}),
    "llama_bias": ("llama", {}),
    "llama_linear": (
        "llama",
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ),
    "llama3": ("llama", {}),
    "mistral": ("llama", {"llama.attention.sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": (
        "gemma3",
        {
            "gemma3.attention.sliding_window": 6,
            "gemma3.attention.sliding_window_pattern": [True, False, True],
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0,
            "gemma3.rope.freq_base_swa": 300.0,
        },
    ),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_logits_are_those_of_pytorch(case, tmp_path):
    arch, change = CASES[case]
    original = sj.lm.load(GOLDEN / case, dtype="float32")
    tensors = {}
    if case == "llama3":  # llama.cpp keeps this scaling in a tensor alone
        tensors["rope_freqs.weight"] = np.asarray(original.config.ropes[0].divisors, np.float32)
    path = write(tmp_path / "model.gguf", original, arch, change, tensors)
    model = sj.lm.load(path, dtype="float32")
    assert model.config.eos_token_ids == (2,) and model.config.tied == original.config.tied
    arrays = load_file(GOLDEN / case / "golden.safetensors")
    logits = arrays["logits"]
    if case == "gemma3":  # llama.cpp scales scores by the size of a head
        config = dataclasses.replace(model.config, query_scale=original.config.query_scale)
        assert model.config.query_scale == 12**-0.5
        got = jax.jit(apply, static_argnums=0)(config, model.params, arrays["ids"])[0]
    else:
        got = model(arrays["ids"])
    assert np.abs(np.asarray(got) - logits).max() < 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize("case", ["llama_bias", "qwen2"])
def test_conversion_from_file_to_file_gives_what_the_loaded_model_gives(case, tmp_path):
    """Rows of q and k are in llama.cpp's order, and are read one tensor at a time."""
    original = sj.lm.load(GOLDEN / case, dtype="float32")
    path = write(tmp_path / "model.gguf", original, CASES[case][0])
    sj.lm.save(sj.lm.convert(sj.lm.load(path, "float32"), "6:8"), tmp_path / "loaded")
    sj.lm.convert_files(path, tmp_path / "files", "6:8", dtype="float32")
    one, other = (sj.checkpoint.load(tmp_path / name) for name in ("loaded", "files"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    texts = [sj.lm.load(tmp_path / name).files for name in ("loaded", "files")]
    assert texts[0] == texts[1] and "gguf_tokenizer.json" in texts[0]


def test_a_factor_without_a_type_and_its_old_name_are_linear(tmp_path):
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        path = write(tmp_path / "m.gguf", tiny(), change={f"llama.{key}": 4.0})
        assert sj.lm.load(path).config.ropes[0].divisors == (4.0,)


def test_the_windows_of_gemma_are_those_of_llama_cpp_where_no_pattern_is_named(tmp_path):
    model = sj.lm.load(GOLDEN / "gemma3")
    path = write(tmp_path / "m.gguf", model, "gemma3", {"gemma3.attention.sliding_window": 6})
    config = sj.lm.load(path).config
    assert config.windows == (6, 6, 6) and config.ropes[0].theta == 10000.0  # every sixth is whole


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: 'yarn'"),
        ({"llama.expert_count": 8}, "llama.expert_count: 8 is not supported"),
        ({"llama.attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"llama.something_new": 1}, "llama.something_new is not a key that slidejax knows"),
        ({"clip.has_vision": True}, "clip.has_vision"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count: it is not the size of a head"),
        ({"split.count": 2}, "one file of 2 .split.count"),
        ({"general.type": "adapter"}, "general.type is 'adapter'"),
        ({"general.architecture": "mamba"}, "general.architecture is 'mamba'"),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(change, match, tmp_path):
    if "general.architecture" in change:
        path = write(tmp_path / "m.gguf", tiny(), change["general.architecture"])
    else:
        path = write(tmp_path / "m.gguf", tiny(), change=change)
    with pytest.raises(NotImplementedError, match=match):
        sj.lm.load(path)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"drop": ["blk.1.ffn_up.weight"]}, "has no tensor 'blk.1.ffn_up.weight'"),
        ({"tensors": {"blk.0.extra.weight": np.ones(4, np.float32)}}, "blk.0.extra.weight"),
        (
            {"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}},
            "has no tensor 'blk.0.attn_k.bias'",
        ),
        ({"tensors": {"blk.0.ffn_up.weight": np.ones((4, 4), np.float32)}}, "has shape .4, 4."),
        ({"tensors": {"rope_freqs.weight": np.ones(3, np.float32)}}, "must be 4 positive numbers"),
        ({"change": {"llama.block_count": None}}, "has no key 'llama.block_count'"),
        ({"change": {"llama.block_count": 10**9}}, "llama.block_count must be at most 4096"),
        (
            {"change": {"llama.attention.head_count_kv": 3}},
            "head_count_kv must divide llama.attention.head_count 4",
        ),
    ],
)
def test_files_that_are_not_whole_are_named(arguments, match, tmp_path):
    path = write(tmp_path / "m.gguf", tiny(), **arguments)
    with pytest.raises(ValueError, match=match):
        sj.lm.load(path)


def test_the_tokenizer_goes_along(tmp_path):
    model = sj.lm.load(write(tmp_path / "m.gguf", tiny()))
    said = json.loads(model.files["gguf_tokenizer.json"])
    assert said["tokenizer.ggml.tokens"][:2] == ["t0", "t1"]
    sj.lm.save(model, tmp_path / "saved")
    assert sj.lm.load(tmp_path / "saved").files == model.files


def _types():
    for kind in gguf.GGMLQuantizationType:
        _, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except (NotImplementedError, ValueError):
            continue
        yield kind


@pytest.mark.parametrize("kind", list(_types()), ids=lambda kind: kind.name)
def test_every_type_is_what_gguf_dequantises(kind, tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    model = tiny(hidden_size=256, intermediate_size=32, num_layers=1)
    data = np.random.default_rng(0).integers(0, 256, (32, 256 // block * size), dtype=np.uint8)
    blocks = data.reshape(-1, size)
    with np.errstate(invalid="ignore", over="ignore"):  # random bytes may be no numbers
        values = gguf.dequantize(data, kind).astype(np.float32).reshape(-1, block)
    blocks[~np.isfinite(values).all(1)] &= 0x3F  # no floating format has an infinity there
    path = write(tmp_path / "m.gguf", model, tensors={"blk.0.ffn_up.weight": (data, kind)})
    layers = sj.lm.load(path, dtype="float32").params["model"]["layers"]
    expected = gguf.dequantize(data, kind).T
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(layers["0"]["mlp"]["up_proj"]["kernel"], expected)

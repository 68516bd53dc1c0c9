"""Reading Hugging Face directories; damaged and unsupported models."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_logits import IDS, logits

pytest.importorskip("transformers")

import slidejax.checkpoint.huggingface as hf
from slidejax.lm.models import load_model


def write_safetensors(folder, params, shards=1, layout="pt"):
    """A checkpoint as PyTorch's Llama writes it: [out, in], names with dots, no tied head."""
    from safetensors.numpy import save_file

    names = {}
    for key, value in flatten_dict(params, sep=".").items():
        kernel = key.endswith(".kernel")
        name = key.removesuffix(".kernel").removesuffix(".embedding") + (
            ".weight" if kernel or "embed" in key else ""
        )
        names[name] = np.ascontiguousarray(value.T if kernel else value)
    keys = sorted(names)
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    )
    for i, file in enumerate(files):
        save_file(
            {k: names[k] for k in keys[i::shards]}, folder / file, metadata={"format": layout}
        )
    if shards > 1:
        weight_map = {k: files[i % shards] for i, k in enumerate(keys)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path, tiny_config, tiny_params, tiny_tokenizer):
    tiny_config.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    write_safetensors(tmp_path, tiny_params)
    return tmp_path


@pytest.mark.parametrize("layout", ["msgpack", "safetensors", "shards"])
def test_every_layout_gives_the_same_model(folder, layout, tiny_llama, tiny_params):
    if layout != "safetensors":
        (folder / "model.safetensors").unlink()
    if layout == "shards":
        write_safetensors(folder, tiny_params, shards=3)
    if layout == "msgpack":
        tiny_llama.save_pretrained(folder)
        assert (folder / "flax_model.msgpack").is_file()
    loaded = load_model(folder)
    assert type(loaded.model).__name__ == "FlaxLlamaForCausalLM" and loaded.about == {}
    np.testing.assert_array_equal(logits(loaded.model), logits(tiny_llama))
    assert loaded.tokenizer.decode(loaded.encode("Grüße, 42!")) == "Grüße, 42!"


def test_the_layout_is_what_transformers_itself_reads(folder, tiny_params):
    """Our reading of a safetensors directory against Hugging Face's own loader.

    That loader draws a tied head at random.
    """
    from transformers import FlaxLlamaForCausalLM

    theirs = flatten_dict(FlaxLlamaForCausalLM.from_pretrained(folder).params["model"], sep="/")
    ours = flatten_dict(load_model(folder).model.params["model"], sep="/")
    assert theirs.keys() == ours.keys()
    for key in theirs:
        np.testing.assert_array_equal(theirs[key], ours[key])


def test_a_tied_head_is_the_embedding(tiny_llama):
    params = tiny_llama.params
    np.testing.assert_array_equal(
        params["lm_head"]["kernel"], params["model"]["embed_tokens"]["embedding"].T
    )


def test_dtype(folder):
    model = load_model(folder, "bfloat16").model
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert logits(model).dtype == jnp.bfloat16


def test_bert_reads_too(tmp_path):
    from transformers import BertConfig, FlaxBertForMaskedLM

    config = BertConfig(
        32, 16, 1, 2, 32, max_position_embeddings=16, architectures=["BertForMaskedLM"]
    )
    shapes = FlaxBertForMaskedLM(config, _do_init=False).params_shape_tree
    model = hf.build(config, jax.tree.map(lambda s: np.full(s.shape, 0.1, np.float32), shapes))
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert type(again.model) is FlaxBertForMaskedLM and again.tokenizer is None
    ids = IDS[:, :8] % 32
    np.testing.assert_array_equal(logits(model, ids), logits(again.model, ids))
    with pytest.raises(ValueError, match="without a tokenizer"):
        again.encode("text")


# --------------------------------------------------------------------------------- refusals, damage


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"mlp_bias": True},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_what_the_flax_class_would_ignore_is_refused(tiny_config, tiny_params, change):
    config = type(tiny_config)(**{**tiny_config.to_dict(), **change})
    with pytest.raises(NotImplementedError, match=next(iter(change))):
        hf.build(config, tiny_params)


@pytest.mark.parametrize(("window", "refused"), [(None, True), (64, True), (128, False)])
def test_flax_mistral_is_off_by_one_in_windows(window, refused):
    """It keeps one position more than the window, and none but the own one for null."""
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        sliding_window=window,
        architectures=["MistralForCausalLM"],
    )
    shapes = hf.model_class(config)(config, _do_init=False).params_shape_tree
    params = jax.tree.map(lambda s: np.full(s.shape, 0.1, np.float32), shapes)
    if refused:
        with pytest.raises(NotImplementedError, match="sliding_window"):
            hf.build(config, params)
    else:
        assert hf.build(config, params)(np.ones((1, 3), np.int32)).logits.shape == (1, 3, 32)


def test_the_rotary_base_of_transformers_5_is_read(tiny_config, tiny_params):
    values = tiny_config.to_dict()
    theta = values.pop("rope_theta")
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    config = type(tiny_config)(**values, **new)
    assert config.rope_theta != theta
    np.testing.assert_array_equal(
        logits(hf.build(config, tiny_params)), logits(hf.build(tiny_config, tiny_params))
    )
    plain = type(tiny_config)(**tiny_config.to_dict() | {"rope_scaling": {"rope_type": "default"}})
    assert hf.build(plain, tiny_params) is not None


def test_missing_and_misshapen_parameters_are_named(tiny_config, tiny_params):
    params = jax.tree.map(lambda x: x, tiny_params)
    del params["model"]["layers"]["1"]["mlp"]["up_proj"]
    with pytest.raises(ValueError, match="missing: model/layers/1/mlp/up_proj/kernel"):
        hf.build(tiny_config, params)
    params["model"]["layers"]["1"]["mlp"]["up_proj"] = {"kernel": np.zeros((2, 3))}
    with pytest.raises(ValueError, match=r"up_proj/kernel: \(2, 3\) instead of \(48, 104\)"):
        hf.build(tiny_config, params)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_codes_are_not_taken_for_weights(tiny_config, tiny_params, dtype):
    params = jax.tree.map(lambda x: x, tiny_params)
    up = params["model"]["layers"]["1"]["mlp"]["up_proj"]
    up["kernel"] = jax.numpy.asarray(up["kernel"], dtype)
    with pytest.raises(ValueError, match=rf"up_proj/kernel: {dtype}"):
        hf.build(tiny_config, params)


def test_damaged_directories(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors.*damaged"):
        load_model(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled"):
        load_model(folder)
    (folder / "flax_model.msgpack").write_bytes(b"\x81\xa1")
    with pytest.raises(ValueError, match=r"flax_model\.msgpack.*damaged"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(folder)
    with pytest.raises(ValueError, match="not a file, not a directory, and not one of smollm2"):
        load_model(folder / "nowhere")


def test_shards_that_overlap_are_refused(folder, tiny_params):
    write_safetensors(folder, tiny_params, shards=2)
    shutil.move(folder / "model.safetensors", folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="another shard does, too"):
        hf.read_pretrained(folder)


def test_an_index_cannot_reach_outside_its_directory(folder):
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index = {"weight_map": {"x": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not in the directory"):
        load_model(folder)


def test_parameters_without_a_model_are_not_a_model(tmp_path, tiny_config, tiny_params):
    from slidejax import checkpoint

    checkpoint.save(tmp_path, tiny_params)
    tiny_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no model"):
        load_model(tmp_path)

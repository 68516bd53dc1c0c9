"""Model directories: every tensor is used or refused; what is saved is what is loaded."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file
from safetensors.numpy import save_file as save_numpy

import slidejax as sj
from slidejax.checkpoint.arrays import ArrayFile
from slidejax.lm.decoder.examples import tiny

GOLDEN = Path(__file__).parent / "golden"
IDS = np.arange(3, 19, dtype=np.int32)[None]


def tensors_of(case):
    with ArrayFile(GOLDEN / case / "model.safetensors") as file:
        return {name: file.read(name) for name in file.entries}


def folder_of(path, case="llama", config=None, tensors=None, drop=()):
    """A copy of a golden checkpoint with changes."""
    stored = {**tensors_of(case), **(tensors or {})}
    path.mkdir(exist_ok=True)
    save_file(
        {name: jnp.asarray(value) for name, value in stored.items() if name not in drop},
        path / "model.safetensors",
    )
    values = {**json.loads((GOLDEN / case / "config.json").read_text()), **(config or {})}
    (path / "config.json").write_text(json.dumps(values))
    return path


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"drop": ["model.layers.1.mlp.up_proj.weight"]}, "lacks .*'model.layers.1.mlp.up_proj"),
        ({"drop": ["lm_head.weight"]}, "lacks .*'lm_head.weight'"),
        (
            {"tensors": {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}},
            "does not have: model.layers.0.self_attn.q_proj.bias",
        ),
        ({"tensors": {"model.norm.weight": np.ones(4, np.float32)}}, r"has shape \(4,\)"),
        (
            {"tensors": {"model.layers.0.mlp.up_proj.weight": np.ones((48, 32), np.int8)}},
            "is int8: codes are no weights",
        ),
        (
            {"tensors": {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}},
            "inv_freq",
        ),
        (
            {"tensors": {"model.norm.weight": np.full(32, np.nan, np.float32)}},
            "'model/norm/weight' has values that are nan",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(arguments, match, tmp_path):
    path = folder_of(tmp_path / "model", **arguments)  # a word of the messages, too
    with pytest.raises(ValueError, match=match) as raised:
        sj.lm.load(path)
    assert str(path) in str(raised.value)


def test_a_tensor_of_float64_is_refused_as_such(tmp_path):
    path = folder_of(tmp_path)
    wide = {**tensors_of("llama"), "model.norm.weight": np.ones(32, np.float64)}
    save_numpy(wide, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is float64, expected bfloat16"):
        sj.lm.load(path)


def test_a_key_that_comes_twice_is_refused(tmp_path):
    path = folder_of(tmp_path)
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.rstrip()[:-1] + ', "vocab_size": 5}')
    with pytest.raises(ValueError, match=r"config\.json.*the key 'vocab_size' comes twice"):
        sj.lm.load(path)


def test_an_old_name_of_the_quantisation_is_not_hidden_by_null(tmp_path):
    both = {"quantization_config": None, "compression_config": {"quant_method": "bitnet"}}
    with pytest.raises(NotImplementedError, match="quant_method 'bitnet'"):
        sj.lm.load(folder_of(tmp_path, config=both))


def test_a_buffer_of_the_right_frequencies_and_a_tied_head_say_nothing_new(tmp_path):
    inv_freq = (10000.0 ** -(np.arange(0, 8, 2) / 8)).astype(np.float32)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": inv_freq}
    assert sj.lm.load(folder_of(tmp_path / "a", tensors=extra)).config.num_layers == 2
    head = {"lm_head.weight": tensors_of("llama3")["model.embed_tokens.weight"]}
    model = sj.lm.load(folder_of(tmp_path / "b", "llama3", tensors=head))
    assert "lm_head" not in model.params
    head = {"lm_head.weight": head["lm_head.weight"] + np.ones((), jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"tie_word_embeddings, and 'lm_head\.weight' is not"):
        sj.lm.load(folder_of(tmp_path / "c", "llama3", tensors=head))


def test_shards_that_overlap_or_lie_elsewhere_are_refused(tmp_path):
    shutil.copytree(GOLDEN / "llama_linear", tmp_path / "a")
    first, second, _ = sorted((tmp_path / "a").glob("model-*"))
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="both hold"):
        sj.lm.load(tmp_path / "a")
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../model.safetensors"}}))
    with pytest.raises(ValueError, match="names files that are no safetensors in its directory"):
        sj.lm.load(tmp_path / "a")


def test_an_index_must_say_where_tensors_are(tmp_path):
    shutil.copytree(GOLDEN / "llama_linear", tmp_path / "a")
    index = tmp_path / "a" / "model.safetensors.index.json"
    right = json.loads(index.read_bytes())["weight_map"]
    first, second, *_ = sorted(set(right.values()))
    moved = next(name for name, file in right.items() if file == first)
    for wrong in ({**right, "model.layers.7.bias": first}, {**right, moved: second}):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=r"index\.json' says that '(model.layers.7.bias|.*)'"):
            sj.lm.load(tmp_path / "a")
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match="names files that are no safetensors"):
        sj.lm.load(tmp_path / "a")
    index.write_text(json.dumps({"weight_map": right}))
    sj.lm.load(tmp_path / "a")


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        sj.lm.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        sj.lm.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        sj.lm.load(tmp_path)
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is pickled"):
        sj.lm.load(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32"):
        sj.lm.load(GOLDEN / "llama", dtype="int8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_of_parameters(dtype):
    params = sj.lm.load(GOLDEN / "qwen2", dtype=dtype).params["model"]
    attention = params["layers"]["0"]["self_attn"]["q_proj"]
    assert params["embed_tokens"]["embedding"].dtype == jnp.dtype(dtype)
    assert attention["kernel"].dtype == attention["bias"].dtype == jnp.dtype(dtype)
    assert params["norm"]["weight"].dtype == np.float32
    assert sj.lm.load(GOLDEN / "qwen2").dtype == np.float32  # on a CPU


# --- 8-bit checkpoints ----------------------------------------------------------------------------


def quantization(**changes):
    values = json.loads((GOLDEN / "w8a8_int8" / "config.json").read_text())["quantization_config"]
    group = values["config_groups"]["group_0"]
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        {"": values, "group": group, **group}[part][name] = value
    return values


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq' cannot be read"),
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),
        ({"format": "pack-quantized"}, "format 'pack-quantized'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ({"weights__num_bits": 4}, "weights have num_bits 4"),
        ({"weights__symmetric": False}, "weights have symmetric False"),
        ({"weights__strategy": "group"}, "weights have strategy 'group'"),
        ({"input_activations__dynamic": False}, "input_activations have dynamic False"),
        ({"input_activations__strategy": "tensor"}, "input_activations have strategy 'tensor'"),
        ({"group__output_activations": {"num_bits": 8}}, "output_activations"),
    ],
)
def test_other_quantisations_are_refused_by_name(changes, match, tmp_path):
    config = {"quantization_config": quantization(**changes)}
    with pytest.raises(NotImplementedError, match=f"quantization_config.*{match}"):
        sj.lm.load(folder_of(tmp_path, "w8a8_int8", config))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ignore": ["re:("]}, r"ignore: 're:\('"),
        ({"ignore": 3}, "ignore must be a list of names"),
        ({"group__targets": [3]}, "targets must be a list of names"),
        ({"group__weights": None}, "must say weights and targets"),
        ({"config_groups": {}}, "config_groups must be an object with a group"),
    ],
)
def test_a_malformed_quantisation_is_named(changes, match, tmp_path):
    config = {"quantization_config": quantization(**changes)}
    with pytest.raises(ValueError, match=match):
        sj.lm.load(folder_of(tmp_path, "w8a8_int8", config))


def test_weights_alone_are_multiplied_out(tmp_path):
    config = {"quantization_config": quantization(group__input_activations=None)}
    model = sj.lm.load(folder_of(tmp_path / "a", "w8a8_int8", config), dtype="float32")
    stored, plain = tensors_of("w8a8_int8"), {}
    for name, value in stored.items():
        if not name.endswith("_scale"):
            scale = stored.get(f"{name}_scale")
            plain[name] = value if scale is None else value.astype(np.float32) * scale
    expected = sj.lm.load(folder_of(tmp_path / "b", tensors=plain), dtype="float32")
    np.testing.assert_array_equal(model(IDS), expected(IDS))


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"_scale": np.zeros((48, 1), np.float32)}, "must be positive and finite"),
        ({"_scale": np.ones((48, 2), np.float32)}, "scale of .* has shape"),
        ({"_g_idx": np.zeros(4, np.int32)}, "does not have: .*_g_idx"),
        ({"": np.ones((48, 32), np.float32)}, "says int8 codes"),
    ],
)
def test_codes_and_scales_that_do_not_fit_are_named(tensors, match, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    changed = {name + key: value for key, value in tensors.items()}
    with pytest.raises(ValueError, match=match):
        sj.lm.load(folder_of(tmp_path, "w8a8_int8", tensors=changed))


def test_a_zero_point_that_is_not_zero_is_refused(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight_zero_point"
    zero = folder_of(tmp_path / "a", "w8a8_int8", tensors={name: np.zeros((48, 1), np.int8)})
    assert sj.lm.load(zero).config.num_layers == 2
    one = folder_of(tmp_path / "b", "w8a8_int8", tensors={name: np.ones((48, 1), np.int8)})
    with pytest.raises(NotImplementedError, match="only symmetric weights"):
        sj.lm.load(one)


# --- what slidejax wrote --------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama3", "gemma3", "w8a8_fp8"])
@pytest.mark.parametrize("rule", [None, "6:8"])
def test_a_saved_decoder_computes_the_same(case, rule, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / case, source)
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling.py").write_text("raise SystemExit")
    model = sj.lm.load(source, dtype="bfloat16")
    if rule is not None and case != "w8a8_fp8":
        model = sj.lm.convert(model, rule)
    sj.lm.save(model, tmp_path / "out")
    sj.lm.save(model, tmp_path / "out")  # an earlier one is replaced
    again = sj.lm.load(tmp_path / "out")
    assert again.config == model.config and again.dtype == model.dtype
    assert again.files == model.files and set(model.files) == {"config.json", "tokenizer.json"}
    assert not (tmp_path / "out" / "modeling.py").exists()
    jax.tree.map(np.testing.assert_array_equal, sj.drop_prepared(model.params), again.params)
    np.testing.assert_array_equal(again(IDS), model(IDS))


def test_additional_chat_templates_are_kept(tmp_path):
    templates = folder_of(tmp_path / "a") / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ messages }}")
    (templates / "notes.txt").write_text("not a template")
    converted = sj.lm.convert(sj.lm.load(tmp_path / "a"), "6:8")
    for _ in range(2):  # the second time an earlier directory is replaced
        sj.lm.save(converted, tmp_path / "b")
    kept = tmp_path / "b" / "additional_chat_templates"
    assert [file.name for file in kept.iterdir()] == ["rag.jinja"]
    again = sj.lm.load(tmp_path / "b")
    assert again.files == converted.files
    assert again.files["additional_chat_templates/rag.jinja"] == b"{{ messages }}"


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="directory with other things"):
        sj.lm.save(tiny(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(TypeError, match=r"must be a slidejax\.lm\.Decoder, got dict"):
        sj.lm.save({}, tmp_path / "out")


def test_parameters_of_something_else_are_no_decoder(tmp_path):
    sj.checkpoint.save(tmp_path / "a", {"w": np.ones(3)})
    with pytest.raises(ValueError, match="holds parameters but no model"):
        sj.lm.load(tmp_path / "a")


@pytest.mark.parametrize("rules", ["6:8", [(".*", "6:8")]])
def test_a_converted_flax_model_is_read(rules, tiny_llama, tmp_path):
    """`slidejax convert` writes the Flax class of transformers with its packed weights."""
    converted = sj.huggingface.convert(tiny_llama, rules)
    converted.save_pretrained(tmp_path / "out")
    model = sj.lm.load(tmp_path / "out")
    assert model.config.tied == (rules == "6:8")  # a packed head is a layer of its own
    ids = np.arange(1, 17, dtype=np.int32)[None]
    run = jax.jit(lambda params: converted(ids, params=params).logits)  # one program
    expected = np.asarray(run(converted.params))
    assert np.abs(np.asarray(model(ids)) - expected).max() < 1e-4 * np.abs(expected).max()


# --- damaged values, odd paths --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name, value, tmp_path):
    tensor = tensors_of("llama")[name].copy()
    tensor.flat[-1] = value
    with pytest.raises(ValueError, match=f"{name.replace('.', '/')[:-7]}.* nan or infinite"):
        sj.lm.load(folder_of(tmp_path, tensors={name: tensor}))


@pytest.mark.filterwarnings("error")
def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = folder_of(tmp_path, tensors={name: np.full((48, 32), 1e6, np.float32)})
    with pytest.raises(ValueError, match="up_proj/kernel' has values that are too large for dtype"):
        sj.lm.load(folder, dtype="float16")
    assert sj.lm.load(folder, dtype="bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize("path", [None, 3, b"x", ["a"]])
def test_what_is_no_path_is_refused(path):
    said = f"path must be a str or os.PathLike, got {type(path).__name__}"
    with pytest.raises(TypeError, match=said):
        sj.lm.load(path)
    with pytest.raises(TypeError, match=said):
        sj.lm.save(tiny(), path)


def test_an_empty_path_is_not_the_directory_that_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(folder_of(tmp_path))
    with pytest.raises(ValueError, match="path must name a file or directory, got ''"):
        sj.lm.load("")
    assert sj.lm.load(".").config.num_layers == 2


def test_a_write_that_fails_leaves_the_earlier_model(tmp_path, monkeypatch):
    from slidejax.checkpoint import store

    sj.lm.save(tiny(), tmp_path / "model")
    write = store.write_into

    def full(folder, content):
        write(folder, content)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_into", full)
    with pytest.raises(OSError, match="No space left"):
        sj.lm.save(tiny(seed=1), tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    np.testing.assert_array_equal(sj.lm.load(tmp_path / "model")(IDS), tiny()(IDS))

"""GGUF files: a tiny one written here, and the packaged SmolLM2."""

import jax
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from slidejax.checkpoint.gguf import GGUFFile
from slidejax.lm.generate import Generator
from slidejax.lm.models import load_model, packaged_file


def interleave(weight, heads):
    """Hugging Face's row order to llama.cpp's, row by row.

    Rows i and i + dim/2 of a head become neighbours.
    """
    dim = weight.shape[0] // heads
    order = [
        h * dim + i + half * (dim // 2)
        for h in range(heads)
        for i in range(dim // 2)
        for half in (0, 1)
    ]
    return weight[order]


def write(path, config, params, *, tied=True, change=None, drop=None, more=None, text=True):
    writer = gguf.GGUFWriter(path, "llama")
    alphabet = [chr(ord("!") + i) for i in range(94)]
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    for name, value in {**fields, **(change or {})}.items():
        if name == "key_value":
            writer.add_uint32(*value)
        else:
            getattr(writer, f"add_{name}")(value)
    if text:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["<end>", *alphabet, "Ġ", "34", "12", "ab", "Ġab"])
        writer.add_token_types([3] + [1] * 99)
        writer.add_token_merges(["1 2", "a b", "Ġ ab"])
        writer.add_eos_token_id(0)
    tensors = {
        "token_embd.weight": params["model"]["embed_tokens"]["embedding"],
        "output_norm.weight": params["model"]["norm"]["weight"],
    }
    if not tied:
        tensors["output.weight"] = params["model"]["embed_tokens"]["embedding"] + 1
    for i, layer in params["model"]["layers"].items():
        attention, mlp = layer["self_attn"], layer["mlp"]
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        tensors |= {
            f"blk.{i}.attn_norm.weight": layer["input_layernorm"]["weight"],
            f"blk.{i}.ffn_norm.weight": layer["post_attention_layernorm"]["weight"],
            f"blk.{i}.attn_q.weight": interleave(attention["q_proj"]["kernel"].T, heads),
            f"blk.{i}.attn_k.weight": interleave(attention["k_proj"]["kernel"].T, kv),
            f"blk.{i}.attn_v.weight": attention["v_proj"]["kernel"].T,
            f"blk.{i}.attn_output.weight": attention["o_proj"]["kernel"].T,
            f"blk.{i}.ffn_gate.weight": mlp["gate_proj"]["kernel"].T,
            f"blk.{i}.ffn_up.weight": mlp["up_proj"]["kernel"].T,
            f"blk.{i}.ffn_down.weight": mlp["down_proj"]["kernel"].T,
        }
    for name, value in {**tensors, **(more or {})}.items():
        if name != drop:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_gives_the_model_it_was_made_from(tmp_path, tiny_config, tiny_params, tied):
    path = write(tmp_path / "tiny.gguf", tiny_config, tiny_params, tied=tied)
    model = load_model(path).model
    for name in ("vocab_size", "hidden_size", "rope_theta", "rms_norm_eps", "num_key_value_heads"):
        assert getattr(model.config, name) == getattr(tiny_config, name)
    head = tiny_params["model"]["embed_tokens"]["embedding"].T + (not tied)
    jax.tree.map(
        np.testing.assert_array_equal, model.params, {**tiny_params, "lm_head": {"kernel": head}}
    )
    assert model.config.tie_word_embeddings == tied


def test_a_file_without_a_tokenizer_has_a_configuration(tmp_path, tiny_config, tiny_params):
    file = GGUFFile(write(tmp_path / "tiny.gguf", tiny_config, tiny_params, text=False))
    assert file.config().vocab_size == tiny_config.vocab_size


def test_the_tokenizer_splits_digits_and_merges_letters(tmp_path, tiny_config, tiny_params):
    tokenizer = load_model(write(tmp_path / "tiny.gguf", tiny_config, tiny_params)).tokenizer
    assert tokenizer.tokenize("ab12 ab<end>") == ["ab", "1", "2", "Ġab", "<end>"]
    assert (
        tokenizer.eos_token == "<end>"
        and tokenizer.decode(tokenizer.encode("ab12 ab")) == "ab12 ab"
    )


def test_damaged_and_foreign_files(tmp_path, tiny_config, tiny_params):
    with pytest.raises(ValueError, match="no GGUF file"):
        GGUFFile(tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("GOOF")
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_model(tmp_path / "text.gguf")
    data = write(tmp_path / "tiny.gguf", tiny_config, tiny_params).read_bytes()
    for size in (4, 40, 900, len(data) - 1000):
        (tmp_path / "short.gguf").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"short\.gguf"):
            load_model(tmp_path / "short.gguf")
    write(tmp_path / "tiny.gguf", tiny_config, tiny_params, drop="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"no tensor 'blk\.1\.ffn_up\.weight'"):
        load_model(tmp_path / "tiny.gguf")
    write(tmp_path / "tiny.gguf", tiny_config, tiny_params, change={"feed_forward_length": 96})
    with pytest.raises(ValueError, match=r"ffn_gate.weight.*\(104, 48\), expected \(96, 48\)"):
        load_model(tmp_path / "tiny.gguf")
    write(tmp_path / "tiny.gguf", tiny_config, tiny_params, change={"rope_dimension_count": 6})
    with pytest.raises(NotImplementedError, match="head size 6"):
        load_model(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"more": {"blk.0.attn_q.bias": np.ones(48, np.float32)}}, r"blk\.0\.attn_q\.bias"),
        ({"more": {"rope_freqs.weight": np.full(6, 2, np.float32)}}, r"rope_freqs\.weight"),
        ({"change": {"key_value": ("llama.rope.scaling.factor", 4)}}, r"rope\.scaling\.factor 4"),
        ({"change": {"sliding_window": 8}}, r"attention\.sliding_window 8"),
        ({"change": {"key_value": ("split.count", 2)}}, r"one file of 2 \(split\.count\)"),
    ],
)
def test_what_flax_llama_has_no_place_for_is_refused(
    tmp_path, tiny_config, tiny_params, arguments, match
):
    path = write(tmp_path / "tiny.gguf", tiny_config, tiny_params, **arguments)
    with pytest.raises(NotImplementedError, match=match):
        load_model(path)


def test_rotary_factors_of_one_change_nothing(tmp_path, tiny_config, tiny_params):
    more = {"rope_freqs.weight": np.ones(6, np.float32)}
    assert load_model(write(tmp_path / "tiny.gguf", tiny_config, tiny_params, more=more)).model


def test_smollm2_knows_the_capital_of_france():
    try:
        packaged_file("smollm2")
    except ValueError as e:
        pytest.skip(str(e))
    loaded = load_model("smollm2")
    written = Generator(loaded.model, 1)(loaded.encode("The capital of France is"))
    assert loaded.tokenizer.decode(written.tokens) == " Paris"
    assert loaded.model.config.rope_theta == 100000.0

"""Hugging Face's config.json: what it leaves out, and what is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidejax.lm.decoder import DecoderConfig, Rope
from slidejax.lm.decoder.examples import tiny_config
from slidejax.lm.decoder.huggingface import MODEL_TYPES, from_huggingface

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def read(model_type="llama", **changes):
    values = {"model_type": model_type, **SIZES, **changes}
    return from_huggingface({key: value for key, value in values.items() if value != "absent"})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_a_file_leaves_out_is_what_transformers_takes(model_type):
    """Compared with the classes of the installed transformers, which have defaults of their own."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type, **SIZES)
    ours = read(model_type)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    types = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    slides = (
        [t == "sliding_attention" for t in types]
        if types
        else [window is not None] * ours.num_layers
    )
    assert ours.windows == tuple(window if slide else None for slide in slides)
    if hasattr(theirs, "rope_theta"):  # transformers 4
        assert max(rope.theta for rope in ours.ropes) == theirs.rope_theta
        local = getattr(theirs, "rope_local_base_freq", theirs.rope_theta)
        assert min(rope.theta for rope in ours.ropes) == local
    sizes = {**SIZES, "hidden_size": 256, "num_attention_heads": 32}
    del sizes["num_key_value_heads"]
    theirs = transformers.AutoConfig.for_model(model_type, **sizes)
    absent = {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": "absent"}
    assert read(model_type, **absent).num_kv_heads == theirs.num_key_value_heads


@pytest.mark.parametrize(
    ("window", "expected"), [(5, (5,) * 7), (None, (None,) * 7), ("absent", (4096,) * 7)]
)
def test_windows_of_mistral(window, expected):
    assert read("mistral", sliding_window=window).windows == expected


def test_windows_of_qwen_need_to_be_switched_on():
    some = {"sliding_window": 5, "max_window_layers": 4}
    assert read("qwen2", **some).windows == (None,) * 7
    assert read("qwen2", use_sliding_window=True, **some).windows == (None,) * 4 + (5,) * 3
    types = ["sliding_attention"] + ["full_attention"] * 6
    config = read("qwen3", use_sliding_window=True, sliding_window=5, layer_types=types)
    assert config.windows == (5,) + (None,) * 6


def test_windows_of_gemma_by_pattern_and_by_type():
    assert read("gemma3_text", sliding_window=5).windows == (5,) * 5 + (None, 5)
    assert read("gemma3_text", sliding_window=5, sliding_window_pattern=2).windows == (
        5,
        None,
    ) * 3 + (5,)


def test_every_second_way_to_say_the_rotary_base():
    assert read(rope_theta=5e5).ropes[0] == Rope(5e5)
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).ropes[0] == Rope(5e5)
    assert read(rope_theta=5e5, rope_scaling={"rope_type": "default"}).ropes[0] == Rope(5e5)
    assert read(rope_scaling={"type": "linear", "factor": 4}).ropes[0] == Rope(1e4, (4.0,))
    assert read(rope_scaling=None).ropes[0] == Rope(1e4)


def test_start_and_end_tokens():
    config = read(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=None)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2, 3), None)
    assert read(eos_token_id=2).eos_token_ids == (2,) and read().eos_token_ids == ()


REFUSED = [
    ("gpt2", {}, "model_type 'gpt2' is not one of llama"),
    ("qwen3_moe", {}, "model_type 'qwen3_moe'"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not one of"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not one of"),
    ("llama", {"rope_scaling": {"factor": 2.0}}, "a factor without a rope_type"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}},
        "'beta' is not known",
    ),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved: True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act: .'silu'."),
    ("llama", {"use_mrope": True}, "use_mrope: True is not supported"),
    ("llama", {"sliding_window": 5}, "sliding_window: llama has none"),
    ("llama", {"num_experts": 8}, "num_experts: not a key that slidejax knows"),
    ("llama", {"auto_map": {"AutoModel": "x.X"}}, "auto_map"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("mistral", {"attention_bias": True}, "attention_bias: True is not supported"),
    ("mistral", {"layer_types": ["full_attention"] * 7}, "layer_types: mistral has the same"),
    ("qwen2", {"attention_bias": False}, "attention_bias: qwen2 has biases"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 7}, "use_sliding_window is false"),
    ("qwen3", {"layer_types": ["linear_attention"] * 7}, "'linear_attention' is neither"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "are not the types of Gemma"),
]


@pytest.mark.parametrize(("model_type", "change", "match"), REFUSED)
def test_another_computation_is_refused_by_name(model_type, change, match):
    with pytest.raises(NotImplementedError, match=match):
        read(model_type, **change)


@pytest.mark.parametrize(
    ("model_type", "change", "match"),
    [
        ("llama", {"hidden_size": "absent"}, "lacks hidden_size"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ("llama", {"vocab_size": 64.0}, "vocab_size must be a positive integer"),
        (
            "llama",
            {"num_key_value_heads": 3},
            "num_key_value_heads must be a divisor of num_attention_heads, 4, got 3",
        ),
        ("llama", {"head_dim": 7}, "head_dim must be even"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number"),
        ("llama", {"rope_theta": -1}, "rope_theta must be a positive number"),
        ("llama", {"rope_scaling": [4]}, "rope_scaling must be an object"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ("llama", {"eos_token_id": ["</s>"]}, "eos_token_id must be a token id"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer or null"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window must be a positive integer"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types must be a list of 7"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": 3}},
            "rope_parameters.full_attention must be an object or null",
        ),
    ],
)
def test_impossible_values_are_named(model_type, change, match):
    with pytest.raises(ValueError, match=match):
        read(model_type, **change)


def test_harmless_keys_and_nulls_change_nothing():
    harmless = {"torch_dtype": "bfloat16", "use_cache": True, "attention_dropout": 0.0}
    assert read(**harmless, attn_logit_softcapping=None, never_heard_of=None) == read()


def test_what_the_published_smollm2_says_is_read():
    config = read(
        architectures=["LlamaForCausalLM"],
        is_llama_config=True,
        pretraining_tp=1,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        tie_word_embeddings=True,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    )
    assert config.tied and config.ropes[0] == Rope(100000.0)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(windows=(3, None), ropes=(Rope(5.0, (2.0,)), Rope(1e4)), eos_token_ids=(1, 2)),
    ],
)
def test_a_configuration_goes_through_json(config):
    assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert hash(config) == hash(DecoderConfig.from_json(config.to_json()))


@pytest.mark.parametrize(
    "change",
    [
        {"nonsense": 1},
        {"ropes": None},
        {"ropes": [{"theta": "x", "divisors": []}] * 2},
        {"vocab_size": "64"},
        {"norm_eps": "x"},
        {"windows": [0, None]},
        {"windows": ["a", None]},
        {"tied": 3},
    ],
)
def test_json_of_another_kind_is_refused(change):
    with pytest.raises(ValueError, match=r"not a DecoderConfig|must be"):
        DecoderConfig.from_json({**tiny_config().to_json(), **change})


# --- damaged and contradictory files --------------------------------------------------------------

ODD = [None, "8", "", 0, -1, 1.5, True, [], {}, [1], {"a": 1}, float("nan"), 1e400, 10**400, 2**70]
KEYS = [
    *SIZES,
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "sliding_window_pattern",
    "layer_types",
    "query_pre_attn_scalar",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "architectures",
]


@given(
    model_type=st.sampled_from(MODEL_TYPES), key=st.sampled_from(KEYS), value=st.sampled_from(ODD)
)
def test_an_odd_value_is_read_or_refused_by_its_key(model_type, key, value):
    try:
        config = read(model_type, **{key: value})
    except (ValueError, NotImplementedError) as e:
        said = str(e)
        assert key in said or "hidden_size" in said
    else:
        assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("model_type", "change", "match"),
    [
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 4096"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of num_att"),
        ("llama", {"head_dim": 7}, "head_dim must be even, got 7"),
        ("llama", {"num_attention_heads": 64}, "num_attention_heads must be at most hidden_size"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive"),
        (
            "llama",
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta must be what rope_parameters.rope_theta is, 500000.0, got 10000.0",
        ),
        (
            "llama",
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
            "rope_scaling must be what rope_parameters is",
        ),
        (
            "gemma3_text",
            {
                "rope_local_base_freq": 7.0,
                "rope_parameters": {"sliding_attention": {"rope_theta": 8.0}},
            },
            "rope_local_base_freq must be what rope_parameters.sliding_attention.rope_theta is",
        ),
        (  # transformers 4 takes one base, and transformers 5 the other
            "llama",
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_scaling.rope_theta must be what rope_theta is, 10000.0, got 500000.0",
        ),
        (
            "qwen2",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}},
            "rope_scaling.rope_theta must be what rope_theta is, 10000.0, got 500000.0",
        ),
        (
            "gemma3_text",
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}},
            "rope_scaling.rope_theta must be what rope_theta is, 1000000.0, got 10000.0",
        ),
        (
            "llama",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 0.5,
                }
            },
            "original_max_position_embeddings must be 1 or more, got 0.5",
        ),
    ],
)
def test_values_that_cannot_be_or_contradict_each_other(model_type, change, match):
    with pytest.raises(ValueError, match=match):
        read(model_type, **change)


def test_both_versions_of_the_rotary_keys_may_say_the_same():
    old = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}
    assert read(**old) == read(**new) == read(**old, **new)
    assert read(eos_token_id=[2, -1]).eos_token_ids == (2,)


def test_a_base_inside_rope_scaling_may_say_the_same():
    inside = {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    outside = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert read(rope_theta=5e5, **inside) == read(rope_theta=5e5, **outside)


def test_heads_that_were_cut_off_are_refused():
    assert read(pruned_heads={}) == read()
    with pytest.raises(NotImplementedError, match="pruned_heads"):
        read(pruned_heads={"0": [1]})


def test_a_class_of_another_architecture_is_refused():
    with pytest.raises(NotImplementedError, match="architectures: Qwen2ForCausalLM is no 'llama'"):
        read(architectures=["Qwen2ForCausalLM"])
    assert read(architectures=["YiForCausalLM"]) == read()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"eos_token_ids": ["a"]}, "natural numbers"),
        ({"bos_token_id": -1}, "natural numbers"),
        ({"ropes": [{"theta": 0.0, "divisors": []}] * 2}, "must be positive"),
    ],
)
def test_saved_tokens_and_ropes_are_checked(change, match):
    with pytest.raises(ValueError, match=match):
        DecoderConfig.from_json({**tiny_config().to_json(), **change})

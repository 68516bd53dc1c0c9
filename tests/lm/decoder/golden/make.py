"""Makes the golden files in this folder: tiny random checkpoints and the logits of PyTorch.

    pip install torch "transformers>=5" compressed-tensors
    python tests/lm/decoder/golden/make.py [FOLDER]

Each case is a directory as transformers writes it, and `golden.safetensors` with token ids
`[2, 40]` and float32 logits `[2, 40, vocab]` of `transformers`' own class in eager attention.
The tests read these files and need neither PyTorch nor transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}

# name -> (model_type, dtype of the file, shards or not, what the configuration says beside SIZES)
CASES = {
    "llama": ("llama", "float32", False, {"rms_norm_eps": 1e-5}),
    "llama_bias": (
        "llama",
        "bfloat16",
        False,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "num_key_value_heads": 4},
    ),
    "llama_linear": (
        "llama",
        "float16",
        True,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ),
    "llama3": (
        "llama",
        "bfloat16",
        False,
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", "bfloat16", False, {"sliding_window": 7, "num_key_value_heads": 1}),
    "mistral_null": ("mistral", "bfloat16", False, {"sliding_window": None}),
    "qwen2": ("qwen2", "bfloat16", False, {"tie_word_embeddings": True}),
    "qwen2_window": (
        "qwen2",
        "bfloat16",
        False,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", "bfloat16", False, {"head_dim": 12}),
    "gemma3": (
        "gemma3_text",
        "bfloat16",
        False,
        {
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA_ROPE,
            "head_dim": 12,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 20,
        },
    ),
}

# 8-bit checkpoints in the format of compressed-tensors:
# name -> (type, dtype, largest code)
QUANTIZED = {
    "w8a8_int8": ("int", "int8", 127),
    "w8a8_fp8": ("float", "float8_e4m3fn", 448),
}


def quantization_config(kind: str) -> dict:
    """The entry of compressed-tensors for symmetric 8-bit weights and activations."""
    args = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**args, "strategy": "channel", "dynamic": False},
        "input_activations": {**args, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def quantized(folder: Path, name: str) -> None:
    """The case "llama" with 8-bit weights, and the logits that transformers computes with them."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    kind, dtype, largest = QUANTIZED[name]
    case, source = folder / name, folder / "llama"
    case.mkdir(exist_ok=True)
    tensors = {}
    for key, value in load_file(source / "model.safetensors").items():
        if "_proj" in key:
            scale = value.abs().amax(1, keepdim=True) / largest
            codes = value / scale
            tensors[key] = (codes.round() if kind == "int" else codes).to(getattr(torch, dtype))
            tensors[f"{key}_scale"] = scale
        else:
            tensors[key] = value
    save_file(tensors, case / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(kind)
    (case / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ids = load_file(source / "golden.safetensors")["ids"]
    model = AutoModelForCausalLM.from_pretrained(
        case, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = model(ids.to(torch.int64)).logits
    save_file({"ids": ids, "logits": logits}, case / "golden.safetensors")
    print(name, float(logits.abs().max()))


def main(folder: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    for index, (name, (model_type, dtype, shards, changes)) in enumerate(CASES.items()):
        torch.manual_seed(index)
        config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.to(torch.float32).eval()
        zero_based = model_type.startswith("gemma")
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                draw = torch.randn_like(parameter)
                if "norm" in path:  # norms that a mistake cannot hide behind
                    parameter.copy_(draw * 0.2 + (0.0 if zero_based else 1.0))
                elif parameter.ndim == 1:
                    parameter.copy_(draw * 0.3)
                else:
                    parameter.copy_(draw * 1.5 / parameter.shape[1] ** 0.5)
                # What the file holds is what the logits are computed from.
                parameter.copy_(parameter.to(getattr(torch, dtype)).to(torch.float32))
            ids = torch.randint(0, SIZES["vocab_size"], (2, 40))
            logits = model(ids).logits
        case = folder / name
        model.to(getattr(torch, dtype)).save_pretrained(
            case, max_shard_size="20KB" if shards else "1GB"
        )
        (case / "generation_config.json").unlink(missing_ok=True)
        save_file({"ids": ids.to(torch.int32), "logits": logits}, case / "golden.safetensors")
        print(name, sum(file.stat().st_size for file in case.iterdir()), float(logits.abs().max()))
    for name in QUANTIZED:
        quantized(folder, name)
    (folder / "versions.json").write_text(
        json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

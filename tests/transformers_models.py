"""Flax models of transformers, made and run by one program each, not operation by operation."""

import jax

import slidejax as sj


def made(cls, config):
    """A model with parameters that are drawn."""
    model = cls(config, _do_init=False)
    draw = jax.jit(lambda key: model.init_weights(key, (1, 1)))
    return sj.huggingface.with_params(model, draw(jax.random.key(0)))


def logits(model, ids, params=None):
    """The model's logits with its own or other parameters."""
    run = jax.jit(lambda params: model(ids, params=params).logits)
    return run(model.params if params is None else params)


def gated(family, activation):
    """A tiny model of a family with gated MLPs."""
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    sizes["max_position_embeddings"] = 64  # Flax makes a mask of its square
    name = {"llama": "Llama", "mistral": "Mistral", "gemma": "Gemma"}[family]
    options = (
        {"hidden_activation": activation, "head_dim": 16}
        if family == "gemma"
        else {"hidden_act": activation}
    )
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    return made(getattr(transformers, f"Flax{name}ForCausalLM"), config)

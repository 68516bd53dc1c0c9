"""Hugging Face models that run with other arithmetic: the base of the rotary positions."""

import jax
import numpy as np
import pytest
from tiny_logits import IDS, logits

pytest.importorskip("transformers")

import slidejax.checkpoint.huggingface as hf
from slidejax.lm.generate import Generator


def rope_reference(x, theta):
    """Rotary positions written out in NumPy, for `[batch, position, head, dim]`.

    From Su et al., arXiv 2104.09864, eq. 15.
    """
    dim = x.shape[-1]
    angle = np.arange(x.shape[1])[:, None] / theta ** (np.arange(0, dim, 2) / dim)
    turned = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * np.exp(1j * angle)[:, None, :]
    return np.concatenate([turned.real, turned.imag], -1)


def attention_reference(params, config, x):
    """The first layer's attention output (before o_proj) for float64 input x [position, hidden]."""
    heads, kv, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads,
    )
    q, k, v = (x @ np.asarray(params[f"{n}_proj"]["kernel"], np.float64) for n in "qkv")
    q = rope_reference(q.reshape(1, -1, heads, dim), config.rope_theta)[0]
    k = rope_reference(k.reshape(1, -1, kv, dim), config.rope_theta)[0].repeat(heads // kv, 1)
    v = v.reshape(-1, kv, dim).repeat(heads // kv, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v).reshape(
        len(x), -1
    )


def test_the_rope_base_of_the_configuration_is_used(tiny_config, tiny_llama):
    """Against attention written out in NumPy.

    The result of transformers' own module, with base 10000, is far from it.
    """
    import flax.linen as nn
    from transformers import FlaxLlamaForCausalLM
    from transformers.models.llama.modeling_flax_llama import FlaxLlamaAttention

    def attention(model):
        """The input of the first layer's attention and what enters its o_proj."""

        @jax.jit
        def run(params):
            seen = []

            def record(next_fun, args, kwargs, context):
                first = (
                    isinstance(context.module, FlaxLlamaAttention)
                    or context.module.name == "o_proj"
                )
                if first and context.method_name == "__call__":
                    seen.append(args[0])
                return next_fun(*args, **kwargs)

            with nn.intercept_methods(record):
                model(IDS, params=params)
            return seen[0][0], seen[1][0]

        x, out = run(tiny_llama.params)
        return np.asarray(x, np.float64), np.asarray(out)

    x, ours = attention(tiny_llama)
    expected = attention_reference(
        tiny_llama.params["model"]["layers"]["0"]["self_attn"], tiny_config, x
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    _, theirs = attention(FlaxLlamaForCausalLM(tiny_config, _do_init=False))
    assert np.abs(theirs - expected).max() > 0.05


def test_generation_agrees_with_the_whole_sequence(tiny_llama):
    """The cache holds keys rotated at their own positions.

    So greedy tokens equal those of a full forward pass.
    """
    ids = IDS[:1, :5]
    out = Generator(tiny_llama, 6, stop=False)(ids[0]).tokens
    whole = np.concatenate([ids[0], out])
    assert len(out) == 6 and list(logits(tiny_llama, whole[None])[0, 4:-1].argmax(-1)) == out


def test_a_base_of_10000_leaves_the_module_alone(tiny_config, tiny_params):
    from transformers import FlaxLlamaForCausalLM

    config = type(tiny_config)(**{**tiny_config.to_dict(), "rope_theta": 10000.0})
    model = hf.build(config, tiny_params)
    assert type(model.module) is type(FlaxLlamaForCausalLM(config, _do_init=False).module)

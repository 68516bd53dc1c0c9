"""A Hugging Face Flax Llama is made sparse, generates under jax.jit, and is saved and loaded.

Its weights are random, so nothing is downloaded and nothing is calibrated. For a real model, pass a
method and tokens: `sj.huggingface.convert(model, "6:8", "sparsegpt", tokens)`.
"""

import tempfile

import jax
from transformers import FlaxLlamaForCausalLM, LlamaConfig

import slidejax as sj
from slidejax.lm.generate import Generator
from slidejax.lm.models import load_model

config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
model = FlaxLlamaForCausalLM(config)
sparse = sj.huggingface.convert(model, "6:8")  # all linear layers but the head, int8
print(
    type(sparse).__name__, sparse.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].pattern
)

generate = jax.jit(
    lambda params, ids: (
        sparse.generate(ids, params=params, max_new_tokens=8, pad_token_id=0).sequences
    )
)
tokens = generate(sparse.params, jax.numpy.array([[1, 2, 3]]))
print("generated", tokens.shape)

with tempfile.TemporaryDirectory() as folder:
    sparse.save_pretrained(folder + "/out")  # the form that every `slidejax` command reads
    again = load_model(folder + "/out").model
    same = Generator(again, 8)([1, 2, 3]).tokens == Generator(sparse, 8)([1, 2, 3]).tokens
    print("the same tokens after loading", same)

"""A pruned Hugging Face Llama learns from its original what pruning lost.

The original model writes the text itself, so no data are needed. Only the kept values are trained,
rounded to int8 in every step, as they will be when the model serves. The weights are random, so
nothing is downloaded.
"""

import numpy as np
from transformers import FlaxLlamaForCausalLM, LlamaConfig

import slidejax as sj
from slidejax.lm.evaluate import evaluate
from slidejax.train import sample

config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,
)
original = FlaxLlamaForCausalLM(config)
sparse = sj.huggingface.convert(original, "4:6")

prompts = np.arange(96)[:, None]  # one token each
text = sample(original, prompts, 48, batch=96, seed=0)
train, held_out = text[:80], text[80:].ravel()

recovered, fitted = sj.recover(
    sparse, original, train, steps=60, batch=16, window=48, learning_rate=3e-3, hidden=1.0
)

before, after = (
    evaluate(model, held_out, window=48, reference=original).agreement
    for model in (sparse, recovered)
)
print(
    f"KL divergence from the original model: {before.kl:.1f} nats pruned, {after.kl:.1f} recovered"
)
print(f"the same first choice: {before.top1:.1f} of the tokens pruned, {after.top1:.1f} recovered")
kernel, start = (
    m.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"] for m in (recovered, sparse)
)
print(
    "still",
    kernel.pattern,
    kernel.dtype,
    "on the same mask:",
    bool((kernel.zeros == start.zeros).all()),
)
print("steps", fitted.steps, "with the loss of each:", fitted.losses.shape)

"""A decoder writes text: piece by piece, many prompts at once, and after conversion.

The model here is tiny and its weights are random, so its text has no meaning. A real one comes from
files: `model = sj.lm.load("path/to/checkpoint")`, which needs nothing but safetensors, config.json
and tokenizer.json, or one GGUF file.
"""

import tempfile
from pathlib import Path

import slidejax as sj
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.text.examples import byte_tokenizer

made = tiny(vocab_size=260, max_positions=256)
model = sj.lm.Decoder(made.config, made.params, files=byte_tokenizer().files())

pieces = list(model.stream("The moon is", max_new_tokens=24))
whole = model.generate("The moon is", max_new_tokens=24)
print("the pieces are the text", "".join(pieces) == whole.text)

# Prompts may have any lengths. Each gets what it would get alone.
prompts = ["The moon is", "A longer prompt, which goes on for a while, and then it ends", "Yes"]
together = model.generate(prompts, max_new_tokens=24)
print("alone as together", together[0] == whole)

# The options that are given count, and no others. The same seed gives the same text.
options = {"max_new_tokens": 24, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
first, again, other = (model.generate("Yes", seed=seed, **options) for seed in (1, 1, 2))
print("the same seed, the same text", first == again, "another seed, another", first != other)

sparse = sj.lm.convert(model, "6:8")  # for a real model also "sparsegpt" and tokens
with tempfile.TemporaryDirectory() as folder:
    sj.lm.save(sparse, Path(folder) / "out")
    back = sj.lm.load(Path(folder) / "out")
print(
    "saved and loaded, it writes the same",
    back.generate(prompts, max_new_tokens=8) == sparse.generate(prompts, max_new_tokens=8),
)

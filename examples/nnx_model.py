"""An NNX model that exists already. Its linear layers are replaced; the rest of its code stays."""

import jax
import jax.numpy as jnp
from flax import nnx

import slidejax as sj


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=width, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


model = Block(64, rngs=nnx.Rngs(0))
report = sj.Report()
# The first rule that matches a layer's path counts.
# Attention keeps 14 of 16 weights, the rest 6 of 8.
sparse = sj.nnx.convert(model, [(".*attention.*", "14:16"), (".*", "6:8")], report=report)

x = jax.random.normal(jax.random.key(1), (2, 16, 64))
original_y, y = nnx.jit(lambda m, x: m(x))(model, x), nnx.jit(lambda m, x: m(x))(sparse, x)
print(
    "up is a",
    type(sparse.up).__name__,
    "with values",
    sparse.up.kernel.values.shape,
    sparse.up.kernel.dtype,
)
print("layers converted", len(report.converted), "skipped", len(report.skipped))
print(
    "correlation with the original model above 0.9",
    bool(jnp.corrcoef(original_y.ravel(), y.ravel())[0, 1] > 0.9),
)

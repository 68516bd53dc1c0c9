"""A sparse layer in place of nn.Dense, in a jitted loop.

Two lines differ from the original model.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import slidejax as sj


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(sj.linen.SlideDense(256, pattern="6:8", qdtype="int8")(x))  # was nn.Dense(256)
        return sj.linen.SlideDense(64, pattern="6:8", qdtype="int8")(x)  # was nn.Dense(64)


x = jax.random.normal(jax.random.key(0), (4, 64))
model = MLP()
params = model.init(jax.random.key(1), x)  # the weights are pruned and packed here


@jax.jit
def loop(params, x):
    return jax.lax.fori_loop(0, 10, lambda _, x: nn.standardize(model.apply(params, x)), x)


kernel = params["params"]["SlideDense_0"]["kernel"]
print(
    "pattern",
    kernel.pattern,
    "values",
    kernel.values.shape,
    kernel.values.dtype,
    "zeros",
    kernel.zeros.shape,
)
print("bytes", kernel.nbytes, "instead of", 4 * 64 * 256, "in float32")
print("output", loop(params, x).shape, "finite", bool(jnp.isfinite(loop(params, x)).all()))

"""A Llama-style MLP whose norm and gate are part of the linear layers that follow them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import slidejax as sj

WIDTH, HIDDEN = 64, 192
key = jax.random.key(0)
x = jax.random.normal(key, (4, 16, WIDTH), jnp.bfloat16)
norm = jnp.ones(WIDTH)
gate, up, down = (
    sj.pack(nn.initializers.lecun_normal()(jax.random.fold_in(key, i), shape), "6:8", dtype="int8")
    for i, shape in enumerate([(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)])
)


@jax.jit
def mlp(x):
    """RMSNorm -> gate and up -> silu(gate) * up -> down, each step by itself."""
    h = nn.RMSNorm(dtype=x.dtype).apply({"params": {"scale": norm}}, x)
    return sj.linear(nn.silu(sj.linear(h, gate)) * sj.linear(h, up), down)


@jax.jit
def fused(x):
    """The same with prologues: nothing between two layers is written out and read again."""
    rms = sj.RMSNorm(norm, eps=1e-6)
    return sj.linear(
        sj.linear(x, gate, prologue=rms),
        down,
        prologue=sj.GLU(sj.linear(x, up, prologue=rms), "silu"),
    )


a, b = (y.astype(jnp.float32) for y in (mlp(x), fused(x)))
print(
    "result",
    b.shape,
    "relative difference below 1%",
    bool(jnp.linalg.norm(a - b) < 0.01 * jnp.linalg.norm(a)),
)
grads = jax.grad(
    lambda scale: (sj.linear(x, gate, prologue=sj.RMSNorm(scale)).astype(jnp.float32) ** 2).mean()
)(norm)
print("gradient of the norm's weight", grads.shape, "finite", bool(jnp.isfinite(grads).all()))

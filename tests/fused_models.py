"""Layers that read the same input, for the tests of fused projections."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import slidejax as sj

RULES = [(r".*_proj/kernel", sj.Rule("6:8", "int8"))]


class Attention(nn.Module):
    bias: bool = False
    late: bool = False  # whether k and v read something else than q

    def setup(self):
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Dense(n, use_bias=self.bias) for n in (48, 16, 24)
        )

    def __call__(self, x):
        other = x + 1 if self.late else x
        # The layers are not called in the order of their names.
        v, q, k = self.v_proj(other), self.q_proj(x), self.k_proj(other)
        return jnp.concatenate([q * 2, k, v], -1)


class Block(nn.Module):
    bias: bool = False
    late: bool = False

    def setup(self):
        self.attention = Attention(self.bias, self.late)
        self.gate_proj, self.up_proj, self.down_proj = nn.Dense(40), nn.Dense(40), nn.Dense(64)

    def __call__(self, x):
        x = self.attention(x)[..., :64]
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


def converted(model, x, rules=RULES, seed=0):
    variables = jax.jit(model.init)(jax.random.key(seed), x)
    noise = iter(jax.random.split(jax.random.key(seed + 1), 99))
    variables = jax.tree.map(
        lambda leaf: leaf + jax.random.normal(next(noise), leaf.shape) * 0.1, variables
    )
    return sj.linen.convert(variables, rules, model, x)


def products(fn, *args) -> list[int]:
    """Outputs of every product that a program computes."""
    return [problem.out_features for problem, _ in sj.explain(fn, *args)]

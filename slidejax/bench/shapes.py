"""Sizes of well-known models, to be measured: their linear layers alone, and whole decoders."""

from __future__ import annotations

import dataclasses

__all__ = ["MODELS", "PRESETS", "Sizes", "default_preset"]

# (out, in) of the linear layers of one decoder block. q, k and v are one product here, and gate and
# up another one, since servers fuse them.
PRESETS: dict[str, tuple[tuple[int, int], ...]] = {
    "qwen2.5-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "square-8192": ((8192, 8192),),
    "smollm2": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder.

    Attributes:
      hidden: columns of the residual stream.
      intermediate: columns between up and down of the MLP.
      heads: of the queries.
      kv_heads: heads of keys and values; it divides `heads`.
      head: columns of one head; even.
      layers: blocks of the published model.
      theta: base of the rotary embedding.
      eps: added to the mean of squares in a norm.
      vocabulary: rows of the embedding and of the head. It is the same for all published models
        here, because the head is not compared.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    layers: int
    theta: float = 1e4
    eps: float = 1e-5
    vocabulary: int = 32000

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the products of one block, by name, in the order in which they run.

        >>> MODELS["llama-3-8b"].linears["qkv"]
        (6144, 4096)
        """
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head, self.hidden),
            "o": (self.hidden, self.heads * self.head),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


# From the configurations that were published with the models. Qwen2.5's q, k and v have biases,
# which are left out. "tiny" is no model: it shows in seconds whether the command works.
MODELS: dict[str, Sizes] = {
    "llama-3-8b": Sizes(4096, 14336, 32, 8, 128, layers=32, theta=5e5),
    "qwen2.5-7b": Sizes(3584, 18944, 28, 4, 128, layers=28, theta=1e6, eps=1e-6),
    "qwen2.5-0.5b": Sizes(896, 4864, 14, 2, 64, layers=24, theta=1e6, eps=1e-6),
    "smollm2-135m": Sizes(576, 1536, 9, 3, 64, layers=30, theta=1e5),
    "tiny": Sizes(64, 96, 4, 2, 16, layers=2, vocabulary=256),
}


def default_preset() -> str:
    """The preset to measure by default: qwen2.5-7b on a GPU, smollm2 on a CPU."""
    import jax  # here: the names of the presets are read where nothing is measured

    return "qwen2.5-7b" if jax.default_backend() == "gpu" else "smollm2"

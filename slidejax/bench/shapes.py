"""Shapes of the linear layers of well-known models, to be measured."""

from __future__ import annotations

__all__ = ["PRESETS", "default_preset"]

# (out, in) of the linear layers of one decoder block. q, k and v are one product here, and gate and
# up another one, since servers fuse them.
PRESETS: dict[str, tuple[tuple[int, int], ...]] = {
    "qwen2.5-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "square-8192": ((8192, 8192),),
    "smollm2": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
}


def default_preset() -> str:
    """The preset to measure by default: qwen2.5-7b on a GPU, smollm2 on a CPU."""
    import jax  # here: the names of the presets are read where nothing is measured

    return "qwen2.5-7b" if jax.default_backend() == "gpu" else "smollm2"

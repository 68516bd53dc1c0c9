"""A tiny decoder with random weights, for examples and tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.lm.decoder.config import DecoderConfig, Rope
from slidejax.lm.decoder.model import Decoder
from slidejax.lm.decoder.params import expected

__all__ = ["random_params", "tiny", "tiny_config"]


def tiny_config(num_layers: int = 2, **changes: Any) -> DecoderConfig:
    """The configuration of a Llama with 64 tokens, with some fields changed."""
    config = DecoderConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=128,
        norm_eps=1e-5,
        activation="silu",
        tied=False,
        windows=(None,) * num_layers,
        ropes=(Rope(10000.0),) * num_layers,
        query_scale=8**-0.5,
    )
    return dataclasses.replace(config, **changes)


def random_params(config: DecoderConfig, seed: int = 0, dtype: Any = "float32") -> dict[str, Any]:
    """Random parameters; norms are near one and stay float32."""
    params: dict[str, Any] = {}
    keys = jax.random.split(jax.random.key(seed), len(expected(config)))
    for key, (path, shape) in zip(keys, expected(config).items(), strict=True):
        *folders, name = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        draw = jax.random.normal(key, shape, jnp.float32)
        node[name] = (
            1 + draw / 10
            if name == "weight"
            else (draw * shape[0] ** -0.5 if len(shape) == 2 else draw / 10).astype(dtype)
        )
    return params


def tiny(seed: int = 0, dtype: Any = "float32", **changes: Any) -> Decoder:
    """A decoder of `tiny_config` with random parameters.

    >>> tiny().config.num_layers
    2
    """
    config = tiny_config(**changes)
    return Decoder(config, random_params(config, seed, dtype))

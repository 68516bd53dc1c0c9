"""Checks of a decoder's parameters: paths, shapes and kinds, by its configuration.

`slidejax.lm.decoder.apply` says what they mean.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from slidejax.lm.decoder.config import DecoderConfig
from slidejax.weights.packed import LinearWeight

__all__ = ["GROUPS", "check_params", "check_tree", "expected", "leaves_of"]

# Layers that may lie together: module -> (their name together, their names apart).
GROUPS = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


@functools.lru_cache(maxsize=32)
def expected(config: DecoderConfig) -> Mapping[str, tuple[int, ...]]:
    """The shapes of a decoder's parameters by their paths; kernels are `[in, out]`.

    >>> from slidejax.lm.decoder.examples import tiny
    >>> expected(tiny().config)["model/layers/0/mlp/up_proj/kernel"]
    (32, 48)
    """
    hidden, inner, q, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.q_size,
        config.kv_size,
    )
    shapes: dict[str, tuple[int, ...]] = {
        "model/embed_tokens/embedding": (config.vocab_size, hidden)
    }
    linears = (
        ("self_attn/q_proj", hidden, q, config.qkv_bias),
        ("self_attn/k_proj", hidden, kv, config.qkv_bias),
        ("self_attn/v_proj", hidden, kv, config.qkv_bias),
        ("self_attn/o_proj", q, hidden, config.output_bias),
        ("mlp/gate_proj", hidden, inner, config.mlp_bias),
        ("mlp/up_proj", hidden, inner, config.mlp_bias),
        ("mlp/down_proj", inner, hidden, config.mlp_bias),
    )
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.sandwich_norm:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for i in range(config.num_layers):
        layer = f"model/layers/{i}/"
        shapes.update({f"{layer}{name}/weight": (hidden,) for name in norms})
        if config.qk_norm:
            shapes.update(
                {f"{layer}self_attn/{n}_norm/weight": (config.head_dim,) for n in ("q", "k")}
            )
        for name, size_in, size_out, bias in linears:
            shapes[f"{layer}{name}/kernel"] = (size_in, size_out)
            if bias:
                shapes[f"{layer}{name}/bias"] = (size_out,)
    shapes["model/norm/weight"] = (hidden,)
    if not config.tied:
        shapes["lm_head/kernel"] = (hidden, config.vocab_size)
    return MappingProxyType(shapes)


def check_tree(params: Any) -> None:
    """Raises a TypeError for values that are no parameters of a decoder at all."""
    if not isinstance(params, Mapping) or not isinstance(params.get("model"), Mapping):
        raise TypeError(f"params must be a decoder's nested dicts, got {type(params).__name__}")


def check_params(
    config: DecoderConfig, params: Mapping[str, Any], *, layouts: bool = False
) -> None:
    """Raises a ValueError unless the tree holds what the configuration says, and nothing else.

    Args:
      config: the configuration.
      params: nested dicts of arrays and weights. Only shapes and dtypes are looked at.
      layouts: whether the layouts of `slidejax.lm.decoder.fuse` are right, too.

    Raises:
      ValueError: naming the paths, and the shapes found and expected.
      TypeError: naming the path, if a leaf of a weight is no array.
    """
    found = dict(leaves_of(params))
    shapes = _as_laid_out(config, found) if layouts else expected(config)
    problems = [f"{path} is missing" for path in shapes if path not in found]
    problems += [f"{path} is unknown" for path in found if path not in shapes]
    for path, shape in shapes.items():
        if path not in found:
            continue
        value = found[path]
        if isinstance(value, LinearWeight) and path.endswith("/kernel"):
            value.check(path)
        elif not _is_floating(value):
            problems.append(f"{path} is {_dtype_of(value)} instead of floating")
            continue
        if tuple(value.shape) != shape:
            problems.append(f"{path} is {tuple(value.shape)} instead of {shape}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"parameters do not fit the configuration: {', '.join(problems[:3])}{more}"
        )


def _as_laid_out(config: DecoderConfig, found: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The result of `expected`, with the layers fused that are fused in `found`."""
    shapes = dict(expected(config))
    head = "lm_head/kernel"
    if head in found:  # a tied embedding may have a copy that serves
        shapes[head] = (config.hidden_size, config.vocab_size)
    for i in range(config.num_layers):
        for module, (together, parts) in GROUPS.items():
            path = f"model/layers/{i}/{module}/"
            if f"{path}{together}/kernel" not in found:
                continue
            for name in ("kernel", "bias"):
                apart = [shapes.pop(f"{path}{part}/{name}", None) for part in parts]
                if sizes := [shape for shape in apart if shape is not None]:
                    inputs, out = sizes[0][:-1], sum(shape[-1] for shape in sizes)
                    shapes[f"{path}{together}/{name}"] = (*inputs, out)
    return shapes


def _dtype_of(value: Any) -> str:
    dtype = None if isinstance(value, LinearWeight) else getattr(value, "dtype", None)
    return type(value).__name__ if dtype is None else np.dtype(dtype).name


def _is_floating(value: Any) -> bool:
    if isinstance(value, LinearWeight) or not hasattr(value, "shape"):
        return False
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)


def leaves_of(tree: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of nested dicts with their '/'-joined paths."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves_of(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value

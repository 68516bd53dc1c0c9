"""`Decoder`: the NNX shell around the pure function `slidejax.lm.decoder.apply`.

The shell holds the parameters as NNX layers, so that `slidejax.nnx.convert`,
`slidejax.nnx.map_weights` and everything else for NNX models works. What runs is the function:
`params` takes the shell apart once, and loops take the tree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from slidejax.contraction import Contraction
from slidejax.lm.decoder.apply import apply, outputs
from slidejax.lm.decoder.config import DecoderConfig, check_config
from slidejax.lm.decoder.writing import Writes
from slidejax.lm.text.files import TEXT_FILES, is_text_file
from slidejax.nnx.layers import SlideLayer, SlideLinear
from slidejax.weights.layout import as_array
from slidejax.weights.packed import LinearWeight

__all__ = ["Decoder", "expected", "leaves_of"]


class Decoder(Writes, nnx.Module):
    """A decoder of the Llama kind: Llama, Mistral, Qwen or Gemma, by its configuration.

    `slidejax.lm.load` makes one from files.

    Args:
      config: the configuration.
      params: nested dicts of arrays and weights, see `slidejax.lm.decoder.apply`.
      files: text files that go with the model, such as a tokenizer, by their names, which are those
        that a directory of Hugging Face has. `save` writes them beside the parameters.
      about: notes about where the model comes from, plain JSON values.

    Attributes:
      config: the configuration.
      files, about: as given.

    Raises:
      ValueError: naming them, if parameters are missing, unknown, not floating, or of another
        shape than the configuration says; or if a file has an unknown name.
      TypeError: if `config` or `params` are something else, or a file is no bytes.

    >>> from slidejax.lm.decoder.examples import tiny
    >>> model = tiny()
    >>> model(jax.numpy.array([[1, 2, 3]])).shape
    (1, 3, 64)
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: Mapping[str, Any],
        *,
        files: Mapping[str, bytes] | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        check_config(config)
        if not isinstance(params, Mapping):
            raise TypeError(f"params must be nested dicts, got {type(params).__name__}")
        _check_files({} if files is None else files)
        if about is not None and not isinstance(about, Mapping):
            raise TypeError(f"about must be a dict or None, got {type(about).__name__}")
        check_params(config, params)
        self.config = config
        self._extra = _Extra(dict(files or {}), dict(about or {}))
        self.model = _shell(params["model"])
        self.lm_head = nnx.data(_shell(params["lm_head"]) if "lm_head" in params else None)

    @property
    def files(self) -> dict[str, bytes]:
        return self._extra.files

    @property
    def about(self) -> dict[str, Any]:
        return self._extra.about

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the computation, which is that of the embedding."""
        return np.dtype(self.model["embed_tokens"]["embedding"].get_value().dtype)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as nested dicts of arrays and weights, for `slidejax.lm.decoder.apply`."""
        params = {"model": _tree(self.model)}
        if self.lm_head is not None:
            params["lm_head"] = _tree(self.lm_head)
        return params

    def with_params(self, params: Mapping[str, Any]) -> Decoder:
        """A new decoder with other parameters, and everything else the same.

        Raises:
          ValueError: as the constructor.
        """
        return type(self)(self.config, params, files=self.files, about=self.about)

    def __call__(self, ids: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Logits, float32 `[batch, tokens, vocab]`, without a cache; see `apply`.

        Raises:
          ValueError: as `apply`; or an id is outside the vocabulary, where ids are concrete.
          TypeError: as `apply`.
        """
        if not isinstance(ids, jax.core.Tracer):
            as_array(ids, "ids")
            self._check(np.asarray(ids))  # before JAX makes 32 bits of 64
        ids = as_array(ids, "ids")
        positions = None if positions is None else as_array(positions, "positions")
        return _logits(self.config, self.params, ids, positions)

    def _check(self, ids: np.ndarray) -> None:
        size = self.config.vocab_size
        bad = ids[(ids < 0) | (ids >= size)] if np.issubdtype(ids.dtype, np.integer) else ids[:0]
        if bad.size:
            raise ValueError(f"ids must be tokens of the model, 0 to {size - 1}, got {bad[0]}")

    def outputs(
        self, params: Mapping[str, Any], ids: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Logits and hidden states with these parameters, see `slidejax.lm.decoder.apply`."""
        return outputs(self.config, params, ids)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, ids, positions):
    return apply(config, params, ids, positions)[0]


class _Extra:
    """What goes with a model and takes no part in computing. NNX keeps it as one static object."""

    def __init__(self, files: dict[str, bytes], about: dict[str, Any]):
        self.files, self.about = files, about
        # The leaves of parameters, and what `generate` runs on in their place.
        self.served: tuple[list, Any] = ([], None)


# --- the shell and the tree -----------------------------------------------------------------------


def _shell(tree: Mapping[str, Any]) -> Any:
    """NNX modules of a tree; a dict with a kernel becomes a linear layer."""
    if "kernel" in tree:
        return _layer(tree["kernel"], tree.get("bias"))
    return nnx.Dict(
        {
            name: _shell(value) if isinstance(value, Mapping) else nnx.Param(value)
            for name, value in tree.items()
        }
    )


def _layer(kernel: Any, bias: Any) -> Any:
    layer: Any = nnx.merge(*_abstract_layer(*kernel.shape, bias is not None))
    if bias is not None:
        layer.bias = nnx.Param(bias)
    if not isinstance(kernel, LinearWeight):
        layer.kernel = nnx.Param(kernel)
        return layer
    packed = kernel.weight
    placeholder = layer.kernel
    del layer.kernel
    layer.__class__ = SlideLinear
    layer.hold(packed, placeholder, Contraction.dense(1).kernel)
    if kernel is not packed:
        layer.replace_kernel(kernel)
    return layer


@functools.lru_cache(maxsize=256)
def _abstract_layer(inputs: int, outputs: int, bias: bool) -> tuple[Any, Any]:
    """A linear layer, as `nnx.split` parts it. Nothing is initialised: its Variables are replaced.

    Tracing one takes milliseconds, and a model has hundreds of a few shapes.
    """
    return nnx.split(
        nnx.eval_shape(lambda: nnx.Linear(inputs, outputs, use_bias=bias, rngs=nnx.Rngs(0)))
    )


def _tree(module: Any) -> dict[str, Any]:
    if isinstance(module, (nnx.Linear, SlideLayer)):
        kernel = module.kernel
        layer = {"kernel": kernel.get_value() if isinstance(kernel, nnx.Variable) else kernel}
        bias = getattr(module, "bias", None)
        return layer if bias is None else {**layer, "bias": bias.get_value()}
    return {
        name: value.get_value() if isinstance(value, nnx.Variable) else _tree(value)
        for name, value in module.items()
    }


def _check_files(files: Mapping[str, bytes]) -> None:
    if not isinstance(files, Mapping):
        raise TypeError(f"files must be a dict of bytes by name, got {type(files).__name__}")
    for name, data in files.items():
        if not isinstance(name, str) or not is_text_file(name):
            raise ValueError(
                f"files has {name!r}, which is no file of a tokenizer or a configuration: expected "
                f"{', '.join(TEXT_FILES)} or additional_chat_templates/NAME.jinja"
            )
        if not isinstance(data, bytes):
            raise TypeError(f"files[{name!r}] must be bytes, got {type(data).__name__}")


# --- what parameters must be ----------------------------------------------------------------------


def expected(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
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
    return shapes


def check_params(config: DecoderConfig, params: Mapping[str, Any]) -> None:
    """Raises a ValueError unless the tree holds what `expected` says, and nothing else."""
    found = dict(leaves_of(params))
    shapes = expected(config)
    problems = [f"{path} is missing" for path in shapes if path not in found]
    problems += [f"{path} is unknown" for path in found if path not in shapes]
    problems += [
        f"{path} is {_dtype_of(found[path])} instead of floating"
        for path in shapes
        if path in found and not _is_floating(found[path])
    ]
    problems += [
        f"{path} is {tuple(found[path].shape)} instead of {shape}"
        for path, shape in shapes.items()
        if path in found and tuple(getattr(found[path], "shape", shape)) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"parameters do not fit the configuration: {', '.join(problems[:3])}{more}"
        )


def _dtype_of(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ if dtype is None else np.dtype(dtype).name


def _is_floating(value: Any) -> bool:
    if isinstance(value, LinearWeight):
        return True
    return hasattr(value, "dtype") and jax.numpy.issubdtype(value.dtype, jax.numpy.floating)


def leaves_of(tree: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of nested dicts with their '/'-joined paths."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves_of(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value

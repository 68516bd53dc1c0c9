"""`Decoder`: the NNX shell around the pure function `slidejax.lm.decoder.apply`.

The shell holds the parameters as NNX layers, so that `slidejax.nnx.convert`,
`slidejax.nnx.map_weights` and everything else for NNX models works. What runs is the function:
`params` takes the shell apart once, and loops take the tree.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from slidejax.contraction import Contraction
from slidejax.lm.decoder.apply import apply, outputs
from slidejax.lm.decoder.config import DecoderConfig, check_config
from slidejax.lm.decoder.inputs import check_ids, check_inputs
from slidejax.lm.decoder.params import check_params
from slidejax.lm.decoder.writing import Writes
from slidejax.lm.text.files import TEXT_FILES, is_text_file
from slidejax.nnx.layers import SlideLayer, SlideLinear
from slidejax.weights.packed import LinearWeight

__all__ = ["Decoder"]


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
          ValueError: as `apply`; or an id is outside the vocabulary, where ids are known.
          TypeError: as `apply`.
        """
        check_ids(self.config, ids, positions)
        ids, at = check_inputs(self.config, ids, positions, None, positions is None)
        return _logits(self.config, self.params, ids, None if positions is None else at)

    def outputs(
        self, params: Mapping[str, Any], ids: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Logits and hidden states with these parameters, see `slidejax.lm.decoder.apply`."""
        return outputs(self.config, params, ids)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, ids, positions):
    return apply(config, params, ids, positions)[0]


class _Extra:
    """The parts of a model that do not compute. NNX keeps them as one static object."""

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

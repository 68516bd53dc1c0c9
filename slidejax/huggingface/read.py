"""Reads directories with a Hugging Face Flax model: `config.json`, weights, `tokenizer.json`.

`read_pretrained` takes what Hugging Face writes: `flax_model.msgpack`, or safetensors in PyTorch's
or Flax's layout, whole or in shards. It also takes what `slidejax.huggingface.write_pretrained` and
`slidejax convert` write. That is the same directory, with the parameters and the packed weights in
slidejax's own two files. Nothing is downloaded, and pickled weights are refused.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from slidejax.checkpoint import store
from slidejax.checkpoint.staging import TEXT_FILES
from slidejax.files import check_path, check_regular, read_whole, reading
from slidejax.huggingface.model import hold, with_params, with_rope_theta
from slidejax.huggingface.supported import check_supported
from slidejax.kinds import check_kind, shown
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel, PretrainedConfig, PreTrainedTokenizerFast

__all__ = ["build", "cast", "model_class", "read_pretrained"]

# Buffers that PyTorch checkpoints carry and Flax modules compute.
_BUFFERS = (
    "rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "position_ids",
    "num_batches_tracked",
)
_FLOATS = ("bfloat16", "float16", "float32", "float64")


# --- building -------------------------------------------------------------------------------------


def model_class(config: PretrainedConfig) -> type[FlaxPreTrainedModel]:
    """The Flax class for a configuration.

    It is that of the first of its `architectures` that has one, else the causal LM.

    Raises:
      ValueError: transformers has no Flax class for this model.
      TypeError: it is no configuration of transformers.
    """
    import transformers

    _check_config(config)

    for name in config.architectures or ():
        found = getattr(transformers, name if name.startswith("Flax") else "Flax" + name, None)
        if found is not None:
            return found
    try:
        return transformers.FLAX_MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ValueError(
            f"transformers {transformers.__version__} has no Flax class for {config.model_type!r} "
            f"(architectures {config.architectures})"
        ) from None


def build(
    config: PretrainedConfig, params: Any, dtype: Any = jnp.float32, cls: type | None = None
) -> Any:
    """A Hugging Face Flax model of a configuration with these parameters.

    Nothing is initialised at random.

    Args:
      config: the configuration.
      params: nested dicts of arrays and `SlideWeight`s. A head tied to the embedding may be
        missing.
      dtype: dtype of the computation and of floating parameters. 8-bit packed values and scales
        stay as they are.
      cls: the class; None: `model_class`.

    Returns:
      The model, computing with the rotary base of the configuration.

    Raises:
      TypeError, ValueError: an argument is of a wrong kind.
      ValueError: parameters are missing, or have other shapes than the configuration says. The
        error names all of them.
      NotImplementedError: the configuration has a setting that the Flax class would ignore.
    """
    _check_config(config)
    check_kind(params, Mapping, "params", "nested dicts of arrays")
    dtype = _check_dtype(dtype)
    check_supported(config)
    flat = flatten_dict(params, sep="/")
    _check_layers(config, len(flat), "there are")
    model = (cls or model_class(config))(config, dtype=dtype, _do_init=False)
    shapes = flatten_dict(model.params_shape_tree, sep="/")
    if "lm_head/kernel" in shapes and "lm_head/kernel" not in flat and config.tie_word_embeddings:
        embedding = [k for k in flat if k.endswith("embed_tokens/embedding")]
        if len(embedding) == 1:
            flat["lm_head/kernel"] = flat[embedding[0]].T
    missing = sorted(shapes.keys() - flat.keys())
    if missing:
        raise ValueError(
            f"{len(missing)} parameters of {type(model).__name__} are missing: {_some(missing)}"
        )
    wrong = [
        f"{k}: {flat[k].shape} instead of {s.shape}"
        for k, s in shapes.items()
        if not _fits(flat[k], s.shape)
    ]
    if wrong:
        raise ValueError(f"parameters of {type(model).__name__} have wrong shapes: {_some(wrong)}")
    codes = [
        f"{k}: {flat[k].dtype}"
        for k in shapes
        if not isinstance(flat[k], SlideWeight) and flat[k].dtype.name not in _FLOATS
    ]
    if codes:
        raise ValueError(
            f"parameters of {type(model).__name__} are codes and no weights: {_some(codes)}"
        )
    extra = sorted(flat.keys() - shapes.keys())
    if extra:
        warnings.warn(
            f"{len(extra)} parameters are not used by {type(model).__name__}: {_some(extra)}",
            stacklevel=2,
        )
    params = unflatten_dict({k: flat[k] for k in shapes}, sep="/")
    hold(model, cast(params, dtype))
    return with_rope_theta(model)


def _fits(value: Any, shape: tuple[int, ...]) -> bool:
    # A packed weight is [in, out], whatever axes its layer keeps the kernel in. The layer checks
    # the rest when it runs.
    return (
        math.prod(value.shape) == math.prod(shape)
        if isinstance(value, SlideWeight)
        else value.shape == shape
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_config(config: Any) -> None:
    """Raises a TypeError if a configuration is none of transformers."""
    if not hasattr(config, "model_type"):
        raise TypeError(
            f"config must be a configuration of transformers, got {type(config).__name__}"
        )


def _check_dtype(dtype: Any) -> Any:
    """A dtype of a model's floats.

    Raises:
      ValueError: it is none of them.
    """
    found = numerics.dtype_of(dtype)
    if found is None or found.name not in _FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(_FLOATS)}, got {shown(dtype)}")
    return found


def cast(params: Any, dtype: Any) -> Any:
    """Casts floating arrays and 16- or 32-bit packed values; leaves 8-bit values and all scales.

    Raises:
      ValueError: for a dtype that is not bfloat16, float16 or float32.
    """
    dtype = _check_dtype(dtype)

    def leaf(x: Any) -> Any:
        if isinstance(x, SlideWeight):
            return (
                x
                if x.dtype.itemsize == 1
                else x.replace(values=x.values.astype(dtype), prepared={})
            )
        x = jnp.asarray(x)
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, SlideWeight))


# --- reading --------------------------------------------------------------------------------------


def read_pretrained(
    path: str | os.PathLike[str], dtype: Any = None
) -> tuple[FlaxPreTrainedModel, PreTrainedTokenizerFast | None, dict[str, Any]]:
    """Reads a directory with a Hugging Face Flax model, original or converted by slidejax.

    Args:
      path: the directory, with `config.json` and one of `slidejax.json`, `flax_model.msgpack`,
        `model.safetensors` or their indices of shards.
      dtype: dtype of the computation and of floating parameters. None means the one that slidejax
        saved, else float32.

    Returns:
      The model, its tokenizer (None if the directory holds none), and the notes of
      `write_pretrained` (empty for a directory that slidejax did not write).

    Raises:
      TypeError, ValueError: an argument is of a wrong kind.
      ValueError: a file is missing or damaged, parameters do not fit the configuration.
      NotImplementedError: the model needs what transformers' Flax classes lack.
    """
    folder, dtype = check_path(path), None if dtype is None else _check_dtype(dtype)
    with reading(folder):
        return _read(folder, dtype)


def _read(folder: Path, dtype: Any) -> tuple[Any, Any, dict[str, Any]]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} has no config.json: not a Hugging Face model directory")
    for name in TEXT_FILES:
        if os.path.lexists(folder / name):
            check_regular(folder / name)
    config = _read_config(folder)
    if (folder / store.METADATA).is_file():
        model, about = _read_converted(folder, config, dtype)
    else:
        check_supported(config)
        cls, about = model_class(config), {}
        model = build(config, _read_params(folder, config, cls), dtype or jnp.float32, cls)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        try:
            found = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as e:
            file = str(folder / "generation_config.json")
            raise ValueError(f"{file!r} cannot be read: {e}") from e
        model.generation_config = found
    return model, _read_tokenizer(folder), about


def _read_config(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # the classes check little and raise anything
        raise ValueError(f"{str(folder / 'config.json')!r} cannot be read: {e}") from e


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    if (folder / "tokenizer_config.json").is_file():
        try:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as e:  # a later version of transformers may have written anything
            if not file.is_file():
                raise ValueError(f"the tokenizer in {str(folder)!r} cannot be read: {e}") from e
    return _tokenizer_alone(file) if file.is_file() else None


def _tokenizer_alone(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of tokenizer.json, with only what every version calls by the same name."""
    from transformers import PreTrainedTokenizerFast

    options: dict[str, Any] = {}
    about = file.parent / "tokenizer_config.json"
    try:
        values = json.loads(about.read_bytes()) if about.is_file() else {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if values.get(name) is not None:
                token = values[name]
                options[name] = token["content"] if isinstance(token, dict) else str(token)
        if isinstance(values.get("chat_template"), str):
            options["chat_template"] = values["chat_template"]
        return PreTrainedTokenizerFast(
            tokenizer_file=str(file), clean_up_tokenization_spaces=False, **options
        )
    except Exception as e:  # the package is written in Rust and has no exceptions of its own
        raise ValueError(f"the tokenizer in {str(file)!r} cannot be read: {e}") from e


def _read_params(
    folder: Path, config: PretrainedConfig, cls: type[FlaxPreTrainedModel]
) -> dict[str, Any]:
    for name, read in (
        ("flax_model.msgpack", _read_msgpack),
        ("model.safetensors", _read_safetensors),
    ):
        if (folder / name).is_file():
            files = [folder / name]
        elif (folder / f"{name}.index.json").is_file():
            files = _shards(folder / f"{name}.index.json")
        else:
            continue
        return read(files, config, cls)
    found = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".h5"))
    hint = f"; {found[0]} is pickled or of another framework and is not read" if found else ""
    raise ValueError(f"{str(folder)!r} has no flax_model.msgpack and no model.safetensors{hint}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(read_whole(index))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{str(index)!r} is damaged: {e}") from e
    for name in names:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not (index.parent / name).is_file()
        ):
            raise ValueError(
                f"{str(index)!r} names the shard {name!r}, which is not in the directory"
            )
    return [index.parent / name for name in names]


def _check_layers(config: PretrainedConfig, count: int, where: str) -> None:
    """Raises a ValueError for far more layers than arrays, before they are traced."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > count:
        raise ValueError(f"config.json has num_hidden_layers {layers}, and {where} {count} arrays")


def _read_msgpack(
    files: list[Path], config: PretrainedConfig, cls: type[FlaxPreTrainedModel]
) -> dict[str, Any]:
    from flax.serialization import msgpack_restore

    flat: dict[str, Any] = {}
    for file in files:
        try:
            found = flatten_dict(msgpack_restore(file.read_bytes()), sep="/")
        except Exception as e:  # msgpack has its own zoo of exceptions
            raise ValueError(f"{str(file)!r} is damaged: {type(e).__name__}: {e}") from e
        _add(flat, found, file)
    _check_layers(config, len(flat), files[0].name)
    return _fit_prefix(flat, config, cls)


def _read_safetensors(
    files: list[Path], config: PretrainedConfig, cls: type[FlaxPreTrainedModel]
) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open
    from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

    state: dict[str, Any] = {}
    layout = "pt"
    for file in files:
        try:
            with safe_open(file, framework="flax") as f:
                layout = (f.metadata() or {}).get("format", layout)
                found = {k: f.get_tensor(k) for k in f.keys() if not k.endswith(_BUFFERS)}  # noqa: SIM118
        except SafetensorError as e:
            raise ValueError(f"{str(file)!r} is damaged: {e}") from e
        except (AttributeError, TypeError) as e:  # it has no name for float8
            raise ValueError(f"{str(file)!r} holds tensors of a dtype that is not read: {e}") from e
        _add(state, found, file)
    _check_layers(config, len(state), files[0].name)
    if layout == "flax":
        return _fit_prefix({k.replace(".", "/"): v for k, v in state.items()}, config, cls)
    if layout != "pt":
        raise ValueError(
            f"{str(files[0])!r} is in the layout of {layout!r}; PyTorch's and Flax's can be read"
        )
    model = cls(config, _do_init=False)
    hold(model, model.params_shape_tree)  # the converter looks at names and shapes only
    return convert_pytorch_state_dict_to_flax(state, model)


def _add(arrays: dict[str, Any], found: dict[str, Any], file: Path) -> None:
    """Adds the arrays of a shard to those of the shards before it.

    Raises:
      ValueError: if one of them is there already: of two values only one would count.
    """
    if twice := sorted(map(str, arrays.keys() & found.keys())):
        raise ValueError(f"{str(file)!r} holds {twice[0]!r}, and another shard does, too")
    arrays.update(found)


def _fit_prefix(
    flat: dict[str, Any], config: PretrainedConfig, cls: type[FlaxPreTrainedModel]
) -> dict[str, Any]:
    """Adds or removes the prefix under which a class with a head keeps a bare model's weights."""
    prefix = cls.base_model_prefix
    expected = cls(config, _do_init=False).params_shape_tree
    has = any(k.startswith(prefix + "/") for k in flat)
    if prefix in expected and not has:
        flat = {f"{prefix}/{k}": v for k, v in flat.items()}
    elif prefix not in expected and has:
        flat = {
            k.removeprefix(prefix + "/"): v for k, v in flat.items() if k.startswith(prefix + "/")
        }
    return unflatten_dict(flat, sep="/")


def _read_converted(
    folder: Path, config: PretrainedConfig, dtype: Any
) -> tuple[Any, dict[str, Any]]:
    import transformers

    content = store.load(folder)
    try:
        name, saved = content["model"]["class"], content["model"]["dtype"]
        params, about = content["params"], content["about"]
    except (KeyError, TypeError) as e:
        raise ValueError(
            f"{str(folder)!r} holds parameters but no model: key {e} is missing"
        ) from e
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.FlaxPreTrainedModel)):
        file = str(folder / store.METADATA)
        raise ValueError(f"{file!r}: model class {name!r} is not a Flax class of transformers")
    model = build(config, params, dtype or saved, cls)
    return with_params(model, model.params), about

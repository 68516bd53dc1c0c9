"""8-bit checkpoints as compressed-tensors writes them (`quantization_config` in config.json).

Symmetric int8 and float8_e4m3fn codes with a scale for each output are what the pattern "dense"
holds. Where the file also asks for activations that are quantised for each token, the codes and
scales are taken as they are. Where it quantises weights alone, they are multiplied out, because
`slidejax.linear` quantises the rows of x with 8-bit weights. Everything else is refused by its
name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.weights.packed import SlideWeight, pack

__all__ = ["Quantization", "Scheme"]

_DTYPES = {"int": "int8", "float": "float8_e4m3fn"}
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
_STATUS = ("compressed", "frozen")
_EMPTY: tuple[Any, ...] = (None, {}, [])


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How some layers are quantised.

    Attributes:
      targets: names of modules, "re:" with an expression for names, or "Linear".
      dtype: "int8" or "float8_e4m3fn".
      activations: whether the rows of x are quantised, too.
    """

    targets: tuple[str, ...]
    dtype: str
    activations: bool


class Quantization:
    """What `quantization_config` says.

    Args:
      values: its content, or None if the model is not quantised.
      source: what to call the file in errors.

    Raises:
      NotImplementedError: naming the method or the key, if it is another quantisation.
      ValueError: if it is malformed.

    >>> Quantization({"quant_method": "gptq", "bits": 4}, "config.json")
    Traceback (most recent call last):
      ...
    NotImplementedError: config.json: quantization_config: quant_method 'gptq' cannot be read; ...
    """

    def __init__(self, values: Mapping[str, Any] | None, source: str):
        self._source = f"{source}: quantization_config"
        self.schemes: tuple[Scheme, ...] = ()
        self._ignored: tuple[str, ...] = ()
        if values is None:
            return
        if not isinstance(values, Mapping):
            raise ValueError(f"{self._source} must be an object, got {type(values).__name__}")
        method = values.get("quant_method")
        if method != "compressed-tensors":
            self._refuse(
                f"quant_method {method!r} cannot be read; only compressed-tensors' symmetric 8-bit "
                "weights with a scale for each output can"
            )
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            found = values.get(key)
            if found not in _EMPTY and not (
                isinstance(found, Mapping) and found.get("format") == "dense"
            ):
                self._refuse(f"{key} is not supported")
        self._check_format(values.get("format"))
        status = values.get("quantization_status", "compressed")
        if status not in _STATUS:
            self._refuse(f"quantization_status {status!r} is not one of {', '.join(_STATUS)}")
        groups = values.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ValueError(f"{self._source}: config_groups must be an object with a group")
        self.schemes = tuple(self._scheme(name, group) for name, group in groups.items())
        self._ignored = self._names(values.get("ignore") or [], "ignore")

    def _refuse(self, message: str) -> NoReturn:
        raise NotImplementedError(f"{self._source}: {message}")

    def _names(self, names: Any, key: str) -> tuple[str, ...]:
        """Names of modules, or expressions for them, from a list in the file."""
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self._source}: {key} must be a list of names, got {names!r}")
        for name in names:
            try:
                re.compile(name.removeprefix("re:"))
            except re.error as e:
                raise ValueError(f"{self._source}: {key}: {name!r}: {e}") from e
        return tuple(names)

    def _check_format(self, name: Any) -> None:
        if name is not None and name not in _FORMATS:
            self._refuse(f"format {name!r} is not one of {', '.join(_FORMATS)}")

    def _scheme(self, name: str, group: Any) -> Scheme:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or not group.get("targets"):
            raise ValueError(f"{self._source}: {name} must say weights and targets")
        self._check_format(group.get("format"))
        for key, allowed in (
            ("num_bits", (8,)),
            ("type", tuple(_DTYPES)),
            ("strategy", ("channel", "tensor")),
            ("symmetric", (True,)),
            ("dynamic", (False, None)),
        ):
            if weights.get(key) not in allowed:
                self._refuse(f"{name}: weights have {key} {weights.get(key)!r}, not {allowed[0]!r}")
        if group.get("output_activations") not in _EMPTY:
            self._refuse(f"{name}: output_activations are not supported")
        activations = group.get("input_activations")
        if activations is not None:
            for key, wanted in (
                ("num_bits", 8),
                ("type", weights["type"]),
                ("strategy", "token"),
                ("symmetric", True),
                ("dynamic", True),
            ):
                found = activations.get(key) if isinstance(activations, Mapping) else None
                if found != wanted:
                    self._refuse(f"{name}: input_activations have {key} {found!r}, not {wanted!r}")
        targets = self._names(group["targets"], f"{name}: targets")
        return Scheme(targets, _DTYPES[weights["type"]], activations is not None)

    def scheme_of(self, module: str) -> Scheme | None:
        """How a linear layer is quantised, or None. `module` is a name such as `lm_head`."""
        if any(_matches(module, name) for name in self._ignored):
            return None
        named = [s for s in self.schemes if any(_matches(module, t) for t in s.targets)]
        by_class = [s for s in self.schemes if "Linear" in s.targets]
        return next(iter(named + by_class), None)

    def kernel(
        self, name: str, codes: np.ndarray, scale: np.ndarray, scheme: Scheme, dtype: Any
    ) -> SlideWeight | jax.Array:
        """The kernel of a layer.

        Args:
          name: the name of the codes, for errors.
          codes: `[out, in]`.
          scale: `[out, 1]`, `[out]`, `[1]` or `[]`.
          scheme: how the layer is quantised.
          dtype: of the kernel, if activations are not quantised.

        Returns:
          A `SlideWeight` `[in, out]` with these codes, or the kernel `[in, out]`.

        Raises:
          ValueError: if codes or scales are not what the scheme says.
        """
        if codes.dtype != jnp.dtype(scheme.dtype) or codes.ndim != 2:
            raise ValueError(
                f"{name} is {codes.dtype.name}{list(codes.shape)}; {self._source} says "
                f"{scheme.dtype} codes [out, in]"
            )
        scale = np.asarray(scale, np.float32)
        if scale.shape not in ((len(codes), 1), (len(codes),), (1, 1), (1,), ()):
            raise ValueError(
                f"the scale of {name} has shape {scale.shape}, expected ({len(codes)}, 1)"
            )
        scale = np.broadcast_to(scale.reshape(-1), len(codes))
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"the scale of {name} must be positive and finite")
        if not np.isfinite(codes.astype(np.float32)).all():
            raise ValueError(f"{name} has codes that are not finite")
        if not scheme.activations:
            wide = codes.astype(np.float32) * scale[:, None]
            return jnp.asarray(np.ascontiguousarray(wide.astype(jnp.dtype(dtype)).T))
        w = pack(jnp.asarray(codes).T, "dense", dtype=scheme.dtype)
        return w.replace(scale=jnp.asarray(scale))


def _matches(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return module == target

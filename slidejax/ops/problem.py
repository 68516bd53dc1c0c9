"""What the choice of an implementation depends on."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import Pattern

__all__ = ["Problem", "device_kind"]

# A program lowered for CUDA on a machine without a GPU is taken to run on this device.
_AHEAD_OF_TIME_DEVICE = "NVIDIA H100 80GB HBM3"


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the choice of an implementation depends on.

    Attributes:
      op: "linear" or "sparse_matmul".
      platform: "cuda" or "default".
      device: the device's kind, such as "NVIDIA H100 80GB HBM3"; "cpu" where it is not CUDA.
      rows, in_features, out_features: the sizes M, K and N.
      pattern: of the weight.
      x_dtype, dtype, out_dtype: of the input, of the weight's values, and of the result (None: raw accumulators).
      prepared: names of the prepared forms that the weight carries.
      requested: the implementation that the caller named, or None.
    """

    op: str
    platform: str
    device: str
    rows: int
    in_features: int
    out_features: int
    pattern: Pattern
    x_dtype: np.dtype
    dtype: np.dtype
    out_dtype: np.dtype | None
    prepared: tuple[str, ...] = ()
    requested: str | None = None

    @classmethod
    def of(cls, op: str, x, w: SlideWeight, settings, platform: str) -> Problem:
        return cls(
            op, platform, device_kind(platform), x.shape[0], w.in_features, w.out_features, w.pattern, np.dtype(x.dtype), w.dtype,
            settings.out_dtype, settings.prepared, settings.implementation,
        )  # fmt: skip


@functools.cache
def device_kind(platform: str) -> str:
    """The kind of the devices that a program lowered for `platform` will run on."""
    if platform != "cuda":
        return "cpu"
    if jax.default_backend() in ("gpu", "cuda"):
        return jax.devices()[0].device_kind
    return _AHEAD_OF_TIME_DEVICE

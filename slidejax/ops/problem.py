"""A problem: the facts that the choice of an implementation depends on."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import Pattern

__all__ = ["Problem", "device_kind"]

# The device that a program is lowered for on a machine without a GPU.
_AHEAD_OF_TIME_DEVICE = "NVIDIA H100 80GB HBM3"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product to be computed, as the choice of an implementation sees it.

    Attributes:
      op: "linear" or "sparse_matmul".
      platform: "cuda" or "default".
      device: the kind of the device, such as "NVIDIA H100 80GB HBM3"; "cpu" without CUDA.
      rows, in_features, out_features: the sizes M, K and N.
      pattern: the weight's `Pattern`.
      x_dtype: dtype of the input.
      dtype: dtype of the weight's values.
      out_dtype: dtype of the result; None for raw accumulators.
      prepared: names of the prepared forms that the weight carries.
      requested: the implementation that the caller named, or None.
      has_residual: whether a residual is added to the result.
      layer: the names of the layer's modules, as `jax.named_scope` gives them; "" if there are none
        or the problem does not come from `slidejax.explain`.
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
    has_residual: bool = False
    layer: str = dataclasses.field(default="", compare=False)

    def __str__(self) -> str:
        result = "accumulators" if self.out_dtype is None else self.out_dtype.name
        forms = f", prepared {' '.join(self.prepared)}" if self.prepared else ""
        return (
            f"{self.layer or self.op}: [{self.rows}, {self.in_features}] {self.x_dtype.name} x "
            f"{self.pattern} {self.dtype.name} -> [{self.rows}, {self.out_features}] {result}{forms}"
        )

    @classmethod
    def of(cls, op: str, x, w: SlideWeight, settings, platform: str) -> Problem:
        """The problem of an op that is lowered for a platform.

        Args:
          op: "linear" or "sparse_matmul".
          x: its input, with rows.
          w: its weight.
          settings: its `LinearParams`.
          platform: "cuda" or "default".
        """
        return cls(
            op,
            platform,
            device_kind(platform),
            x.shape[0],
            w.in_features,
            w.out_features,
            w.pattern,
            np.dtype(x.dtype),
            w.dtype,
            settings.out_dtype,
            settings.prepared,
            settings.implementation,
            settings.has_residual,
        )


@functools.cache
def device_kind(platform: str) -> str:
    """The kind of the devices that a program lowered for `platform` will run on."""
    if platform != "cuda":
        return "cpu"
    if jax.default_backend() in ("gpu", "cuda"):
        return jax.devices()[0].device_kind
    return _AHEAD_OF_TIME_DEVICE

"""Published rates of GPUs, for estimates where nothing was measured."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import jax
import numpy as np

__all__ = ["Rates", "rates_of"]


class Rates(NamedTuple):
    """The highest rates of a GPU.

    Attributes:
      memory: gigabytes a second.
      bfloat16, int8, float8: dense tensor-core rates with 32-bit accumulators, in 10^12 operations
        a second; a multiplication and its addition are two. 2:4 sparse rates are twice as high.
        `float8` is 0 where the GPU has no such instruction.
    """

    memory: float
    bfloat16: float
    int8: float
    float8: float

    def operations(self, dtype: np.dtype) -> float:
        """Dense operations a second for a dtype of operands; 0 if there are none."""
        by_name = {"int8": self.int8, "float8_e4m3fn": self.float8}
        return by_name.get(np.dtype(dtype).name, self.bfloat16) * 1e12

    def bytes(self) -> float:
        """Bytes a second that the memory moves."""
        return self.memory * 1e9


# From NVIDIA's data sheets and, for GeForce cards, the appendices of its whitepapers on the GA102,
# Ada and RTX Blackwell architectures, as far as they give dense rates; otherwise half of the sparse
# rates. The first name that a device's name contains as whole words counts.
_PUBLISHED = {
    "A100-SXM4-80GB": Rates(2039, 312, 624, 0),
    "A100 80GB PCIe": Rates(1935, 312, 624, 0),
    "A100": Rates(1555, 312, 624, 0),
    "A800": Rates(2039, 312, 624, 0),
    "A40": Rates(696, 149.7, 299.3, 0),
    "A30": Rates(933, 165, 330, 0),
    "A10": Rates(600, 125, 250, 0),
    "RTX A6000": Rates(768, 154.8, 309.7, 0),
    "GeForce RTX 3090": Rates(936, 71, 284, 0),
    "L40S": Rates(864, 362, 733, 733),
    "L40": Rates(864, 181, 362, 362),
    "L4": Rates(300, 121, 242, 242),
    "RTX 6000 Ada": Rates(960, 364.2, 728.5, 728.5),
    "GeForce RTX 4090": Rates(1008, 165.2, 660.6, 330.3),
    "GeForce RTX 4080": Rates(716.8, 97.5, 389.9, 194.9),
    "H100 PCIe": Rates(2039, 756, 1513, 1513),
    "H100": Rates(3352, 989, 1979, 1979),
    "H800": Rates(3352, 989, 1979, 1979),
    "GH200": Rates(4000, 989, 1979, 1979),
    "H200": Rates(4800, 989, 1979, 1979),
    "H20": Rates(4000, 148, 296, 296),
    "GB200": Rates(8000, 2500, 5000, 5000),
    "B200": Rates(8000, 2250, 4500, 4500),
    "GeForce RTX 5090": Rates(1792, 209.5, 838, 419),
    "GeForce RTX 5080": Rates(960, 112.6, 450.2, 225.1),
}

# Of one multiprocessor: gigabytes a second, and dense operations in a clock for bfloat16, int8 and
# float8, by compute capability. They are those of the cards above with the least of each.
_OF_MULTIPROCESSOR = {
    (8, 0): Rates(14, 2048, 4096, 0),
    (8, 6): Rates(8, 512, 2048, 0),
    (8, 9): Rates(5, 512, 2048, 1024),
    (9, 0): Rates(25, 4096, 8192, 8192),
    (10, 0): Rates(50, 8192, 16384, 16384),
    (12, 0): Rates(10, 512, 2048, 1024),
}
_CLOCK = 1.5e9  # a cautious one


def rates_of(device: str) -> Rates | None:
    """The rates of a kind of device.

    They are published ones where the name is known. For the GPU of this process they are otherwise
    made from its compute capability and its number of multiprocessors.

    Args:
      device: the kind of the device, as JAX calls it.

    Returns:
      The rates; None for an unknown device.

    >>> rates_of("NVIDIA A100-SXM4-80GB").memory, rates_of("NVIDIA L40S").int8, rates_of("cpu")
    (2039, 733, None)
    """
    # A laptop's card has the name of another processor.
    if "Laptop" not in device:
        for name, rates in _PUBLISHED.items():
            if re.search(rf"(?<![\w-]){re.escape(name)}(?!\w)", device):
                return rates
    gpu = jax.devices()[0]
    if gpu.platform in ("gpu", "cuda") and gpu.device_kind == device:
        return _of_capability(gpu.compute_capability, gpu.core_count)
    return None


@functools.cache
def _of_capability(capability: str, multiprocessors: int) -> Rates | None:
    """Rates by compute capability, such as "8.6": those of the nearest earlier one.

    >>> _of_capability("8.6", 82).int8, _of_capability("12.1", 48).memory, _of_capability("7.5", 40)
    (251.904, 480, None)
    """
    running = tuple(int(part) for part in capability.split("."))
    found = max((known for known in _OF_MULTIPROCESSOR if known <= running), default=None)
    if found is None:
        return None
    memory, *operations = _OF_MULTIPROCESSOR[found]
    per_second = (round(n * multiprocessors * _CLOCK / 1e12, 3) for n in operations)
    return Rates(memory * multiprocessors, *per_second)

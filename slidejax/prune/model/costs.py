"""What a layer with a pattern costs when the model runs: in multiplications, in bytes, or in measured time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slidejax.ops.choice import time_of
from slidejax.ops.problem import device_kind
from slidejax.rules import Rule
from slidejax.weights.pattern import Pattern

__all__ = ["Cost", "measured_times", "multiplications", "packed_bytes"]

Cost = Callable[[tuple[int, int], Pattern], float]


def multiplications(shape: tuple[int, int], pattern: Pattern) -> float:
    """What is computed for each token, in multiplications of a dense tensor core: a sparse one does half of the lifted product; with
    the pattern "dense" it is the whole of the plain one.

    >>> [multiplications((8, 8), Pattern.parse(p)) / 64 for p in ("2:4", "6:8", "14:16", "dense")]
    [0.5, 0.75, 0.875, 1.0]
    """
    return shape[0] * shape[1] * pattern.expansion / (2 if pattern.prunes else 1)


def packed_bytes(shape: tuple[int, int], pattern: Pattern) -> float:
    """Bytes of 8-bit values and of the places of the zeros, a byte for each group that has some.

    >>> [packed_bytes((8, 8), Pattern.parse(p)) / 64 for p in ("2:4", "6:8", "dense")]
    [0.75, 0.875, 1.0]
    """
    return shape[0] * shape[1] * (pattern.kept + pattern.prunes) / pattern.group


def measured_times(rows: int, qdtype: Any = "int8", device: str | None = None) -> Cost:
    """A cost in time: microseconds of `slidejax.linear` by the measured table (`slidejax tune`), with the implementation that is
    the fastest for a pattern, so that a pattern that does not pay costs what dense 8-bit products do.

    Args:
      rows: of x, for which the model is to be fast.
      qdtype: int8 or float8_e4m3fn.
      device: its kind, such as "NVIDIA H200"; None: of this process.

    Returns:
      For `mixed` and `choose`. It raises a ValueError for a shape or a pattern near which nothing was measured.

    >>> time = measured_times(4096, device="NVIDIA H200")
    >>> time((3584, 18944), Pattern.parse("2:4")) < time((3584, 18944), Pattern.parse("6:8")) <= time((3584, 18944), Pattern.parse("dense"))
    True
    """
    dtype = Rule("6:8", qdtype).qdtype
    kind = device_kind("cuda") if device is None else device

    def cost(shape: tuple[int, int], pattern: Pattern) -> float:
        time = time_of(kind, rows, shape, pattern, dtype)
        if time is None:
            raise ValueError(
                f"nothing was measured near {rows} rows of a kernel {shape} with {pattern} {dtype.name} on {kind}: run slidejax tune"
            )
        return time

    return cost

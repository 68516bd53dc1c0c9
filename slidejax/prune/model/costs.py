"""The cost of a layer with a pattern: in multiplications, in bytes, or in time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from slidejax.bounds import COUNT
from slidejax.kinds import check_list
from slidejax.ops.choice import estimated_time, time_of
from slidejax.ops.problem import device_kind
from slidejax.ops.tuning import device_name
from slidejax.weights import numerics
from slidejax.weights.pattern import Pattern

__all__ = [
    "Cost",
    "Times",
    "measured_times",
    "multiplications",
    "packed_bytes",
    "parse_patterns",
]

Cost = Callable[[tuple[int, int], Pattern], float]


def parse_patterns(patterns: Sequence[str | Pattern]) -> list[Pattern]:
    """The patterns of an argument `patterns`.

    Raises:
      TypeError, ValueError: naming it, if they are no list, or none, or one of them is no pattern.
    """
    return [Pattern.parse(one) for one in check_list(patterns, "patterns", "patterns")]


def multiplications(shape: tuple[int, int], pattern: Pattern) -> float:
    """The work for each token, in multiplications of a dense tensor core.

    A sparse tensor core does half of the lifted product's multiplications. With the pattern "dense"
    the plain product is computed, and all of its multiplications count.

    Args:
      shape: `(in, out)` of the kernel.
      pattern: the pattern.

    >>> [multiplications((8, 8), Pattern.parse(p)) / 64 for p in ("2:4", "6:8", "14:16", "dense")]
    [0.5, 0.75, 0.875, 1.0]
    """
    return shape[0] * shape[1] * pattern.expansion / (2 if pattern.prunes else 1)


def packed_bytes(shape: tuple[int, int], pattern: Pattern) -> float:
    """Bytes of a packed weight: 8-bit values, and one byte for each group that has zeros.

    Args:
      shape: `(in, out)` of the kernel.
      pattern: the pattern.

    >>> [packed_bytes((8, 8), Pattern.parse(p)) / 64 for p in ("2:4", "6:8", "dense")]
    [0.75, 0.875, 1.0]
    """
    return shape[0] * shape[1] * (pattern.kept + pattern.prunes) / pattern.group


def measured_times(rows: int, qdtype: Any = "int8", device: str | None = None) -> Cost:
    """A cost in time: microseconds of `slidejax.linear`, from the measured table (`slidejax tune`).

    It counts the fastest implementation for each pattern. So a pattern that brings no speed costs
    as much as dense 8-bit products.

    Args:
      rows: the number of rows of x for which the model is to be fast.
      qdtype: dtype of the packed values: int8 or float8_e4m3fn.
      device: the kind of device, such as "NVIDIA H200"; None: the device of this process.

    Returns:
      A cost for `slidejax.prune.mixed`. It raises a ValueError for a shape or a pattern near which
      nothing was measured.

    >>> time = measured_times(4096, device="NVIDIA H200")
    >>> half, most, all_ = (time((3584, 18944), Pattern.parse(p)) for p in ("2:4", "6:8", "dense"))
    >>> half < most <= all_
    True
    """
    rows, dtype = COUNT.check(rows, "rows"), numerics.check_dtype(qdtype, "qdtype")
    kind = device_kind("cuda") if device is None else device_name(device)

    def cost(shape: tuple[int, int], pattern: Pattern) -> float:
        time = time_of(kind, rows, shape, pattern, dtype)
        if time is None:
            raise ValueError(
                f"nothing was measured near {rows} rows of a kernel {shape} with {pattern} "
                f"{dtype.name} on {kind}: run slidejax tune"
            )
        return time

    return cost


class Times:
    """A cost in time for every shape: microseconds of `slidejax.linear`, measured where they are.

    The times of one shape all come from one source, because different sources do not compare:

    1. measurements near the shape (`slidejax tune`), as in `measured_times`;
    2. measurements of other shapes with about as many rows, in proportion to the multiplications;
    3. estimates from the device's published rates.

    Estimates know no limit of power. On an H100 sparse products with many rows gain less than they
    say, so measure where it matters.

    Args:
      rows: the number of rows of x for which the model is to be fast.
      patterns: the patterns that will be asked for.
      qdtype: dtype of the packed values: int8 or float8_e4m3fn.
      device: the kind of device, such as "NVIDIA H100"; None: the GPU of this process, or an H100
        where there is none.

    Attributes:
      device: as given, or found.
      sources: where the times came from that were asked for so far: "measured", "measured at other
        shapes" or "estimated".

    Raises:
      TypeError, ValueError: an argument is of a wrong kind or out of its range; or, when it is
        called, nothing is known of the device.

    >>> times = Times(4096, ["dense", "2:4"], device="NVIDIA H100")
    >>> half, all_ = (times((3584, 18944), Pattern.parse(p)) for p in ("2:4", "dense"))
    >>> half < all_, times.sources
    (True, {'measured'})
    """

    def __init__(
        self,
        rows: int,
        patterns: Sequence[str | Pattern],
        qdtype: Any = "int8",
        device: str | None = None,
    ):
        self._rows, self._dtype = COUNT.check(rows, "rows"), numerics.check_dtype(qdtype, "qdtype")
        self._patterns = tuple(dict.fromkeys(parse_patterns(patterns)))
        self.device = device_kind("cuda") if device is None else device_name(device)
        self.sources: set[str] = set()
        self._of = functools.cache(self._found)

    def __call__(self, shape: tuple[int, int], pattern: Pattern) -> float:
        source, times = self._of(shape)
        self.sources.add(source)
        return times[pattern]

    def _found(self, shape: tuple[int, int]) -> tuple[str, dict[Pattern, float]]:
        """The source of a shape's times, and the times by pattern."""
        near = functools.partial(time_of, self.device)
        far = functools.partial(near, any_shape=True)
        sources = (("measured", near), ("measured at other shapes", far))
        for name, time in (*sources, ("estimated", functools.partial(estimated_time, self.device))):
            times = {p: time(self._rows, shape, p, self._dtype) for p in self._patterns}
            known = {p: us for p, us in times.items() if us is not None}
            if len(known) == len(times):
                return name, known
        raise ValueError(
            f"no time is known of {self._dtype.name} products on {self.device!r}: run slidejax "
            "tune on it"
        )

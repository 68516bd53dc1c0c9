"""The products of a program after the partitioner, for `slidejax.explain`.

How a product is cut over several devices is only known when the program is compiled. Ops tell this
module about each cut, and about each problem that is lowered for a shard.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Hashable, Iterator

from slidejax.ops.problem import Problem

__all__ = ["explains", "lowers", "partitions", "product_key", "recording"]

Shards = dict[Hashable, list[list[Problem]]]

_recording = threading.Lock()  # one program at a time is compiled to be explained
_shards: Shards | None = None
_last: list[Problem] | None = None


def product_key(settings, x_shape: tuple[int, ...], values_shape: tuple[int, ...]) -> Hashable:
    """The parts that the call of an op and its partitioned form have in common."""
    return settings, math.prod(x_shape[:-1]), values_shape[0]


@contextlib.contextmanager
def recording() -> Iterator[Shards]:
    """Collects the problems of the shards of each product that is partitioned meanwhile.

    The compiler calls back from threads of its own, so this holds for the whole process.
    """
    global _shards, _last
    with _recording:
        _shards, _last = {}, None
        try:
            yield _shards
        finally:
            _shards = _last = None


def partitions(product: Hashable) -> None:
    """Says that a product is partitioned. The problems that are lowered next are of its shards."""
    global _last
    if _shards is not None:
        _last = []
        _shards.setdefault(product, []).append(_last)


def lowers(problem: Problem) -> bool:
    """Says that a problem is lowered. Returns whether the program is only to be explained."""
    if _last is not None:
        _last.append(problem)
    return explains()


def explains() -> bool:
    """Whether the program that is lowered is only to be explained."""
    return _shards is not None

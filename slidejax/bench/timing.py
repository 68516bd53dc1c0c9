"""Timing functions side by side on the device, without the cost of dispatching them.

A contender is a function of `(x, weights)`. One jitted program applies it to several distinct
inputs. The program also uses several copies of the weights, if one copy would stay in the cache
from one application to the next, which does not happen in a model. On a GPU the program is a loop,
as in a model that generates: buffers stay where they are, and XLA launches a recorded graph.
Barriers order the applications. Without them XLA could merge products that share an operand, or
move them out of the loop.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp

__all__ = [
    "FAILURES",
    "Clock",
    "Contender",
    "Timed",
    "build_all",
    "in_turns",
    "nbytes",
    "reason",
    "time_all",
]

_OUTSIDE_CACHE = 192 << 20  # bytes of weights that no cache holds
# The least bytes that a program reads on a GPU, so that it runs longer than its dispatch takes.
_BUSY = 1200 << 20
# The errors of a contender that cannot run here: it refuses, or the memory does not suffice.
FAILURES = (NotImplementedError, ValueError, jax.errors.JaxRuntimeError)


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
      name: its name in the table.
      apply: `(x, weights) -> any arrays`.
      weights: any pytree.
      settings: the options of XLA to compile it with, by name. It is timed with each of them, and
        its time is the shortest.
    """

    name: str
    apply: Callable[[jax.Array, Any], Any]
    weights: Any = None
    settings: tuple[Mapping[str, Any], ...] = ({},)


@dataclasses.dataclass(frozen=True)
class Clock:
    """How long to measure.

    Attributes:
      warmup: seconds before a measurement.
      seconds: seconds of a measurement.
      rounds: turns of each contender.
    """

    warmup: float = 0.3
    seconds: float = 0.4
    rounds: int = 1

    @classmethod
    def of_device(
        cls, warmup: float | None = None, seconds: float | None = None, rounds: int = 1
    ) -> Clock:
        """A clock for this device: 0.3 s and 0.4 s on a GPU, 0.02 s and 0.05 s on a CPU.

        Arguments that are given replace these.
        """
        usual = (0.3, 0.4) if jax.default_backend() == "gpu" else (0.02, 0.05)
        return cls(warmup or usual[0], seconds or usual[1], rounds)


class Timed(Protocol):
    """A compiled program to time. Each call takes the place of its results, and returns them."""

    @property
    def applications(self) -> int:
        """How many times a call does what is timed."""

    def room(self) -> Any:
        """The place for the results of the first call."""

    def __call__(self, room: Any) -> Any:
        """Runs; `room` is that of `room()`, or what the last call has returned."""


def reason(error: Exception) -> str:
    """The first line of an error.

    >>> reason(ValueError(chr(10).join(["no memory", "and more"])))
    'no memory'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nbytes(tree: Any) -> int:
    """The bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class _Program:
    """A compiled program that applies a contender `applications` times.

    Its results are the buffers of the next call's results. Clearing new buffers each time would
    cost a layer with many outputs a tenth of its time.
    """

    compiled: Callable[[Any, Any, Any], Any]
    operands: tuple[Any, Any]
    results: Any  # their shapes
    applications: int

    def room(self) -> Any:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.results)

    def __call__(self, room: Any) -> Any:
        return self.compiled(*self.operands, room)


def _program(
    contender: Contender,
    xs: Sequence[jax.Array],
    loops: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> _Program:
    """The program that applies a contender to every input, `loops` times.

    None loops until a program on a GPU reads enough bytes. `settings` are options of XLA.
    """
    size = nbytes(contender.weights)
    gpu = jax.default_backend() == "gpu"
    copies = min(16, -(-_OUTSIDE_CACHE // size)) if gpu and size else 1
    weights = [
        contender.weights,
        *(jax.tree.map(jnp.copy, contender.weights) for _ in range(copies - 1)),
    ]
    repeats = max(2, len(xs), copies)  # applications in the loop's body, one after the other
    if loops is None:
        loops = min(64, -(-_BUSY // (repeats * (size + xs[0].nbytes + 1)))) if gpu else 1

    @functools.partial(jax.jit, donate_argnums=2)
    def program(xs: Any, weights: Any, results: Any) -> Any:
        def body(_: Any, results: list[Any]) -> list[Any]:
            # Every result is kept. XLA drops one that nobody reads, even behind a barrier.
            for i in range(repeats):
                x, results[i - 1] = jax.lax.optimization_barrier((xs[i % len(xs)], results[i - 1]))
                results[i] = contender.apply(x, weights[i % len(weights)])
            return results

        return jax.lax.fori_loop(0, loops, body, results)

    results = [jax.eval_shape(contender.apply, xs[0], weights[0])] * repeats
    compiled = program.lower(xs, weights, results).compile(dict(settings or {}))
    return _Program(compiled, (xs, weights), results, repeats * loops)


def _run_for(program: Timed, seconds: float) -> float:
    """Runs a program for at least `seconds`; returns the seconds of one application."""
    result = jax.block_until_ready(program(program.room()))
    begin, calls, chunk = time.perf_counter(), 0, 1
    while True:
        for _ in range(chunk):
            result = program(result)
        jax.block_until_ready(result)
        calls += chunk
        passed = time.perf_counter() - begin
        if passed >= seconds:
            return passed / calls / program.applications
        # Wait for the device seldom, but do not queue much longer than `seconds`.
        chunk = max(1, min(200, int(calls * max(0.1, (seconds - passed) / max(passed, 1e-9)) / 2)))


def build_all(
    builders: Mapping[str, Callable[[], Timed]], at_once: int | None = None
) -> tuple[dict[str, Timed], dict[str, str]]:
    """Compiles programs, and runs each of them once.

    Args:
      builders: functions that compile a program, by name.
      at_once: how many are compiled at the same time; None: as many as there are CPU cores.

    Returns:
      The programs that run here, and the reasons of the others, by name.
    """
    programs: dict[str, Timed] = {}
    reasons: dict[str, str] = {}
    # Compiling takes most of the time, and XLA compiles in parallel.
    with ThreadPoolExecutor(at_once or os.cpu_count()) as pool:
        built = {name: pool.submit(build) for name, build in builders.items()}
    for name, future in built.items():
        try:
            program = future.result()
            jax.block_until_ready(program(program.room()))
            programs[name] = program
        except FAILURES as error:
            reasons[name] = reason(error)
    return programs, reasons


def in_turns(
    programs: Mapping[str, Timed], clock: Clock
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times programs round after round; in each round every program has its turn.

    Args:
      programs: by name.
      clock: how long to measure.

    Returns:
      Microseconds of one application in each round, by name; and the reasons of programs that
      failed, which have no times.
    """
    found: dict[str, list[float]] = {name: [] for name in programs}
    reasons: dict[str, str] = {}
    for _ in range(clock.rounds):
        for name in list(found):
            try:
                _run_for(programs[name], clock.warmup)
                found[name].append(1e6 * _run_for(programs[name], clock.seconds))
            except FAILURES as error:
                reasons[name] = reason(error)
                del found[name]
    return found, reasons


def time_all(
    contenders: Sequence[Contender],
    xs: Sequence[jax.Array],
    clock: Clock,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, float | None]:
    """Times contenders on the same inputs, in turns.

    Args:
      contenders: functions with distinct names.
      xs: distinct inputs of one shape.
      clock: how long to measure.
      note: called with a line for a contender that could not run.

    Returns:
      Microseconds of one application by name, the median over the rounds with the fastest of its
      settings. None for a contender that could not run.
    """
    each = {
        f"{c.name}{_named(settings)}": (c, settings) for c in contenders for settings in c.settings
    }
    programs, refused = build_all(
        {name: functools.partial(_program, c, xs, None, s) for name, (c, s) in each.items()}
    )
    found, failed = in_turns(programs, clock)
    for name, why in (refused | failed).items():
        note(f"{name} does not run: {why}")
    best: dict[str, float | None] = {c.name: None for c in contenders}
    for name, times in found.items():
        us, known = statistics.median(times), best[each[name][0].name]
        best[each[name][0].name] = us if known is None else min(us, known)
    return best


def _named(settings: Mapping[str, Any]) -> str:
    """Settings of XLA in words, behind a contender's name."""
    return "".join(f" {name}={value}" for name, value in settings.items())

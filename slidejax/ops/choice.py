"""The choice of an implementation: the one that the caller asks for, or the fastest by measurement.

The choice is made when an op is lowered for a platform. `slidejax.explain` shows it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bounds import COUNT
from slidejax.kinds import check_kind, check_list
from slidejax.ops import registry, shards
from slidejax.ops.implementations.base import CUDA_ONLY, Implementation
from slidejax.ops.primitive import on_cuda_alone
from slidejax.ops.problem import Problem, device_kind
from slidejax.ops.tuning import Variant, alike, distance, entries, log_ratio
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight, check_weight
from slidejax.weights.pattern import Pattern

__all__ = [
    "Choice",
    "choose",
    "estimate",
    "estimated_time",
    "forms",
    "implementation_for",
    "lookup",
    "on_right_platform",
    "time_of",
]

# An entry of the table speaks for a problem up to this distance. It is counted in factors of two,
# summed over rows, inputs and outputs.
_MAX_DISTANCE = 3.0
# The numbers of rows for which forms are estimated.
_ESTIMATED_ROWS = (1, 16, 256, 4096)
# A weight can do without a prepared form if it takes at most this many times its shortest time.
_CLOSE_ENOUGH = 1.2


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that runs a problem, and why.

    Attributes:
      implementation: its name.
      reason: why it was chosen.
      refused: the reasons of the implementations that refuse the problem, by name.
      note: what the implementation says about how it runs the problem; or None.
    """

    implementation: str
    reason: str
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    note: str | None = None

    def __str__(self) -> str:
        note = "" if self.note is None else f"; {self.note}"
        refused = "".join(f"; not {name}: {why}" for name, why in self.refused.items())
        return f"{self.implementation} ({self.reason}{note}{refused})"


def choose(problem: Problem) -> Choice:
    """Chooses the implementation for a problem.

    Raises:
      NotImplementedError: if the caller asks for an implementation that refuses, with its reason.
    """
    if problem.requested is not None:
        if not isinstance(problem.rows, int) and problem.requested not in (
            registry.FALLBACK.name,
            registry.REFERENCE.name,
        ):
            raise NotImplementedError(
                f"slidejax {problem.op}: implementation {problem.requested!r} needs a known number "
                f"of rows, got {problem.rows}: leave out implementation="
            )
        reason = registry.get(problem.requested).refusal(problem)
        if reason is not None:
            raise NotImplementedError(
                f"slidejax {problem.op}: implementation {problem.requested!r} refuses: {reason}"
            )
        return _noted(problem, Choice(problem.requested, "asked for"))
    return _noted(problem, _choose(problem))


def on_right_platform(x: jax.Array, op: str, name: str | None) -> jax.Array:
    """Returns x. An implementation that is asked for refuses a platform that it does not run on."""
    if name is None or not registry.get(name).cuda_only:
        return x
    return on_cuda_alone(x, f"slidejax {op}: implementation {name!r} refuses: {CUDA_ONLY}")


def _noted(problem: Problem, choice: Choice) -> Choice:
    """The choice, with what its implementation has to say about how it runs the problem."""
    note = registry.get(choice.implementation).note(problem)
    return choice if note is None else dataclasses.replace(choice, note=note)


def _choose(problem: Problem) -> Choice:
    """The choice where the caller asks for no implementation."""
    if not isinstance(problem.rows, int):
        return Choice(
            registry.FALLBACK.name,
            f"the number of rows, {problem.rows}, is not known when the program is lowered",
        )
    refused = registry.refusals(problem)
    candidates = [i.name for i in registry.competing() if i.name not in refused]
    fallback = registry.FALLBACK.name
    if candidates == [fallback] and problem.platform != "cuda":
        return Choice(fallback, "plain JAX", refused)
    measured = lookup(problem, candidates)
    if measured is not None:
        return Choice(*measured, refused)
    if not problem.pattern.prunes:
        return Choice(fallback, "nothing is pruned", refused)
    estimated = estimate(problem, candidates)
    if estimated is not None:
        best = _best_by_estimate(problem, estimated)
        return Choice(best, f"estimated for {problem.device}: {_figures(estimated)}", refused)
    # Nothing near this shape was measured. The fallback would unpack a weight that has no dense
    # codes in every call, which takes longer than any product that reads the packed form.
    form = registry.FALLBACK.form
    if form is not None and form.name not in problem.prepared:
        for name in candidates:
            if registry.get(name).reads_packed:
                return Choice(
                    name, "nothing is measured, and it reads the weight as it is", refused
                )
    # Otherwise the fallback is never slower than an unpruned layer.
    return Choice(
        fallback, "no measurement for this device, shape and dtype: run slidejax tune", refused
    )


def implementation_for(problem: Problem) -> Implementation:
    """The implementation that `choose` names.

    Empty operands go to the reference, so that no other implementation has to expect them.
    """
    if shards.lowers(problem):
        return registry.REFERENCE  # the program is only explained, perhaps for another platform
    chosen = registry.get(choose(problem).implementation)
    sizes = problem.rows, problem.in_features, problem.out_features
    empty = any(isinstance(size, int) and size == 0 for size in sizes)
    return registry.REFERENCE if empty else chosen


# --- by estimates ---------------------------------------------------------------------------------


def estimate(problem: Problem, candidates: Sequence[str]) -> dict[str, float] | None:
    """The estimated times of implementations that do not refuse a problem.

    Returns:
      Microseconds by name; None if there are not two or more, or one of them has no estimate.
    """
    seconds = {name: registry.get(name).estimate(problem) for name in candidates}
    us = {name: 1e6 * time for name, time in seconds.items() if time is not None}
    return us if len(us) == len(candidates) > 1 else None


def _best_by_estimate(problem: Problem, us: Mapping[str, float]) -> str:
    """The implementation that estimates speak for.

    The fallback does not unpack a weight in every call while another one reads it as it is.
    """
    form = registry.FALLBACK.form
    unpacks = form is not None and form.name not in problem.prepared
    if unpacks and any(registry.get(name).reads_packed for name in us):
        us = {name: time for name, time in us.items() if name != registry.FALLBACK.name}
    return min(us, key=us.__getitem__)


def _few_and_many_rows(w: SlideWeight) -> list[Problem]:
    """A layer of the weight on this device, x in bfloat16."""
    bfloat16, sizes = np.dtype(jnp.bfloat16), (w.in_features, w.out_features, w.pattern)
    return [
        Problem("linear", "cuda", device_kind("cuda"), rows, *sizes, bfloat16, w.dtype, bfloat16)
        for rows in _ESTIMATED_ROWS
    ]


def _candidates(problem: Problem) -> list[Implementation]:
    """The implementations that compete for a problem."""
    refused = registry.refusals(problem)
    return [i for i in registry.competing() if i.name not in refused]


def _estimated_entries(w: SlideWeight) -> list[dict[Variant, float]]:
    """Estimated times of a weight's shape for few and for many rows, as `_times` gives them."""
    found = []
    for plain in _few_and_many_rows(w):
        times: dict[Variant, float] = {}
        candidates = _candidates(plain)
        for form in {None, *(i.form.name for i in candidates if i.form is not None)}:
            problem = dataclasses.replace(plain, prepared=() if form is None else (form,))
            us = estimate(problem, [i.name for i in candidates])
            if us is None:
                return []
            times |= {
                Variant(i.name, form): us[i.name]
                for i in candidates
                if form in (None, i.form and i.form.name)
            }
        found.append(times)
    return found


# --- by the measured table ------------------------------------------------------------------------


def _times(entry: dict[str, Any]) -> dict[Variant, float]:
    """The times of an entry, for the implementations and forms that are registered."""
    known = {
        Variant(i.name, form)
        for i in registry.competing()
        for form in (None, None if i.form is None else i.form.name)
    }
    return {variant: us for variant, us in entry["us"].items() if variant in known}


def lookup(problem: Problem, candidates: Sequence[str]) -> tuple[str, str] | None:
    """The fastest of `candidates` by the nearest measurement of any of them.

    That measurement may lack some of them, because it is older than they are. The fastest is then
    compared with each of these by the nearest measurement of both.

    Returns:
      Its name and the reason in words; None if nothing near was measured.

    Raises:
      TypeError, ValueError: for arguments of other kinds, or an unknown name.
    """
    check_kind(problem, Problem, "problem", "a slidejax.ops.problem.Problem")
    variants = {}
    for name in check_list(candidates, "candidates", "implementations' names", empty=True):
        form = registry.get(name).form
        if form is not None and form.name not in problem.prepared:
            form = None
        variants[name] = Variant(name, None if form is None else form.name)

    def far(entry: dict[str, Any]) -> float:
        return distance(entry, problem.rows, problem.in_features, problem.out_features)

    def measured(entry: dict[str, Any]) -> dict[str, float]:
        return {name: entry["us"][v] for name, v in variants.items() if v in entry["us"]}

    def figures(entry: dict[str, Any], times: Mapping[str, float]) -> str:
        other = "" if entry["dtype"] == problem.dtype.name else f" {entry['dtype']}"
        where = f"M={entry['rows']} K={entry['in']} N={entry['out']}{other}"
        return f"measured at {where}: {_figures(times)}"

    near = [
        (entry, times)
        for entry in alike(problem.device, problem.pattern, problem.dtype)
        if far(entry) <= _MAX_DISTANCE and (times := measured(entry))
    ]
    near.sort(key=lambda found: far(found[0]))
    if not near:
        return None
    entry, times = near[0]
    best, reasons = min(times, key=times.__getitem__), [figures(entry, times)]
    for name in [name for name in variants if name not in times]:
        both = next((found for found in near if best in found[1] and name in found[1]), None)
        if both is not None and both[1][name] < both[1][best]:
            reasons.append(figures(both[0], {n: both[1][n] for n in (best, name)}))
            best = name
    return best, "; ".join(reasons)


def _figures(us: Mapping[str, float]) -> str:
    """Times in microseconds, the shortest first."""
    by_time = sorted(us.items(), key=lambda item: item[1])
    return ", ".join(f"{name} {time:.0f} us" for name, time in by_time)


def estimated_time(
    device: str, rows: int, shape: tuple[int, int], pattern: Pattern, dtype: np.dtype
) -> float | None:
    """The time of one `linear` with the implementation and form that estimates say are fastest.

    Arguments are those of `time_of`. Implementations count that this machine lacks.

    Returns:
      Microseconds; None if the device's rates are not known.
    """
    bfloat16 = np.dtype(jnp.bfloat16)
    found = []
    for one in registry.competing():
        prepared = () if one.form is None else (one.form.name,)
        problem = Problem(
            "linear", "cuda", device, rows, *shape, pattern, bfloat16, dtype, bfloat16, prepared
        )
        if one.refuses(problem) is None and (seconds := one.estimate(problem)) is not None:
            found.append(1e6 * seconds)
    return min(found, default=None)


def time_of(
    device: str,
    rows: int,
    shape: tuple[int, int],
    pattern: Pattern,
    dtype: np.dtype,
    *,
    any_shape: bool = False,
) -> float | None:
    """The time of one `linear` with the fastest implementation, from the nearest measurement.

    It is scaled by the number of multiplications. For the pattern "dense" it is the time of the
    fallback, measured with any pattern.

    Args:
      device: kind of the device.
      rows: rows of x.
      shape: `(in, out)` of the kernel.
      pattern: of the weight.
      dtype: of the weight's values.
      any_shape: where nothing near was measured, take the nearest shape that was measured with
        about as many rows, at most twice or half as many.

    Returns:
      Microseconds; None if nothing near was measured.

    Raises:
      TypeError, ValueError: naming it, if an argument is of a wrong kind or out of its range.
    """
    rows, pattern = COUNT.check(rows, "rows"), Pattern.parse(pattern)
    dtype = numerics.check_dtype(dtype)
    if len(check_list(shape, "shape", "two sizes, (in, out)")) != 2:
        raise ValueError(f"shape must be (in, out), got {shape!r:.60}")
    shape = (COUNT.check(shape[0], "shape[0]"), COUNT.check(shape[1], "shape[1]"))
    times: list[tuple[float, float]] = []  # (distance of the entry, scaled time)
    for e in entries(device):
        if e["dtype"] != dtype.name or (pattern.prunes and e["pattern"] != str(pattern)):
            continue
        us = [
            time
            for variant, time in _times(e).items()
            if pattern.prunes or variant.implementation == registry.FALLBACK.name
        ]
        far = distance(e, rows, *shape)
        near = far <= _MAX_DISTANCE or (any_shape and log_ratio(e["rows"], rows) <= 1)
        if us and near:
            times.append(
                (far, min(us) * rows * math.prod(shape) / (e["rows"] * e["in"] * e["out"]))
            )
    return min(times, key=lambda timed: timed[0])[1] if times else None


def forms(w: SlideWeight) -> tuple[str, ...]:
    """Names of the prepared forms that pay for a weight of this shape.

    These are as few forms as possible: every number of rows that was measured must take at most
    1.2 times as long as with all forms. Of several such sets the one that is faster on the whole is
    taken. If nothing near was measured, estimates stand for measurements. If there are none either,
    a weight needs no form where kernels read it as it lies for any number of rows. Elsewhere it is
    the form of the fallback, which then is chosen.
    """
    check_weight(w, held=False)
    gains = {i.form.name: i.form.must_gain for i in registry.competing() if i.form is not None}
    near = [
        times
        for e in alike(device_kind("cuda"), w.pattern, w.dtype)
        if log_ratio(e["in"], w.in_features) + log_ratio(e["out"], w.out_features) <= _MAX_DISTANCE
        and (times := _times(e))
    ]
    near = near or _estimated_entries(w)
    if not near:
        fallback = registry.FALLBACK.form
        as_it_lies = all(
            any(i.reads_packed for i in _candidates(problem)) for problem in _few_and_many_rows(w)
        )
        return () if fallback is None or as_it_lies else (fallback.name,)
    names = sorted({v.form for us in near for v in us if v.form is not None})

    def times_best(us: dict[Variant, float], held: tuple[str, ...]) -> float:
        possible = (t for v, t in us.items() if v.form is None or v.form in held)
        return min(possible, default=math.inf) / min(us.values())

    def cost(held: tuple[str, ...]) -> float:
        slower = sum(math.log(times_best(us, held)) for us in near) / len(near)
        return slower + sum(math.log(gains[name]) for name in held)

    for count in range(len(names)):
        enough = [
            held
            for held in itertools.combinations(names, count)
            if all(times_best(us, held) <= _CLOSE_ENOUGH for us in near)
        ]
        if enough:
            return min(enough, key=cost)
    return tuple(names)

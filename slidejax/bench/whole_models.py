"""`slidejax bench --model`: a whole decoder with random weights, by kind of its linear layers.

Alone, a linear layer pays for its own quantisation. In a model XLA fuses that with the norm or the
gate before it, so only a whole model says what a user gains. The rivals run in one program of
decoding steps and one of a prefill, in turns. The model is the decoder of `slidejax.lm`, and only
its linear layers differ (`slidejax.bench.decoder`).

Beside each time stand the bytes that must be read for it at least: the linear layers' weights
(those of slidejax in the packed form, without prepared forms), and for a decoding step also the
head and the whole KV cache. A copy on the same device says how fast bytes can move.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.bench import decoder, profile, report
from slidejax.bench.model_layers import (
    BF16,
    JAX_8_BIT,
    NO_LINEARS,
    OURS_DENSE,
    Kind,
    kinds,
    weights_of_kinds,
)
from slidejax.bench.model_table import BEST_JAX, CPU_NOTE, table
from slidejax.bench.run import copy_of
from slidejax.bench.shapes import MODELS, Sizes
from slidejax.bench.timing import FAILURES, Clock, Contender, build_all, in_turns, nbytes, time_all
from slidejax.lm.decoder.cache import Cache
from slidejax.lm.decoder.config import DecoderConfig
from slidejax.ops.explain import explain
from slidejax.variants.prepared import drop_prepared
from slidejax.weights import numerics
from slidejax.weights.pattern import Pattern

__all__ = ["BEST_JAX", "Workload", "measure", "table", "usual_clock"]

_REHEARSED = 2  # layers of the programs that are compiled ahead of those that are timed
_COPY_BYTES = (1 << 30, 1 << 24)  # what is copied on a GPU, and on a CPU


@dataclasses.dataclass(frozen=True)
class Workload:
    """A case that is timed.

    Attributes:
      batch: sequences.
      length: tokens of each sequence that a prefill reads; None for a decoding step.
    """

    batch: int
    length: int | None = None

    @property
    def rows(self) -> int:
        """Rows of x of each linear layer."""
        return self.batch * (self.length or 1)

    def __str__(self) -> str:
        return (
            f"decode {self.batch}" if self.length is None else f"prefill {self.batch}x{self.length}"
        )


def usual_clock(
    warmup: float | None = None, seconds: float | None = None, rounds: int | None = None
) -> Clock:
    """A clock for whole models on this device; arguments that are given replace its settings.

    On a GPU it has five rounds of 0.1 s and 0.2 s; a call of 32 steps takes about 0.1 s itself.
    """
    if jax.default_backend() == "gpu":
        return Clock(warmup or 0.1, seconds or 0.2, rounds or 5)
    return Clock.of_device(warmup, seconds, rounds or 3)


# --- programs -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """A compiled loop of decoding steps. Its caches are donated, and go from call to call."""

    compiled: Callable[[Any, Any], Any]
    params: Any
    empty: Callable[[], Cache]
    applications: int

    def room(self) -> Any:
        return None, self.empty()

    def __call__(self, room: Any) -> Any:
        return self.compiled(self.params, room[1])


@dataclasses.dataclass(frozen=True)
class _Prefill:
    """A compiled prefill."""

    compiled: Callable[[Any, Any], jax.Array]
    params: Any
    ids: jax.Array
    applications: int = 1

    def room(self) -> Any:
        return None

    def __call__(self, room: Any) -> Any:
        return self.compiled(self.params, self.ids)


@dataclasses.dataclass(frozen=True)
class _Race:
    """The parts that all programs of a race share."""

    sizes: Sizes
    layers: int
    context: int
    steps: int
    ends: tuple[jax.Array, jax.Array]

    @property
    def config(self) -> DecoderConfig:
        return decoder.config_of(self.sizes, self.layers)

    def prompt(self, work: Workload) -> jax.Array | None:
        """The tokens of a prefill, int32 `[batch, length]`; None for decoding."""
        if work.length is None:
            return None
        shape = (work.batch, work.length)
        return jax.random.randint(jax.random.key(1), shape, 0, self.sizes.vocabulary)

    def build(
        self, kind: Kind, weights: Any, work: Workload, ids: jax.Array | None
    ) -> _Decoding | _Prefill:
        """Compiles the program of a kind and a workload, whose `prompt` is ids."""
        params = decoder.parameters(self.sizes, kind.exchanged, weights, self.ends)
        if ids is not None:
            return _Prefill(jax.jit(self._prefill).lower(params, ids).compile(), params, ids)
        empty = self._empty(work)
        lowered = jax.jit(self._decode, donate_argnums=1).lower(params, jax.eval_shape(empty))
        return _Decoding(lowered.compile(), params, empty, self.steps)

    def implementations(self, kind: Kind, weights: Any, work: Workload) -> list[str]:
        """The implementations of slidejax that the program runs, each once."""
        params = decoder.parameters(self.sizes, kind.exchanged, weights, self.ends)
        ids = jax.eval_shape(functools.partial(self.prompt, work))
        if ids is not None:
            found = explain(self._prefill, params, ids)
        else:
            found = explain(self._decode, params, jax.eval_shape(self._empty(work)))
        return list(dict.fromkeys(choice.implementation for _, choice in found))

    @property
    def _prefill(self) -> Callable[..., Any]:
        return functools.partial(decoder.prefill, self.config)

    @property
    def _decode(self) -> Callable[..., Any]:
        return functools.partial(decoder.decode, self.config, self.steps)

    def _empty(self, work: Workload) -> Callable[[], Cache]:
        return functools.partial(decoder.caches, self.config, work.batch, self.context)

    def cache_bytes(self, batch: int) -> int:
        return 4 * self.layers * batch * self.context * self.sizes.kv_heads * self.sizes.head

    def read_bytes(self, weights: Any, work: Workload) -> int:
        """The bytes that must be read for one step, or one prefill, at least."""
        packed = nbytes(drop_prepared(weights))
        if work.length is not None:
            return packed
        return packed + self.ends[1].nbytes + self.cache_bytes(work.batch)

    def room_bytes(self, works: Sequence[Workload]) -> int:
        """About the memory that the largest workload needs beside the weights."""
        widest = 16 * self.sizes.linears["gate_up"][0]  # a few results of the widest layer, a row
        return max(
            widest * work.rows + (self.cache_bytes(work.batch) if work.length is None else 0)
            for work in works
        )


# --- measuring ------------------------------------------------------------------------------------


def _copy(clock: Clock, note: Callable[[str], None]) -> dict[str, Any]:
    """A copy of many bytes: how long it takes, and GB/s read and written."""
    size = _COPY_BYTES[0 if jax.default_backend() == "gpu" else 1]
    xs = [jnp.full(size // 2, i, jnp.bfloat16) for i in range(2)]
    us = time_all([Contender("copy", lambda x, _: copy_of(x))], xs, clock, note)["copy"]
    return {"bytes": size, "us": us, "gb_per_s": report.ratio(2e-3 * size, us)}


def _checked(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
    return value


def measure(
    model: str,
    *,
    layers: int | None = None,
    batches: Sequence[int] = (1, 16, 64),
    prefills: Sequence[tuple[int, int]] = ((8, 512),),
    patterns: Sequence[str] = ("6:8",),
    dtypes: Sequence[str] | None = None,
    context: int = 512,
    steps: int = 32,
    clock: Clock | None = None,
    profiled: bool = False,
    at_once: int = 1,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times decoding steps and prefills of a whole decoder with random weights.

    Args:
      model: whose sizes (`slidejax.bench.shapes.MODELS`).
      layers: blocks. None takes as many as the model has.
      batches: numbers of sequences to decode.
      prefills: (sequences, tokens of each) to read at once.
      patterns: of slidejax's weights; `dense` is always timed, too.
      dtypes: of their values. None takes int8; the dense weight is always timed in int8, too.
      context: positions of the static KV cache, all of which a step reads.
      steps: decoding steps in one call, at the cache's last positions; at most `context`.
      clock: how long to measure. None takes `usual_clock()`.
      profiled: whether to profile every program once it is timed, on a GPU.
      at_once: how many programs are compiled at the same time. XLA times its own products while it
        compiles, and compilations side by side disturb each other. So with more than one, every
        program is compiled with two layers first, one program after the other. XLA then knows the
        products of the long ones.
      note: called with a line of text for each step, and for each contender that could not run.

    Returns:
      A JSON object with what `report.machine` says, "model", "sizes", "layers", "context", "steps",

      - "copy": `bytes` of a copy, its `us`, and `gb_per_s` read and written;
      - "contenders": by name the bytes of the linear layers' weights as files hold them, `packed`,
        and `in_memory` with what was prepared;
      - "times": for each workload and contender `us` of a step or a prefill, the median over the
        rounds; `rounds`, all of them; `tokens_per_s`; `read_bytes` at least; `gb_per_s` and
        `share_of_copy` of these; `over`, how many times as fast as the bfloat16 layers, the best
        JAX 8 bit and our own dense int8; the `implementations` of slidejax that ran; and with
        `profiled` what `slidejax.bench.profile.summary` says, `profile`, or None without a GPU;
      - "not_run": contenders that did not run, with the workload (None: any) and the reason.

    Raises:
      ValueError: a bad name, number, pattern or dtype, before anything is measured.

    >>> found = measure("tiny", batches=[1], prefills=[], clock=Clock(0.001, 0.001), steps=2)
    >>> found["times"][0]["contender"], found["times"][0]["workload"]
    ('jax bf16', 'decode 1')
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    sizes = MODELS[model]
    layers = _checked("layers", sizes.layers if layers is None else layers)
    works = [Workload(_checked("batches", batch)) for batch in batches]
    works += [Workload(_checked("prefills", b), _checked("prefills", n)) for b, n in prefills]
    at_once = _checked("at_once", at_once)
    if not works:
        raise ValueError("there is nothing to time: give batches or prefills")
    if _checked("steps", steps) > _checked("context", context):
        raise ValueError(f"steps must be at most context, {context}, got {steps}")
    parsed = [Pattern.parse(p) for p in patterns]
    resolved = [numerics.check_dtype(d, "dtypes") for d in dtypes or ("int8",)]
    clock = clock or usual_clock()
    if jax.default_backend() != "gpu":
        note(CPU_NOTE)
    racing = kinds(parsed, resolved)
    copy = _copy(clock, note)
    note(f"copy: {report.microseconds(copy['gb_per_s'])} GB/s, read and written")
    race = _Race(sizes, layers, context, steps, _ends(sizes))
    weights, reasons = _with_room(
        race.room_bytes(works), lambda: weights_of_kinds(racing, sizes, layers, note)
    )
    not_run = [{"contender": c, "workload": None, "why": why} for c, why in reasons.items()]
    times: list[dict[str, Any]] = []
    for work in dict.fromkeys(works):
        rows, failed = _timed(race, racing, weights, work, clock, profiled, at_once, note)
        _compare(rows, copy["gb_per_s"])
        times += rows
        not_run += failed
    for failure in not_run:
        note("{contender} did not run: {why}".format(**failure))
    return {
        **report.machine(clock),
        "model": model,
        "sizes": dataclasses.asdict(sizes),
        "layers": layers,
        "context": context,
        "steps": steps,
        "copy": copy,
        "contenders": {
            name: {"packed": nbytes(drop_prepared(w)), "in_memory": nbytes(w)}
            for name, w in weights.items()
        },
        "times": times,
        "not_run": not_run,
    }


def _ends(sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """The embedding `[vocabulary, hidden]` and the head `[hidden, vocabulary]`."""
    shapes = (sizes.vocabulary, sizes.hidden), (sizes.hidden, sizes.vocabulary)
    embedding, head = (
        jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        for seed, shape in zip((9, 8), shapes, strict=True)
    )
    return embedding, head


def _with_room(size: int, make: Callable[[], Any]) -> Any:
    """Makes weights while as many bytes of the GPU's memory are taken, which are free afterwards.

    Otherwise the weights could fill a small memory, and nothing would run.
    """
    room = None
    if jax.default_backend() == "gpu":
        try:
            room = jax.block_until_ready(jnp.zeros(size, jnp.uint8))
        except FAILURES:
            room = None  # then each workload says what does not run
    made = make()
    del room
    return made


def _compiled(
    race: _Race,
    present: Sequence[Kind],
    weights: dict[str, Any],
    work: Workload,
    at_once: int,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The programs of one workload, and the reasons of those that do not run."""
    ids = race.prompt(work)

    def build(race: _Race, at_once: int) -> tuple[dict[str, Any], dict[str, str]]:
        builders = {
            kind.name: functools.partial(
                race.build, kind, weights[kind.name][: race.layers], work, ids
            )
            for kind in present
        }
        return build_all(builders, at_once)

    if at_once > 1 and race.layers > _REHEARSED:
        build(dataclasses.replace(race, layers=_REHEARSED), 1)
    return build(race, at_once)


def _timed(
    race: _Race,
    racing: Sequence[Kind],
    weights: dict[str, Any],
    work: Workload,
    clock: Clock,
    profiled: bool,
    at_once: int,
    note: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of one workload, and the contenders that did not run."""
    note(f"{work}: compiling, then {clock.rounds} round(s)")
    present = [kind for kind in racing if kind.name in weights]
    programs, refused = _compiled(race, present, weights, work, at_once)
    found, failed = in_turns(programs, clock)
    rows = []
    shallow = dataclasses.replace(race, layers=min(race.layers, _REHEARSED))
    for kind in present:
        if kind.name not in found:
            continue
        us = statistics.median(found[kind.name])
        note(f"{work} {kind.name}: {report.microseconds(us)} us")
        read = race.read_bytes(weights[kind.name], work)
        rows.append(
            {
                "workload": str(work),
                "contender": kind.name,
                "us": us,
                "rounds": found[kind.name],
                "tokens_per_s": 1e6 * work.rows / us,
                "read_bytes": read,
                "gb_per_s": read / us / 1e3,
                "implementations": (
                    shallow.implementations(kind, weights[kind.name][: shallow.layers], work)
                    if kind.exchanged is None
                    else []
                ),
            }
        )
        if profiled:
            rows[-1]["profile"] = profile.profile(programs[kind.name])
    return rows, [
        {"contender": name, "workload": str(work), "why": why}
        for name, why in (refused | failed).items()
    ]


def _compare(rows: list[dict[str, Any]], copy_gb_per_s: float | None) -> None:
    """Adds to the rows of one workload their shares of the copy's rate, and ratios."""
    us = {row["contender"]: row["us"] for row in rows}
    best = min((us[name] for name in JAX_8_BIT if name in us), default=None)
    bases = {BF16: us.get(BF16), BEST_JAX: best, OURS_DENSE: us.get(OURS_DENSE)}
    for row in rows:
        row["share_of_copy"] = report.ratio(row["gb_per_s"], copy_gb_per_s)
        row["over"] = {
            name: None if row["contender"] == NO_LINEARS else report.ratio(base, row["us"])
            for name, base in bases.items()
        }

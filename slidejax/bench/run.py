"""`slidejax bench`: the lift compared with a copy, and whole linear layers compared with JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.bench import contenders, report
from slidejax.bench.timing import Clock, Contender, time_all
from slidejax.ops import registry
from slidejax.ops.cuda import calls, library
from slidejax.ops.lift_quantize import lift_quantize, lift_rows
from slidejax.ops.tuning import Variant
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight, pack
from slidejax.weights.pattern import UNPRUNED, Pattern

__all__ = ["copy_of", "measure", "table"]

_LIFT_BYTES = 1 << 30  # x of the lift is at most this large


def inputs_of(rows: int, columns: int, count: int = 4) -> list[jax.Array]:
    """Distinct bfloat16 inputs `[rows, columns]`."""
    return [
        jax.random.normal(jax.random.key(100 + i), (rows, columns), jnp.bfloat16)
        for i in range(count)
    ]


def measure(
    shapes: Sequence[tuple[int, int]],
    *,
    patterns: Sequence[str] = ("6:8",),
    dtypes: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
    clock: Clock | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures the lift and whole linear layers.

    Args:
      shapes: (out, in) of the layers (`slidejax.bench.shapes.PRESETS`). A shape counts in the sums
        as often as it is given.
      patterns: of the weights.
      dtypes: of the values. None takes int8, and on a GPU float8_e4m3fn too.
      rows: numbers of rows of x. None takes 16, 256, 1024, 4096 and 16384 on a GPU, and 1 and 16 on
        a CPU.
      clock: how long to measure. None takes `Clock.of_device()`.
      note: called with a line of text for each step, and for each contender that could not run.

    Returns:
      A JSON object with what `report.machine` says, "shapes" and

      - "lift": rows with `us` and `gb_per_s` of the lift, the copy and quantising alone;
      - "linear": rows with `us` by contender, the reasons of implementations that refuse, and the
        settings of those that have any;
      - "normed": rows with `us` of the layers behind an RMS norm that is computed in the same time,
        and the variant that runs for slidejax: the one that was the fastest without a norm;
      - "sums", "normed_sums": the same added up over the shapes, for each dtype, pattern and M,
        with ratios to the baselines. A ratio above 1 means that slidejax is faster.

    Raises:
      ValueError: a bad pattern or dtype, before anything is measured.
    """
    gpu = jax.default_backend() == "gpu"
    clock = clock or Clock.of_device()
    parsed = [Pattern.parse(p) for p in patterns]
    resolved = [
        numerics.check_dtype(d, "dtypes")
        for d in dtypes or (("int8", "float8_e4m3fn") if gpu else ("int8",))
    ]
    rows = rows or ([16, 256, 1024, 4096, 16384] if gpu else [1, 16])
    lift, linear, normed = [], [], []
    for k in sorted({k for _, k in shapes}):
        for m in rows:
            lift += _lift(m, k, parsed, resolved, clock, note)
    for n, k in dict.fromkeys(shapes):
        kernel = contenders.kernel_of(n, k)
        layers = contenders.baselines(kernel)
        weights = [pack(kernel, p, dtype=d) for p in parsed for d in resolved]
        for m in rows:
            baselines = contenders.for_rows(layers, m)
            alone, behind_norm = _linear(m, weights, baselines, clock, note)
            linear += alone
            normed += behind_norm
    return {
        **report.machine(clock),
        "shapes": [list(shape) for shape in shapes],
        "lift": lift,
        "linear": linear,
        "normed": normed,
        "sums": _sums(linear, shapes, contenders.BASELINES),
        "normed_sums": _sums(normed, shapes, contenders.NORMED),
    }


def _linear(
    m: int,
    weights: Sequence[SlideWeight],
    baselines: Sequence[Contender],
    clock: Clock,
    note: Callable[[str], None],
) -> tuple[list[dict], list[dict]]:
    """Rows of results, one for each weight: of the layers alone, and behind a norm.

    All weights have one shape, and share the baselines.
    """
    n, k = weights[0].out_features, weights[0].in_features
    note(f"linear: N={n} K={k} M={m}")
    found = [contenders.sparse(w, m) for w in weights]
    prefixes = [f"{w.pattern} {w.dtype.name} " for w in weights]
    ours = [
        dataclasses.replace(c, name=prefix + c.name)
        for prefix, (variants, _) in zip(prefixes, found, strict=True)
        for c in variants.values()
    ]
    xs = inputs_of(m, k)
    alone = [
        c
        for c in baselines
        if c.name != contenders.WEIGHTS_ALONE or m <= contenders.WEIGHTS_ALONE_ROWS
    ]
    us = time_all([*alone, *ours], xs, clock, note)
    us[contenders.BEST_DENSE] = contenders.best_dense(us)
    common = {name: us.get(name) for name in contenders.BASELINES}
    about = [
        {"out": n, "in": k, "rows": m, "pattern": str(w.pattern), "dtype": w.dtype.name}
        for w in weights
    ]
    by_variant = [
        {variant: us[prefix + c.name] for variant, c in variants.items()}
        for prefix, (variants, _) in zip(prefixes, found, strict=True)
    ]
    rows = [
        {
            **what,
            "us": common | {str(variant): time for variant, time in times.items()},
            "refused": refused,
            "settings": _settings(w, m, refused),
        }
        for what, times, w, (_, refused) in zip(about, by_variant, weights, found, strict=True)
    ]
    return rows, _normed(about, weights, by_variant, baselines, xs, clock, note)


def _normed(
    about: Sequence[dict],
    weights: Sequence[SlideWeight],
    by_variant: Sequence[Mapping[Variant, float | None]],
    baselines: Sequence[Contender],
    xs: Sequence[jax.Array],
    clock: Clock,
    note: Callable[[str], None],
) -> list[dict]:
    """The rows of results of layers behind a norm, one for each weight.

    `about` says what the weights are, and `by_variant` holds their times without the norm.
    """
    inputs = weights[0].in_features
    jax_layers = [
        contenders.behind_norm(c, inputs) for c in baselines if c.name in contenders.NORMED
    ]
    ours = [
        contenders.fastest_behind_norm(
            w, len(xs[0]), times, f"{w.pattern} {w.dtype.name} behind a norm"
        )
        for w, times in zip(weights, by_variant, strict=True)
    ]
    us = time_all([*jax_layers, *(o[1] for o in ours if o is not None)], xs, clock, note)
    return [
        {
            **what,
            "variant": None if o is None else str(o[0]),
            "us": {name: us[name] for name in contenders.NORMED}
            | {contenders.SLIDEJAX: None if o is None else us[o[1].name]},
        }
        for what, o in zip(about, ours, strict=True)
    ]


def _settings(w: SlideWeight, rows: int, refused: Mapping[str, str]) -> dict[str, str]:
    """The settings of the implementations that have any, by name."""
    texts = {i.name: i.settings(w, rows) for i in registry.competing() if i.name not in refused}
    return {name: text for name, text in texts.items() if text is not None}


def copy_of(x: jax.Array) -> jax.Array:
    """A copy by the driver if there is the library; else a negation, which moves as many bytes."""
    return calls.memcpy_call(x) if library.on_gpu() and library.missing() is None else -x


def _lift(
    m: int,
    k: int,
    patterns: Sequence[Pattern],
    dtypes: Sequence[Any],
    clock: Clock,
    note: Callable[[str], None],
) -> list[dict]:
    note(f"lift_quantize: M={m} K={k}")
    copies = max(2, min(4, _LIFT_BYTES // (2 * m * k)))

    def lift(p: Pattern, d: Any) -> Callable[[jax.Array, Any], Any]:
        return lambda x, _: lift_quantize(x, p, d)

    def quantise(d: Any) -> Callable[[jax.Array, Any], Any]:
        return lambda x, _: lift_rows([x], UNPRUNED, d, pads=False)

    cases = {f"{p} {d.name}": (p, d) for p in patterns for d in dtypes}
    plain = {f"quantise {d.name}": d for d in dtypes}
    timed = [
        Contender("copy", lambda x, _: copy_of(x)),
        *(Contender(name, quantise(d)) for name, d in plain.items()),
        *(Contender(name, lift(*c)) for name, c in cases.items()),
    ]
    us = time_all(timed, inputs_of(m, k, copies), clock, note)
    size = {"copy": 4 * m * k}
    size |= {name: 2 * m * k + m * k * d.itemsize + 4 * m for name, d in plain.items()}
    size |= {
        name: 2 * m * k + m * p.lifted(k) * d.itemsize + 4 * m for name, (p, d) in cases.items()
    }
    speed = {name: None if t is None else size[name] / t / 1e3 for name, t in us.items()}
    return [
        {
            "rows": m,
            "in": k,
            "pattern": str(p),
            "dtype": d.name,
            "us": us[name],
            "gb_per_s": speed[name],
            "quantise_us": us[f"quantise {d.name}"],
            "quantise_gb_per_s": speed[f"quantise {d.name}"],
            "over_quantise": report.ratio(us[name], us[f"quantise {d.name}"]),
            "copy_us": us["copy"],
            "copy_gb_per_s": speed["copy"],
        }
        for name, (p, d) in cases.items()
    ]


def _sums(
    linear: list[dict], shapes: Sequence[tuple[int, int]], bases: Sequence[str]
) -> list[dict]:
    """Times added up over the shapes, each as often as it is given, and ratios to the baselines.

    A sum is None if a layer's time is missing.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in linear:
        groups.setdefault((row["pattern"], row["dtype"], row["rows"]), []).append(row)
    sums = []
    for (p, d, m), rows in groups.items():
        names = dict.fromkeys(name for row in rows for name in row["us"])
        us: dict[str, float | None] = {}
        for name in names:
            times = [(shapes.count((row["out"], row["in"])), row["us"].get(name)) for row in rows]
            us[name] = (
                None if any(t is None for _, t in times) else sum(count * t for count, t in times)
            )
        sums.append({"pattern": p, "dtype": d, "rows": m, "us": us, "ratios": _ratios(us, bases)})
    return sums


def _ratios(
    us: dict[str, float | None], bases: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """How many times as fast as each baseline each of slidejax's contenders is."""
    ours = [name for name in us if name not in bases]
    return {name: {base: report.ratio(us.get(base), us[name]) for base in bases} for name in ours}


# --- tables ---------------------------------------------------------------------------------------


def _times(rows: Sequence[dict], keys: Sequence[str], bases: Sequence[str]) -> list[str]:
    names = [*bases, *dict.fromkeys(n for row in rows for n in row["us"] if n not in bases)]
    return report.grid(
        [*keys, *names],
        [
            [
                *(str(row[key]) for key in keys),
                *(report.microseconds(row["us"].get(n)) for n in names),
            ]
            for row in rows
        ],
    )


def _sum_lines(sums: Sequence[dict], bases: Sequence[str], what: str) -> list[str]:
    """Sums over the shapes, and the ratios to the baselines."""
    ratios = [
        [row["pattern"], row["dtype"], str(row["rows"]), name, *map(report.times_as, by.values())]
        for row in sums
        for name, by in row["ratios"].items()
    ]
    return [
        "",
        f"sum over {what}",
        *_times(sums, ("pattern", "dtype", "rows"), bases),
        "",
        "sum, times as fast as",
        *report.grid(["pattern", "dtype", "rows", "implementation", *bases], ratios),
    ]


def table(results: dict[str, Any]) -> str:
    """The results of `measure` as text."""
    lines = [report.machine_line(results), "", "lift_quantize"]
    lift_keys = ("pattern", "dtype", "rows", "in")
    speeds = ("us", "gb_per_s", "quantise_us", "quantise_gb_per_s", "copy_us", "copy_gb_per_s")
    head = [*lift_keys, "us", "GB/s", "quantise us", "GB/s", "copy us", "GB/s", "over quantise"]
    lines += report.grid(
        head,
        [
            [
                *(str(r[k]) for k in lift_keys),
                *(report.microseconds(r[k]) for k in speeds),
                report.times_as(r["over_quantise"]),
            ]
            for r in results["lift"]
        ],
    )
    keys = ("pattern", "dtype", "rows", "out", "in")
    lines += ["", "linear", *_times(results["linear"], keys, contenders.BASELINES)]
    shapes = ", ".join(f"{n}x{k}" for n, k in results["shapes"])
    lines += _sum_lines(results["sums"], contenders.BASELINES, shapes)
    lines += ["", "linear behind an RMS norm, which is computed in the same time"]
    lines += _times(results["normed"], (*keys, "variant"), contenders.NORMED)
    lines += _sum_lines(results["normed_sums"], contenders.NORMED, f"{shapes}, with the norm")
    for name in dict.fromkeys(name for r in results["linear"] for name in r["settings"]):
        lines += ["", f"settings of {name}"]
        lines += sorted(
            {
                f"{r['pattern']} {r['dtype']} M={r['rows']} {r['out']}x{r['in']}: "
                f"{r['settings'][name]}"
                for r in results["linear"]
                if name in r["settings"]
            }
        )
    refused = {
        f"{row['dtype']} {name}: {why}"
        for row in results["linear"]
        for name, why in row["refused"].items()
    }
    return "\n".join(
        [*lines, *([""] if refused else []), *(f"not timed: {line}" for line in sorted(refused))]
    )

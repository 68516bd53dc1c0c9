"""`slidejax bench`: the lift compared with a copy, and whole linear layers compared with JAX."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import slidejax
from slidejax.bench import contenders
from slidejax.bench.timing import Clock, Contender, time_all
from slidejax.ops import registry
from slidejax.ops.cuda import calls, library
from slidejax.ops.lift_quantize import lift_quantize, lift_rows
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight, pack
from slidejax.weights.pattern import UNPRUNED, Pattern

__all__ = ["measure", "set_flags", "table"]

_FLAG = "--xla_gpu_enable_triton_gemm=false"
_LIFT_BYTES = 1 << 30  # x of the lift is at most this large


def set_flags() -> None:
    """Lets XLA's baselines use cuBLAS, which is faster on Hopper.

    It has an effect only before JAX starts its backend.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_triton_gemm" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}".strip()


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
      A JSON object with "device", "jax", "slidejax", "xla_flags", "clock", "shapes" and

      - "lift": rows with `us` and `gb_per_s` of the lift, the copy and quantising alone;
      - "linear": rows with `us` by contender, the reasons of implementations that refuse, and the
        settings of those that have any;
      - "sums": the same added up over the shapes, for each dtype, pattern and M, with ratios to the
        baselines. A ratio above 1 means that slidejax is faster.

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
    lift, linear = [], []
    for k in sorted({k for _, k in shapes}):
        for m in rows:
            lift += _lift(m, k, parsed, resolved, clock, note)
    for n, k in dict.fromkeys(shapes):
        kernel = contenders.kernel_of(n, k)
        baselines = contenders.baselines(kernel)
        weights = [pack(kernel, p, dtype=d) for p in parsed for d in resolved]
        for m in rows:
            linear += _linear(m, weights, baselines, clock, note)
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "slidejax": _version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "clock": {"warmup_s": clock.warmup, "seconds": clock.seconds, "rounds": clock.rounds},
        "shapes": [list(shape) for shape in shapes],
        "lift": lift,
        "linear": linear,
        "sums": _sums(linear, shapes),
    }


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("slidejax")
    except PackageNotFoundError:
        return f"not installed ({os.path.dirname(slidejax.__file__)})"


def _linear(
    m: int,
    weights: Sequence[SlideWeight],
    baselines: Sequence[Contender],
    clock: Clock,
    note: Callable[[str], None],
) -> list[dict]:
    """One row of results for each weight; all have one shape, and share the baselines."""
    n, k = weights[0].out_features, weights[0].in_features
    note(f"linear: N={n} K={k} M={m}")
    found = [contenders.sparse(w, m) for w in weights]
    prefixes = [f"{w.pattern} {w.dtype.name} " for w in weights]
    ours = [
        Contender(prefix + c.name, c.apply, c.weights)
        for prefix, (variants, _) in zip(prefixes, found, strict=True)
        for c in variants.values()
    ]
    us = time_all([*baselines, *ours], inputs_of(m, k), clock, note)
    us[contenders.BEST_DENSE] = contenders.best_dense(us)
    common = {name: us[name] for name in contenders.BASELINES}
    return [
        {
            "out": n,
            "in": k,
            "rows": m,
            "pattern": str(w.pattern),
            "dtype": w.dtype.name,
            "us": common | {c.name: us[prefix + c.name] for c in variants.values()},
            "refused": refused,
            "settings": _settings(w, m, refused),
        }
        for w, prefix, (variants, refused) in zip(weights, prefixes, found, strict=True)
    ]


def _settings(w: SlideWeight, rows: int, refused: Mapping[str, str]) -> dict[str, str]:
    """The settings of the implementations that have any, by name."""
    texts = {i.name: i.settings(w, rows) for i in registry.competing() if i.name not in refused}
    return {name: text for name, text in texts.items() if text is not None}


def _copy(x: jax.Array) -> jax.Array:
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
        Contender("copy", lambda x, _: _copy(x)),
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
            "over_quantise": _ratio(us[name], us[f"quantise {d.name}"]),
            "copy_us": us["copy"],
            "copy_gb_per_s": speed["copy"],
        }
        for name, (p, d) in cases.items()
    ]


def _sums(linear: list[dict], shapes: Sequence[tuple[int, int]]) -> list[dict]:
    """Times added up over the shapes, each as often as it is given.

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
        sums.append({"pattern": p, "dtype": d, "rows": m, "us": us, "ratios": _ratios(us)})
    return sums


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _ratios(us: dict[str, float | None]) -> dict[str, dict[str, float | None]]:
    """How many times as fast as each baseline each of slidejax's contenders is."""
    ours = [name for name in us if name not in contenders.BASELINES]
    return {
        name: {base: _ratio(us.get(base), us[name]) for base in contenders.BASELINES}
        for name in ours
    }


# --- tables ---------------------------------------------------------------------------------------


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _times_as(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (head, *lines)
    ]


def _times(rows: Sequence[dict], keys: Sequence[str]) -> list[str]:
    names = [
        *contenders.BASELINES,
        *dict.fromkeys(n for row in rows for n in row["us"] if n not in contenders.BASELINES),
    ]
    return _grid(
        [*keys, *names],
        [
            [*(str(row[key]) for key in keys), *(_us(row["us"].get(n)) for n in names)]
            for row in rows
        ],
    )


def table(results: dict[str, Any]) -> str:
    """The results of `measure` as text."""
    clock = results["clock"]
    lines = [
        f"{results['device']}, jax {results['jax']}, slidejax {results['slidejax']}; each measured "
        f"for {clock['seconds']} s after "
        f"{clock['warmup_s']} s, {clock['rounds']} round(s); bfloat16 x to bfloat16 y, "
        "microseconds",
        "",
        "lift_quantize",
    ]
    keys = ("pattern", "dtype", "rows", "in")
    speeds = ("us", "gb_per_s", "quantise_us", "quantise_gb_per_s", "copy_us", "copy_gb_per_s")
    head = [*keys, "us", "GB/s", "quantise us", "GB/s", "copy us", "GB/s", "over quantise"]
    lines += _grid(
        head,
        [
            [
                *(str(r[k]) for k in keys),
                *(_us(r[k]) for k in speeds),
                _times_as(r["over_quantise"]),
            ]
            for r in results["lift"]
        ],
    )
    lines += ["", "linear", *_times(results["linear"], ("pattern", "dtype", "rows", "out", "in"))]
    shapes = ", ".join(f"{n}x{k}" for n, k in results["shapes"])
    lines += ["", f"sum over {shapes}", *_times(results["sums"], ("pattern", "dtype", "rows"))]
    ratios = [
        [row["pattern"], row["dtype"], str(row["rows"]), name, *map(_times_as, by.values())]
        for row in results["sums"]
        for name, by in row["ratios"].items()
    ]
    lines += [
        "",
        "sum, times as fast as",
        *_grid(["pattern", "dtype", "rows", "implementation", *contenders.BASELINES], ratios),
    ]
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

"""`slidejax tune`: times `linear` with every implementation and records the times, from which the choice is made.

Before cuSPARSELt is timed, its algorithms are searched for the shape, and the fastest is remembered (`slidejax.ops.implementations.cusparselt`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from slidejax.bench import contenders
from slidejax.bench.run import inputs_of
from slidejax.bench.timing import Clock, time_all
from slidejax.ops import registry
from slidejax.ops.implementations import cusparselt
from slidejax.ops.tuning import record
from slidejax.variants.prepared import weights_of
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight, pack
from slidejax.weights.pattern import Pattern

__all__ = ["measure", "table"]


def _of_model(model: Any) -> tuple[list[tuple[int, int]], set[tuple[Pattern, Any]]]:
    """(out, in) of the layers of a model; of a converted one also the patterns and dtypes."""
    from slidejax import huggingface

    weights = weights_of(model.params)
    if weights:
        return sorted({(w.out_features, w.in_features) for w in weights}), {
            (w.pattern, w.dtype) for w in weights
        }
    converted = huggingface.planned(model, "2:4").converted
    return sorted({(layer.shape[-1], layer.shape[-2]) for layer in converted}), set()


def _search(w: SlideWeight, rows: int, note: Callable[[str], None]) -> None:
    """Searches cuSPARSELt's algorithms where it can run; one that fails leaves the library's default."""
    if "cusparselt" in registry.refusals(contenders.problem_of(w, rows)):
        return
    try:
        best = cusparselt.search(w, rows)[0]
    except (NotImplementedError, RuntimeError) as error:
        note(f"cuSPARSELt's algorithms cannot be searched: {error}")
    else:
        note(
            f"cuSPARSELt's fastest algorithm is {best['algorithm']}: {best['microseconds']:.1f} us"
        )


def measure(
    shapes: Sequence[tuple[int, int]],
    *,
    model: Any = None,
    patterns: Sequence[str] = ("6:8",),
    dtypes: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
    clock: Clock | None = None,
    dry_run: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], Path | None]:
    """Measures every combination, and records it.

    Args:
      shapes: (out, in) of the layers, where no model is given.
      model: a Hugging Face Flax model, to measure its layers; a converted one also says which patterns and dtypes.
      patterns: of the weights.
      dtypes: of the values; None: int8 and float8_e4m3fn.
      rows: numbers of rows of x; None: 1, 16, 64, 256, 1024, 4096 and 16384 on a GPU, else 1 and 16.
      clock: how long to measure; None: `Clock.of_device()`.
      dry_run: measure, and record nothing.
      note: called with a line for each step.

    Returns:
      Entries as `slidejax.tune` keeps them, and the table that they went to (None for a dry run). What was measured is
      recorded after each shape, so that an interruption loses one shape at most.

    Raises:
      ValueError: a bad pattern or dtype, or nothing but the pattern "dense", before anything is measured.
    """
    gpu = jax.default_backend() == "gpu"
    clock = clock or Clock.of_device()
    resolved = [numerics.check_dtype(d, "dtypes") for d in dtypes or ("int8", "float8_e4m3fn")]
    forms: list[tuple[Pattern, Any]] = [(Pattern.parse(p), d) for p in patterns for d in resolved]
    if model is not None:
        shapes, own = _of_model(model)
        forms = sorted(own, key=str) or forms
    sparse = [(pattern, dtype) for pattern, dtype in forms if pattern.prunes]
    if len(sparse) < len(forms):
        why = "the pattern dense runs as the dense product alone: there is nothing to choose"
        if not sparse:
            raise ValueError(why)
        note(why)
    device = jax.devices()[0].device_kind
    entries: list[dict[str, Any]] = []
    path = None
    for n, k in dict.fromkeys(shapes):
        kernel = contenders.kernel_of(n, k)
        new = []
        for pattern, dtype in sparse:
            w = pack(kernel, pattern, dtype=dtype)
            for m in rows or ([1, 16, 64, 256, 1024, 4096, 16384] if gpu else [1, 16]):
                note(f"N={n} K={k} {pattern} {dtype.name} M={m}")
                if not dry_run:
                    _search(w, m, note)
                timed = time_all(
                    contenders.sparse(w, m, both=True)[0], inputs_of(m, k), clock, note
                )
                us = {name: round(t, 2) for name, t in timed.items() if t is not None}
                if us:
                    new.append(
                        {
                            "in": k,
                            "out": n,
                            "pattern": str(pattern),
                            "dtype": dtype.name,
                            "rows": m,
                            "us": us,
                        }
                    )
        if new and not dry_run:
            path = record(device, new)
        entries += new
    return entries, path


def table(entries: list[dict[str, Any]]) -> str:
    """The entries as text, the fastest first."""
    lines = []
    for e in entries:
        times = ", ".join(
            f"{name} {us:.1f} us" for name, us in sorted(e["us"].items(), key=lambda item: item[1])
        )
        lines.append(f"N={e['out']} K={e['in']} {e['pattern']} {e['dtype']} M={e['rows']}: {times}")
    return "\n".join(lines)

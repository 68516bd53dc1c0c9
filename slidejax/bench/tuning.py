"""`slidejax tune`: times `linear` with every implementation, and records the times for the choice.

An implementation with settings searches for the fastest ones before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.bench import contenders
from slidejax.bench.run import inputs_of
from slidejax.bench.timing import Clock, time_all
from slidejax.ops import registry
from slidejax.ops.tuning import check_record, record
from slidejax.variants.prepared import weights_of
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight, pack
from slidejax.weights.pattern import Pattern

__all__ = ["measure", "table"]


def _of_model(model: Any) -> tuple[list[tuple[int, int]], set[tuple[Pattern, Any]]]:
    """(out, in) of the layers of a model; for a converted model also its patterns and dtypes."""
    from slidejax import conversion

    weights = weights_of(model.params)
    if weights:
        return sorted({(w.out_features, w.in_features) for w in weights}), {
            (w.pattern, w.dtype) for w in weights
        }
    converted = conversion.functional(model).planned("2:4").converted
    return sorted({(layer.shape[-1], layer.shape[-2]) for layer in converted}), set()


def _search(w: SlideWeight, rows: int, note: Callable[[str], None]) -> None:
    """Lets the implementations that run here search for their fastest settings.

    If a search fails, the implementation keeps its defaults.
    """
    refused = registry.refusals(contenders.problem_of(w, rows))
    for implementation in registry.competing():
        if implementation.name in refused:
            continue
        try:
            found = implementation.search(w, rows)
        except (NotImplementedError, RuntimeError) as error:
            note(f"the settings of {implementation.name} cannot be searched: {error}")
        else:
            if found is not None:
                note(found)


def _is_open(pattern: Pattern, dtype: Any, rows: Sequence[int]) -> bool:
    """Whether weights of this pattern and dtype can run in several ways, for any number of rows."""
    kernel = jax.ShapeDtypeStruct((pattern.block, pattern.block), jnp.bfloat16)
    w = jax.eval_shape(lambda kernel: pack(kernel, pattern, dtype=dtype), kernel)
    return any(len(contenders.variants(w, m)[0]) > 1 for m in rows)


def _open_forms(
    forms: list[tuple[Pattern, Any]], rows: Sequence[int], note: Callable[[str], None]
) -> list[tuple[Pattern, Any]]:
    """The patterns and dtypes that can run in several ways. The others are named to `note`.

    Raises:
      ValueError: if there are none.
    """
    found = [form for form in forms if _is_open(*form, rows)]
    if len(found) < len(forms):
        settled = ", ".join(dict.fromkeys(str(form[0]) for form in forms if form not in found))
        why = f"there is one way to run the pattern {settled}: there is nothing to choose"
        if not found:
            raise ValueError(why)
        note(why)
    return found


def _entry(
    w: SlideWeight, rows: int, clock: Clock, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The times of a weight with `rows` rows, as one entry; none if nothing could run."""
    found, _ = contenders.sparse(w, rows, both=True)
    timed = time_all(list(found.values()), inputs_of(rows, w.in_features), clock, note)
    us = {
        variant: round(time, 2)
        for variant, contender in found.items()
        if (time := timed[contender.name]) is not None
    }
    entry = {
        "in": w.in_features,
        "out": w.out_features,
        "pattern": str(w.pattern),
        "dtype": w.dtype.name,
        "rows": rows,
        "us": us,
    }
    return [entry] if us else []


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
    """Measures and records every combination.

    Args:
      shapes: (out, in) of the layers, where no model is given.
      model: a decoder, or a Flax model of transformers, whose layers to measure. A converted one
        also gives patterns and dtypes.
      patterns: of the weights.
      dtypes: of the values. None takes int8 and float8_e4m3fn.
      rows: numbers of rows of x. None takes 1, 8, 16, 64, 256, 1024, 4096 and 16384 on a GPU, and
        1 and 16 on a CPU.
      clock: how long to measure. None takes `Clock.of_device()`.
      dry_run: whether to record nothing.
      note: called with a line of text for each step.

    Returns:
      The entries, as `slidejax.ops.tuning` keeps them, and the path of the table, which is None for
      a dry run.
      Each shape is recorded when it has been measured, so that an interruption loses at most one.

    Raises:
      ValueError: for a bad pattern or dtype, if there is nothing to choose between, or if this
        machine's table is damaged. It is raised before anything is measured.
      OSError: as early, if the table cannot be written.
    """
    gpu = jax.default_backend() == "gpu"
    clock = clock or Clock.of_device()
    resolved = [numerics.check_dtype(d, "dtypes") for d in dtypes or ("int8", "float8_e4m3fn")]
    forms: list[tuple[Pattern, Any]] = [(Pattern.parse(p), d) for p in patterns for d in resolved]
    if model is not None:
        shapes, own = _of_model(model)
        forms = sorted(own, key=str) or forms
    rows = rows or ([1, 8, 16, 64, 256, 1024, 4096, 16384] if gpu else [1, 16])
    forms = _open_forms(forms, rows, note)
    device = jax.devices()[0].device_kind
    if not dry_run:
        check_record(device)
    entries: list[dict[str, Any]] = []
    path = None
    for n, k in dict.fromkeys(shapes):
        kernel = contenders.kernel_of(n, k)
        new = []
        for pattern, dtype in forms:
            w = pack(kernel, pattern, dtype=dtype)
            for m in rows:
                note(f"N={n} K={k} {pattern} {dtype.name} M={m}")
                if not dry_run:
                    _search(w, m, note)
                new += _entry(w, m, clock, note)
        if new and not dry_run:
            path = record(device, new)
        entries += new
    return entries, path


def table(entries: list[dict[str, Any]]) -> str:
    """The entries as text, with the fastest implementation first."""
    lines = []
    for e in entries:
        times = ", ".join(
            f"{name} {us:.1f} us" for name, us in sorted(e["us"].items(), key=lambda item: item[1])
        )
        lines.append(f"N={e['out']} K={e['in']} {e['pattern']} {e['dtype']} M={e['rows']}: {times}")
    return "\n".join(lines)

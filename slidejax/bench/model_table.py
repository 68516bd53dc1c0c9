"""The results of `slidejax bench --model` as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from slidejax.bench import profile, report
from slidejax.bench.model_layers import BF16, JAX_8_BIT, OURS_DENSE

__all__ = ["BEST_JAX", "CPU_NOTE", "table"]

BEST_JAX = "best JAX 8 bit"  # the fastest of the three, for each workload
CPU_NOTE = "a CPU's times say nothing about a GPU: they only show that everything runs"

_HEAD = (
    "",
    "us",
    "spread",
    "tokens/s",
    "reads MB",
    "GB/s",
    "of copy",
    "weights MB",
    *(f"over {base}" for base in (BF16, BEST_JAX, OURS_DENSE)),
)


def _cells(row: dict[str, Any], in_memory: int) -> list[str]:
    spread = (max(row["rounds"]) - min(row["rounds"])) / row["us"]
    share = row["share_of_copy"]
    return [
        row["contender"],
        report.microseconds(row["us"]),
        f"{spread:.1%}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['read_bytes'] / 1e6:.1f}",
        f"{row['gb_per_s']:.1f}",
        "-" if share is None else f"{share:.1%}",
        f"{in_memory / 1e6:.1f}",
        *map(report.times_as, row["over"].values()),
    ]


def _workloads(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for work in dict.fromkeys(row["workload"] for row in rows):
        yield work, [row for row in rows if row["workload"] == work]


def _profile_lines(row: dict[str, Any]) -> list[str]:
    """The profile of a row, if there is one."""
    if "profile" not in row:
        return []
    where = f"{row['contender']}, {row['workload']}"
    if row["profile"] is None:
        return [f"{where}: no GPU was profiled"]
    share = row["share_of_copy"]
    reads = f"reads {row['read_bytes'] / 1e6:.1f} MB at {row['gb_per_s']:.1f} GB/s"
    of_copy = "" if share is None else f", {share:.1%} of the copy"
    first = f"{where}: {report.microseconds(row['us'])} us, {reads}{of_copy}"
    return ["", first, *profile.table(row["profile"])]


def table(results: dict[str, Any]) -> str:
    """The results of `slidejax.bench.whole_models.measure` as text."""
    sizes, copy = results["sizes"], results["copy"]
    lines = [
        report.machine_line(results),
        f"XLA flags: {results['xla_flags'] or 'none'}",
        f"{results['model']}: {results['layers']} layer(s) with random weights, vocabulary "
        f"{sizes['vocabulary']}, a KV cache of {results['context']} positions; "
        f"{results['steps']} decoding steps a call",
        f"a copy moves {report.microseconds(copy['gb_per_s'])} GB/s, read and written",
        f"{BEST_JAX}: the fastest of {', '.join(JAX_8_BIT)}",
    ]
    if results["device"] == "cpu":
        lines.append(CPU_NOTE)
    for work, rows in _workloads(results["times"]):
        memory = results["contenders"]
        cells = [_cells(row, memory[row["contender"]]["in_memory"]) for row in rows]
        what = "one prefill" if work.startswith("prefill") else "one step"
        lines += ["", f"{work}: {what}", *report.grid(_HEAD, cells)]
        lines += [
            f"{row['contender']} ran in {', '.join(row['implementations'])}"
            for row in rows
            if row["implementations"]
        ]
        lines += [line for row in rows for line in _profile_lines(row)]
    if results["not_run"]:
        lines.append("")
    for failure in results["not_run"]:
        where = f", {failure['workload']}" if failure["workload"] else ""
        lines.append(f"did not run: {failure['contender']}{where}: {failure['why']}")
    return "\n".join(lines)

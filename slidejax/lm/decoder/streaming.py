"""Converting a decoder from files to files, a few layers at a time.

The model is never in memory as a whole: parameters are read when a pruning stage needs them
(`slidejax.prune.model.streamed`), and written as soon as they are done. The result is that of
`slidejax.lm.convert`, bit for bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slidejax.checkpoint import store
from slidejax.checkpoint.gradual import ROOM, GradualWriter
from slidejax.checkpoint.space import check_space
from slidejax.checkpoint.staging import check_apart, check_outside, claimed, staged
from slidejax.files import check_path
from slidejax.functional import Functional
from slidejax.kinds import check_flag, check_kind
from slidejax.lm.decoder.config import DecoderConfig
from slidejax.lm.decoder.family import check_tokens, converts_head, functional_of
from slidejax.lm.decoder.files import check_dtype, content, write_texts
from slidejax.lm.decoder.names import tree_of
from slidejax.lm.decoder.params import leaves_of
from slidejax.lm.decoder.source import Source, open_source
from slidejax.ops.meshes import on_mesh
from slidejax.prune.model.ahead import CompileAhead
from slidejax.prune.model.calibration import Calibration
from slidejax.prune.model.convert import SMOOTH_ON, in_order, planned_rules, stored
from slidejax.prune.model.methods import Method, calibrated_method, method_of
from slidejax.prune.model.result import Pruned, lookup, not_reached
from slidejax.prune.model.stages import Stages
from slidejax.prune.model.streamed import Memory, Reading, memory, prune_streamed
from slidejax.rules import Prune, Report, Rule, pack_by_rule

__all__ = ["convert_files", "memory_needed"]

_KEPT = 1.13  # bytes of a finished stage for each weight with 8-bit values
_OFFLOAD = 0.2  # of a GPU's memory: a state that is larger waits in the host's memory


def convert_files(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rules: Any,
    method: str | Method | Prune | None = None,
    calibration: Any = None,
    *,
    dtype: Any = None,
    floats: Any = None,
    replace: bool = False,
    about: Mapping[str, Any] | Callable[[Report], Mapping[str, Any]] | None = None,
    report: Report | None = None,
) -> None:
    """Converts a decoder in files, and writes it into a directory that `slidejax.lm.load` reads.

    Layers are read, pruned, packed, written and forgotten one after the other. `memory_needed` says
    how much memory this takes. The weights are those that `convert` makes of the loaded model, bit
    for bit.

    Args:
      path: the model, as in `slidejax.lm.load`.
      out: the directory to write.
      rules, method, calibration: as in `slidejax.lm.convert`. `Calibration.work` names a folder
        from which a conversion that was stopped goes on.
      dtype: as in `slidejax.lm.load`.
      floats: as in `slidejax.lm.save`.
      replace: whether an `out` that slidejax wrote is replaced. Otherwise one that exists is
        refused, before any work.
      about: notes about where the model comes from, plain JSON values; or a function that makes
        them of the report, at the end.
      report: an empty `slidejax.Report`, which is filled in.

    Raises:
      ValueError, TypeError, NotImplementedError, ImportError: as `slidejax.lm.load` and
        `slidejax.lm.convert`; ValueError, if `out` exists, is the model, lies in it or holds it, or
        there is no space for it; if all layers are to be pruned with the inputs of the original
        model (`in_order=False`).
      OSError: if `out` cannot be written.

    >>> import tempfile
    >>> from slidejax.lm.decoder.examples import tiny
    >>> from slidejax.lm.decoder.files import load, save
    >>> tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 64)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(tiny(), folder + "/model")
    ...     convert_files(folder + "/model", folder + "/out", "6:8", "wanda", tokens)
    ...     load(folder + "/out")(tokens).shape
    (2, 32, 64)
    """
    report = Report.of(report)
    floats, out = check_dtype(floats, "floats"), check_path(out, "out")
    check_flag(replace, "replace")
    if about is not None and not callable(about):
        check_kind(about, Mapping, "about", "a dict, a function that makes one, or None")
    if method is None:
        method = "magnitude" if calibration is None else "sparsegpt"
    chosen = method_of(method, calibration)
    check_apart(out, check_path(path), "out")
    work = calibration.work if isinstance(calibration, Calibration) else None
    if work is not None:
        check_outside(work, out, "work", "out")
        check_outside(work, path, "work", "the model that is read")
    with (
        claimed(out, store.METADATA, overwrite=replace, flag="replace=True") as target,
        open_source(path, dtype) as source,
    ):
        if calibration is not None:
            check_tokens(calibration, source.config)
        if source.config.tied and converts_head(rules):
            source = source.with_own_head()
        model = functional_of(source.config, tree_of(source.shapes()))
        _plan(model, rules, report)
        _check_space(target, _size(source, report), calibration, report)
        with staged(out, store.METADATA) as folder:
            with GradualWriter(folder, 3 * len(source.shapes()), ("params",)) as writer:
                sink = _Sink(writer, source, report, floats)
                if isinstance(chosen, Method) and chosen.calibrated:
                    with on_mesh(()):
                        _calibrated(
                            model, source, chosen, Calibration.of(calibration), report, sink
                        )
                else:
                    sink.prune = chosen.pruner() if isinstance(chosen, Method) else chosen
                sink.rest()
                notes = about(report) if callable(about) else about or {}
                check_kind(notes, Mapping, "about's result", "a dict")
                whole = content(source.config, source.dtype, dict(notes), {})
                del whole["params"]
                writer.finish(whole, source.shapes())
            write_texts(folder, source.files)


def _plan(model: Functional, rules: Any, report: Report) -> None:
    """Fills in the report. Rules that decide nothing are warned of here, before the work."""
    jax.eval_shape(lambda params: [model.pack(params, rules, report=report), None][1], model.params)


def _size(source: Source, report: Report) -> int:
    """About how many bytes will be written."""
    packed, shapes = {line.path for line in report.converted}, source.shapes()
    others = sum(s.size * s.dtype.itemsize for path, s in shapes.items() if path not in packed)
    return report.bytes_after + others + ROOM * 3 * len(shapes)


def _check_space(target: Path, size: int, calibration: Any, report: Report) -> None:
    """Raises an OSError if there is no space for OUT and for the finished stages."""
    check_space(target, size)
    work = calibration.work if isinstance(calibration, Calibration) else None
    if work is not None:
        stages = Path(work).absolute() / "stages"
        kept = int(_KEPT * sum(math.prod(line.shape) for line in report.converted))
        check_space(stages, kept + (size if _disk(stages) == _disk(target) else 0))


def _disk(path: Path) -> int:
    return next(p for p in path.parents if p.exists()).stat().st_dev


class _Sink:
    """Packs and writes parameters; each comes once.

    Args:
      writer: where they go.
      source: where they come from.
      report: which of them are packed, and how.
      floats: the dtype of embeddings and kernels that are not packed, or None.

    Attributes:
      prune: prunes kernels that come unpruned; None: by magnitude.
    """

    def __init__(self, writer: GradualWriter, source: Source, report: Report, floats: Any):
        self._writer, self._source, self._floats = writer, source, floats
        self._rules: dict[str, Rule] = {line.path: line.rule for line in report.converted}
        self._left = dict.fromkeys(source.shapes())
        self.prune: Prune | None = None

    def kernel(self, path: str, pruned: Pruned) -> None:
        """Packs and writes a kernel that is pruned already."""
        dtype = self._source.shapes()[path].dtype
        packed = pack_by_rule(
            jax.ShapeDtypeStruct(pruned.kernel.shape, dtype),  # type: ignore[arg-type]
            self._rules[path],
            path,
            lookup({path: pruned}),
        )
        self._write(path, packed)

    def other(self, path: str, value: Any) -> None:
        """Writes a parameter that is not packed."""
        if self._floats is not None and path.rpartition("/")[2] in ("embedding", "kernel"):
            value = value.astype(self._floats)
        self._write(path, value)

    def rest(self) -> None:
        """Reads, packs and writes all parameters that have not come."""
        for path in list(self._left):
            value = self._source.read(path)
            if path in self._rules:
                self._write(path, pack_by_rule(value, self._rules[path], path, self.prune))
            else:
                self.other(path, value)

    def _write(self, path: str, value: Any) -> None:
        self._writer.put(path, value)
        del self._left[path]


def _calibrated(
    model: Functional,
    source: Source,
    method: Method,
    how: Calibration,
    report: Report,
    sink: _Sink,
) -> None:
    """Prunes by a calibrated method, and gives what is done to the sink."""
    if not how.in_order:
        raise ValueError(
            "in_order=False needs the whole model in memory: load it, and use slidejax.lm.convert"
        )
    batches = how.as_batches()
    plan = {line.path: line.rule for line in report.converted}
    qdtypes = {path: rule.qdtype for path, rule in plan.items()}
    stages = Stages(model.run, model.params, batches[0], qdtypes)
    reached = {tap.path for taps in stages.taps for tap in taps}
    if missing := sorted(plan.keys() - reached):
        raise ValueError(f"{missing[0]}: {not_reached()}")
    store = None if how.work is None else stored(how, method, plan, batches, source.identity())
    state = _memory(stages, model, how, method, len(batches)).state
    offload = how.offload or state > _OFFLOAD * _device_bytes()
    leaves = Reading(list(source.shapes()), source.read)
    with CompileAhead() as ahead:
        pruning = in_order(stages, plan, method, how, store=store, offload=offload, ahead=ahead)
        pruning.begin(model.params)
        smoothed = prune_streamed(
            stages,
            pruning,
            leaves,
            batches,
            measured=batches[:SMOOTH_ON],
            strength=how.smooth,
            kernel_done=sink.kernel,
            other_done=sink.other,
            ahead=ahead,
            progress=how.progress,
        )
    report.notes.append(
        f"{method.name}, layer by layer in {len(stages.taps)} stages; "
        f"the inputs of {smoothed} layers smoothed"
    )


def memory_needed(
    config: DecoderConfig,
    ids: Any,
    method: str = "sparsegpt",
    rules: Any = "6:8",
    *,
    dtype: Any = "bfloat16",
) -> Memory:
    """The memory that `convert_files` takes for a decoder, without reading one.

    Args:
      config: the configuration.
      ids: token ids to calibrate on, or their shape and dtype.
      method: a calibrated method.
      rules: as in `convert_files`.
      dtype: in which the decoder computes.

    >>> from slidejax.lm.decoder.examples import tiny_config
    >>> ids = jax.ShapeDtypeStruct((4, 32), "int32")
    >>> memory_needed(tiny_config(), ids, "wanda").state < memory_needed(tiny_config(), ids).state
    True
    """
    source = Source(config, np.dtype(dtype), {}, _unread, ())
    model = functional_of(config, tree_of(source.shapes()))
    how, chosen = Calibration(np.zeros(ids.shape, np.int32)), calibrated_method(method)
    batches = how.as_batches()
    qdtypes = {path: rule.qdtype for path, rule in planned_rules(model, rules).items()}
    stages = Stages(model.run, model.params, batches[0], qdtypes)
    return _memory(stages, model, how, chosen, len(batches))


def _unread(path: str) -> Any:
    raise AssertionError(f"{path} is read where only shapes are asked for")


def _memory(
    stages: Stages, model: Functional, how: Calibration, method: Method, batches: int
) -> Memory:
    return memory(
        stages,
        dict(leaves_of(model.params)),
        batches,
        measured=min(SMOOTH_ON, batches),
        strength=how.smooth,
        corrects=method.corrects and bool(how.correct),
    )


def _device_bytes() -> float:
    """The memory of a GPU; infinite on a CPU, where it is the host's own."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return float(stats.get("bytes_limit", 0)) or math.inf

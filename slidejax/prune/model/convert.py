"""Converting a model that is a function of its parameters: the steps that all families share."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slidejax.contraction import to_matrix
from slidejax.functional import Functional
from slidejax.kinds import check_function
from slidejax.ops.meshes import on_mesh
from slidejax.prune.model.ahead import CompileAhead
from slidejax.prune.model.calibration import Calibration
from slidejax.prune.model.grams import collect_all
from slidejax.prune.model.methods import Method, Solve, calibrated_method, method_of
from slidejax.prune.model.program import named_leaves
from slidejax.prune.model.result import Pruned, lookup
from slidejax.prune.model.sequential import InOrder
from slidejax.prune.model.smooth import smooth
from slidejax.prune.model.stacked import for_elements
from slidejax.prune.model.stages import SeveralDepths, Stages
from slidejax.prune.model.store import Store, fingerprint
from slidejax.rules import Prune, Report, Rule
from slidejax.weights.checks import check_one_process
from slidejax.weights.numerics import all_finite

__all__ = [
    "calibrated",
    "check_runs",
    "convert",
    "in_order",
    "planned_report",
    "planned_rules",
    "stored",
]

SMOOTH_ON = 2  # smoothing measures the channels on this many batches


def convert(
    model: Functional,
    rules: Any,
    method: str | Method | Prune = "magnitude",
    calibration: Any = None,
    report: Report | None = None,
) -> Any:
    """Prunes and packs a model.

    Args:
      model: the model, as its family's `functional` returns it.
      rules: see `slidejax.rules`.
      method: "magnitude", "wanda", "sparsegpt", a `Method`, or a function (`slidejax.rules.Prune`).
      calibration: a `Calibration` or its batches, for methods that need them.
      report: an empty `Report`, which is filled in.

    Returns:
      The result of `model.pack`.

    Raises:
      ValueError: for bad rules, an unknown method, calibration that is missing or not used, or bad
        batches; if `work` holds another conversion.
      NotImplementedError: naming a layer that is to be calibrated and cannot be: it runs inside a
        loop of unknown length or a branch.
    """
    chosen = method_of(method, calibration)
    with on_mesh(model.params):
        params = model.params
        if not isinstance(chosen, Method):
            prune = chosen
        elif not chosen.calibrated:
            prune = chosen.pruner()
        else:
            report = Report.of(report)
            params, prune = _calibrated(model, rules, chosen, Calibration.of(calibration), report)
        return model.pack(params, rules, prune=prune, report=report)


def calibrated(
    model: Functional,
    method: str | Method,
    tokens: Any,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Prune:
    """Runs a model over calibration tokens once, for any number of conversions.

    Every layer is pruned with the inputs that it has in the original model. This is quicker than
    `convert` with calibration, and less accurate.

    Args:
      model: the original model.
      method: "wanda", "sparsegpt", or a calibrated `slidejax.prune.Method`.
      tokens: token ids `[sequences, length]`.
      progress: called with the number of sequences that are done, and of all.

    Returns:
      A function that `convert` takes as `method`.

    Raises:
      ValueError: if the tokens are not a matrix of integers, or the method is not calibrated.
    """
    chosen = calibrated_method(method)
    check_function(progress, "progress", optional=True)
    check_one_process(model.params, "params")
    batches = Calibration(tokens).as_batches()
    tell = None if progress is None else lambda done: progress(done * len(batches[0]), len(tokens))
    diagonal = chosen.reads == "diagonal"
    with on_mesh(model.params):
        check_runs(model, batches)
        found = collect_all(model.run, model.params, batches, tell, diagonal=diagonal)
    return chosen.pruner(found)


def planned_rules(model: Functional, rules: Any, *, stacked: bool = False) -> dict[str, Rule]:
    """Path -> rule of the kernels `[in, out]` that a conversion would pack; nothing is computed.

    A kernel that layers of an NNX model share is one parameter, which has the path of the first.

    Args:
      model: the model.
      rules: as in `convert`.
      stacked: whether parameters that hold several kernels, `[..., in, out]`, count, too.
    """
    lines, leaves = planned_report(model, rules).converted, named_leaves(model.params)
    return {
        line.path: line.rule
        for line in lines
        if line.path in leaves and (stacked or len(line.shape) == 2)
    }


def planned_report(model: Functional, rules: Any) -> Report:
    """The report that a conversion would give, without its warnings; nothing is computed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the conversion itself will warn
        return model.planned(rules)


def check_runs(model: Functional, batches: Sequence[Any]) -> None:
    """Raises a ValueError that names the calibration if a model cannot read its batches.

    The model is traced abstractly on the first one. Its own error may be about anything.
    """
    if model.check is not None:
        for batch in batches:
            model.check(batch)
    try:
        jax.eval_shape(
            lambda params, batch: [model.run(params, batch), None][1], model.params, batches[0]
        )
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"calibration: the model does not run on its first batch: {type(error).__name__}: "
            f"{first:.200}"
        ) from error


def _calibrated(
    model: Functional, rules: Any, method: Method, how: Calibration, report: Report
) -> tuple[Any, Prune]:
    """Prunes the kernels of a model with a calibrated method.

    Layers are pruned in order, with the inputs that the pruned layers before them give. Where that
    is not wanted or not possible, all layers are pruned with the inputs of the original model. The
    report says how it was done.

    Returns:
      `(params, prune)`: the parameters, smoothed where that is possible; and what `model.pack`
      takes as `prune=`.
    """
    check_one_process(model.params, "params")
    batches = how.as_batches()
    check_runs(model, batches)
    plan = planned_rules(model, rules, stacked=True)
    stages, reason = None, "in_order=False"
    if how.in_order:
        qdtypes = {path: rule.qdtype for path, rule in plan.items()}
        try:
            stages = Stages(model.run, model.params, batches[0], qdtypes)
        except SeveralDepths as error:
            reason = str(error)
    if stages is None:
        report.notes.append(
            f"{method.name}, all layers with the inputs of the original model, nothing smoothed "
            f"({reason})"
        )
        return model.params, lookup(_at_once(model, batches, plan, method, how))
    params, done, smoothed = _in_order(stages, model.params, batches, plan, method, how)
    report.notes.append(
        f"{method.name}, layer by layer in {len(stages.taps)} stages; "
        f"the inputs of {smoothed} layers smoothed"
    )
    return params, lookup(done)


def _in_order(
    stages: Stages,
    params: Any,
    batches: Sequence[Any],
    plan: Mapping[str, Rule],
    method: Method,
    how: Calibration,
) -> tuple[Any, dict[str, Pruned], int]:
    """Prunes layer by layer.

    Returns:
      The smoothed parameters, the pruned kernels by path, and the number of layers whose inputs
      were smoothed.
    """
    store = None if how.work is None else stored(how, method, plan, batches, params)
    with CompileAhead() as ahead:
        pruning = in_order(stages, plan, method, how, store=store, offload=how.offload, ahead=ahead)
        pruning.begin(params)
        params, smoothed = smooth(stages, params, batches[:SMOOTH_ON], how.smooth, ahead=ahead)
        done = pruning(params, batches, how.progress)
    return params, done, len(smoothed)


def stored(
    how: Calibration, method: Method, plan: Mapping[str, Rule], batches: Sequence[Any], source: Any
) -> Store:
    """The folder `how.work` for the finished stages of a conversion.

    Args:
      how: the calibration.
      method: the method.
      plan: path -> rule of the kernels that are pruned.
      batches: what the model is calibrated on.
      source: the parameters, or a text that tells them from all others.

    Raises:
      ValueError: if the folder holds another conversion.
    """
    assert how.work is not None
    settings = method.name, how.smooth, how.correct, how.damping
    rules = sorted((path, str(rule)) for path, rule in plan.items())
    return Store(how.work, fingerprint(source, list(batches), *settings, rules))


def in_order(
    stages: Stages,
    plan: Mapping[str, Rule],
    method: Method,
    how: Calibration,
    *,
    store: Store | None,
    offload: bool,
    ahead: CompileAhead,
) -> InOrder:
    """Pruning in order by a method, with the settings of a calibration."""
    return InOrder(
        stages,
        lambda path: method.solver(plan[path]),
        correct=how.correct if method.corrects else 0.0,
        damping=how.damping,
        store=store,
        offload=offload,
        ahead=ahead,
    )


def _at_once(
    model: Functional,
    batches: Sequence[Any],
    plan: Mapping[str, Rule],
    method: Method,
    how: Calibration,
) -> dict[str, Pruned]:
    """The pruned kernels by path, each pruned with the inputs that it has in the original model."""
    progress = how.progress
    tell = None if progress is None else lambda done: progress(done, len(batches))
    grams = collect_all(model.run, model.params, batches, tell, paths=plan)
    leaves, layers = named_leaves(model.params), model.layers(batches[0])
    done = {}
    for path in [path for path in plan if path in grams]:
        matrix = to_matrix(jnp.asarray(leaves[path]), layers[path].kernel)
        _check_inputs(path, matrix, grams[path])
        solve = functools.partial(_solved, method.solver(plan[path]), how.damping)
        pruned = for_elements(solve, matrix.shape[:-2], matrix, grams[path])
        done[path] = jax.device_get(pruned)
    return done


def _check_inputs(path: str, kernel: jax.Array, gram: jax.Array) -> None:
    """Raises a ValueError that names the layer, if its statistics are not finite."""
    if not bool(all_finite(kernel)):
        raise ValueError(f"{path}: the kernel holds inf or nan")
    if not bool(all_finite(gram)):
        raise ValueError(f"{path}: the calibration inputs hold inf or nan")


def _solved(solve: Solve, damping: float, kernel: jax.Array, gram: jax.Array) -> Pruned:
    kernel = kernel.astype(jnp.float32)
    return solve(kernel, kernel, gram, damping)

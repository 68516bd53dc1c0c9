"""Calibrated pruning of a whole model: what to calibrate on and how (`Calibration`), and `convert`, one interface for
Linen, NNX and transformers."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.prune.model.ahead import Ahead
from slidejax.prune.model.inputs import as_rows, seeing_inputs
from slidejax.prune.model.sequential import Pruned, Solve, begin, prune_in_order
from slidejax.prune.model.smooth import smooth
from slidejax.prune.model.stages import SeveralDepths, Stages
from slidejax.prune.model.store import Store, fingerprint
from slidejax.prune.rounding import round_kernel
from slidejax.prune.sparsegpt import sparsegpt
from slidejax.prune.wanda import wanda
from slidejax.rules import Prune, Report, Rule
from slidejax.weights.pattern import Pattern

__all__ = [
    "CALIBRATED",
    "Calibration",
    "calibrate",
    "collect",
    "convert",
    "cut",
    "lookup",
    "pruner",
]

# The methods that need calibration: (kernel, pattern, gram) -> mask, or (mask, kernel).
CALIBRATED: dict[str, Callable[..., Any]] = {"wanda": wanda, "sparsegpt": sparsegpt}

_SMOOTH_ON = 2  # batches that smoothing measures the channels on
_BATCH = 4  # sequences of token ids that make a batch, at most


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on, and how.

    Attributes:
      batches: token ids `[sequences, length]`, which are cut into batches; or a sequence of batches of equal shapes, each
        the model's input, or a tuple of its arguments.
      smooth: strength of `slidejax.prune.smooth`, for layers with 8-bit values; 0 leaves the activations as they are.
      in_order: whether each layer is pruned with the inputs that the pruned layers before it give; else all with those
        of the dense model.
      correct: how far layers make up for what those before them lost, 0 to 1 (`slidejax.prune.sequential`).
      damping: as in `slidejax.prune.sparsegpt`; more than for one kernel, since all layers together would follow the calibration text too
        closely (docs/accuracy.md).
      work: a folder for finished stages: a conversion that was stopped goes on from there. None: nothing is kept.
      progress: called with the numbers of stages done and of all.
      offload: keeps what the model has computed so far of each batch in the host's memory instead of the device's: of the
        dense and of the pruned model each, tokens x (width of the residual stream + inputs of the widest layer) values
        of the model's dtype. It costs a copy there and back for every stage.
    """

    batches: Any
    smooth: float = 0.7
    in_order: bool = True
    correct: float = 0.75
    damping: float = 0.3
    work: str | os.PathLike[str] | None = None
    progress: Callable[[int, int], None] | None = None
    offload: bool = False

    def as_batches(self) -> list[Any]:
        """The batches.

        Raises:
          ValueError: if there are none, or their shapes differ.
        """
        given = self.batches
        if (
            hasattr(given, "ndim")
            and np.issubdtype(given.dtype, np.integer)
            and given.ndim == 2
            and given.size
        ):
            count = max(
                n for n in range(1, _BATCH + 1) if len(given) % n == 0
            )  # batches of one shape: one program
            return np.split(np.asarray(given), len(given) // count)
        if hasattr(given, "ndim") or not isinstance(given, Sequence):
            what = (
                f"{given.dtype} {given.shape}" if hasattr(given, "ndim") else type(given).__name__
            )
            raise ValueError(
                f"calibration must be token ids [sequences, length] or a list of batches, got {what}"
            )
        shapes = {str(jax.tree.map(jnp.shape, batch)) for batch in given}
        if len(shapes) != 1:
            raise ValueError(
                f"calibration needs batches of one shape, got {', '.join(sorted(shapes)) or 'none'}"
            )
        return list(given)


def cut(ids: Any, sequences: int, length: int, seed: int | None = None) -> np.ndarray:
    """Token ids `[sequences, length]` from those of a text.

    Args:
      ids: of the whole text.
      sequences: at most so many; fewer if the text is short.
      length: of each; shorter if the text is.
      seed: the sequences are drawn from the whole text, none overlapping another; None: its beginning.

    Raises:
      ValueError: if there are fewer than two tokens.

    >>> cut(range(10), 2, 3).tolist(), cut(range(10), 2, 3, seed=0).shape
    ([[0, 1, 2], [3, 4, 5]], (2, 3))
    """
    ids = np.asarray(ids, np.int32)
    length = min(length, len(ids))
    if length < 2:
        raise ValueError(f"the text has {len(ids)} tokens, too few to calibrate on")
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    if seed is not None:
        whole = whole[np.random.default_rng(seed).permutation(len(whole))]
    return whole[:sequences]


def convert(
    model: Any,
    rules: Any,
    calibration: Any,
    *,
    params: Any = None,
    method: str = "sparsegpt",
    report: Report | None = None,
) -> Any:
    """Prunes and packs a model, calibrated; one interface for Linen, NNX and transformers.

    Args:
      model: a Flax model of transformers, a `flax.linen` module or an `flax.nnx` module. It stays as it is.
      rules: see `slidejax.rules`.
      calibration: a `Calibration`, or its batches.
      params: the variables of a Linen module; parameters to use in place of a transformers model's own.
      method: "wanda" or "sparsegpt".
      report: an empty `slidejax.Report`, filled in.

    Returns:
      What `slidejax.huggingface.convert`, `slidejax.linen.convert` (variables) or `slidejax.nnx.convert` returns.

    Raises:
      ValueError: for bad rules, an unknown method, or bad batches; if `work` holds another conversion.
      TypeError: for a model of another kind.
      NotImplementedError: if the layers run inside a loop or under `vmap`.

    >>> import flax.linen as nn
    >>> model, x = nn.Dense(4), jax.random.normal(jax.random.key(0), (64, 16))
    >>> variables = convert(model, "6:8", [x], params=model.init(jax.random.key(1), x))
    >>> variables["params"]["kernel"].shape
    (16, 4)
    """
    how = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    check_method(method)
    batches = how.as_batches()
    run, params, pack = as_function(model, params, batches[0])
    plan = planned(lambda params, **options: pack(params, rules, **options), params)
    params, prune = calibrate(run, params, batches, plan, method, how, report)
    return pack(params, rules, prune=prune, report=report)


def check_method(method: str) -> None:
    if method not in CALIBRATED:
        raise ValueError(f"method must be one of {', '.join(CALIBRATED)}, got {method!r}")


def as_function(
    model: Any, params: Any, batch: Any
) -> tuple[Callable[[Any, Any], Any], Any, Callable[..., Any]]:
    """A model of any of the three families as a function of its parameters.

    Args:
      model: see `convert`.
      params: see `convert`.
      batch: an example.

    Returns:
      `(run, params, pack)`: `run(params, batch)` calls the model; `pack(params, rules, prune=, report=)` converts it.
    """
    import flax.linen as nn
    from flax import nnx

    def arguments(batch):
        return batch if isinstance(batch, tuple) else (batch,)

    if isinstance(model, nnx.Module):
        from slidejax import nnx as ours

        call, params, rebuild = ours.functional(model)
        return (
            lambda params, batch: call(params, *arguments(batch)),
            params,
            lambda params, rules, **options: ours.convert(rebuild(params), rules, **options),
        )
    if isinstance(model, nn.Module):
        from slidejax import linen

        if params is None:
            raise ValueError("a Linen module needs params=, its variables")
        example = arguments(batch)
        return (
            lambda variables, batch: linen.apply(model, variables, *arguments(batch)),
            params,
            lambda variables, rules, **options: linen.convert(
                variables, rules, model, *example, **options
            ),
        )
    from slidejax import huggingface

    return huggingface.functional(model, params)


def planned(pack: Callable[..., Any], params: Any) -> dict[str, Rule]:
    """Path -> rule of the kernels that a conversion would pack; nothing is computed.

    Args:
      pack: `(params, report=) -> anything`, the conversion.
    """
    report = Report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the conversion itself will say it
        jax.eval_shape(lambda params: [pack(params, report=report), None][1], params)
    return {line.path: line.rule for line in report.converted if len(line.shape) == 2}


def calibrate(
    run: Callable[[Any, Any], Any],
    params: Any,
    batches: Sequence[Any],
    plan: Mapping[str, Rule],
    method: str,
    how: Calibration,
    report: Report | None = None,
) -> tuple[Any, Prune]:
    """Prunes the kernels of a model that is a function of its parameters.

    Args:
      run: `(params, batch) -> anything`.
      params: its parameters.
      batches: of one shape.
      plan: path of each kernel to prune -> its rule.
      method: "wanda" or "sparsegpt".
      how: settings; its batches are not read.
      report: gets a note of how it was done.

    Returns:
      `(params, prune)`: the parameters, smoothed where it could be done; and what conversions of them take as `prune=`.
    """
    notes = [] if report is None else report.notes
    try:
        if not how.in_order:
            raise SeveralDepths("in_order=False")
        stages = Stages(run, params, batches[0], {path: rule.qdtype for path, rule in plan.items()})
    except SeveralDepths as reason:
        notes.append(
            f"{method}, all layers with the inputs of the dense model, nothing smoothed ({reason})"
        )
        progress = how.progress
        grams = collect(
            run,
            params,
            batches,
            None if progress is None else lambda done: progress(done, len(batches)),
        )

        def prune(kernel, pattern, path):
            if path not in grams:
                raise ValueError(_NOT_REACHED)
            exact = kernel.astype(jnp.float32)
            return _for_pack(
                solver(method, plan[path])(exact, exact, grams[path], how.damping), kernel.dtype
            )

        return params, prune
    settings = (
        method,
        how.smooth,
        how.correct,
        how.damping,
        sorted((path, str(rule)) for path, rule in plan.items()),
    )
    store = (
        None if how.work is None else Store(how.work, fingerprint(params, list(batches), *settings))
    )
    correct = how.correct if method == "sparsegpt" else 0.0

    def method_of(path: str) -> Solve:
        return solver(method, plan[path])

    with Ahead() as ahead:
        begin(ahead, stages, params, method_of, correct=bool(correct), store=store)
        params, smoothed = smooth(stages, params, batches[:_SMOOTH_ON], how.smooth, ahead=ahead)
        done = prune_in_order(
            stages,
            params,
            batches,
            method_of,
            correct=correct,
            damping=how.damping,
            progress=how.progress,
            store=store,
            offload=how.offload,
            ahead=ahead,
        )
    notes.append(
        f"{method}, layer by layer in {len(stages.taps)} stages; the inputs of {len(smoothed)} layers smoothed"
    )
    return params, lookup(done)


@functools.cache
def solver(method: str, rule: Rule) -> Solve:
    """The method for kernels of one rule; for equal rules the same object, so that what was compiled for it serves again."""
    return functools.partial(_SOLVE[method], rule)


def _solve_wanda(rule: Rule, kernel, target, gram, damping) -> Pruned:
    mask = wanda(kernel, rule.pattern, gram)
    return Pruned(mask, jnp.where(mask, kernel, 0))


def _solve_sparsegpt(rule: Rule, kernel, target, gram, damping) -> Pruned:
    mask, new = sparsegpt(target, rule.pattern, gram, damping=damping)
    if rule.qdtype is None or rule.qdtype.itemsize > 1:
        return Pruned(mask, new)
    return Pruned(mask, *round_kernel(target, mask, gram, new, rule.qdtype, damping=damping))


_SOLVE: dict[str, Callable[..., Pruned]] = {"wanda": _solve_wanda, "sparsegpt": _solve_sparsegpt}
_NOT_REACHED = (
    "no calibration inputs reached this layer: leave it dense with the rule (its path, None)"
)


def _for_pack(one: Pruned, dtype) -> tuple:
    """`(mask, kernel, scale)`; a kernel that is yet to be rounded in the dtype that it had."""
    return (
        jnp.asarray(one.mask),
        jnp.asarray(one.kernel, None if one.scale is not None else dtype),
        one.scale,
    )


def lookup(done: Mapping[str, Pruned]) -> Prune:
    """The `prune=` of a conversion whose kernels are pruned already."""

    def prune(kernel: jax.Array, pattern: Pattern, path: str):
        if path not in done:
            raise ValueError(_NOT_REACHED)
        return _for_pack(done[path], kernel.dtype)

    return prune


# --- with the inputs of the dense model -------------------------------------------------------------------------------


def collect(
    run: Callable[..., Any],
    params: Any,
    batches: Any,
    progress: Callable[[int], None] | None = None,
    *,
    diagonal: bool = False,
) -> dict[str, jax.Array]:
    """Runs a model over batches and adds up the Gram matrix of the inputs of each linear layer.

    Args:
      run: `(params, batch) -> anything`, which calls the model; it is jitted.
      params: its parameters.
      batches: of equal shape, so that one program serves all.
      progress: called with the number of batches done.
      diagonal: of each matrix its diagonal alone, all that Wanda reads.

    Returns:
      Path of the layer's kernel -> float32 `[in, in]` (`[in]` for the diagonal), `x^T x` summed over all rows of all batches.
      Layers whose kernel is not a matrix (batched einsums) are left out.

    Raises:
      NotImplementedError: if layers run inside `nn.scan` or `jax.lax` loops, where each step would need a matrix of its own.
      ValueError: if there is no batch.
    """

    @jax.jit
    def grams(params, batch):
        found: dict[str, jax.Array] = {}

        def see(path, x, axes):
            if not axes.kernel_batch:
                rows = as_rows(x, axes)
                gram = (
                    jnp.sum(rows * rows, 0)
                    if diagonal
                    else jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
                )
                found[path] = gram + found[path] if path in found else gram
            return x

        with seeing_inputs(see):
            run(params, batch)
        return found

    total: dict[str, jax.Array] | None = None
    for done, batch in enumerate(batches, start=1):
        try:
            found = grams(params, batch)
        except jax.errors.UnexpectedTracerError as error:
            raise NotImplementedError(
                "calibration cannot look into layers inside nn.scan or a loop"
            ) from error
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        if progress is not None:
            jax.block_until_ready(total)
            progress(done)
    if total is None:
        raise ValueError("there is nothing to calibrate on: no batches")
    return total


def pruner(method: str, grams: dict[str, jax.Array], **options: Any) -> Prune:
    """The `prune=` of a conversion for a calibrated method and `collect`ed inputs: for any number of patterns.

    Raises:
      ValueError: for an unknown method; when called for a kernel that was not calibrated.
    """
    check_method(method)

    def prune(kernel: jax.Array, pattern: Pattern, path: str):
        if path not in grams:
            raise ValueError(f"no calibration inputs reached this layer; {method} needs them")
        if kernel.ndim != 2:
            raise ValueError(f"{method} prunes one kernel [in, out], got shape {kernel.shape}")
        return CALIBRATED[method](kernel, pattern, grams[path], **options)

    return prune

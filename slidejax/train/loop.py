"""A training loop for trees with packed weights. Masks stay, and 8-bit rounding is in the loop.

The loop trains float32 master copies (`slidejax.trainable`). The model computes in the dtype that
the tree had, and 8-bit weights run through the op that will serve them. A batch depends only on the
number of its step, so a training that was interrupted and resumed has the same result, to the bit,
as one that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.bounds import COUNT, COUNT_OR_NONE, Bound
from slidejax.files import check_path
from slidejax.kinds import check_function
from slidejax.prune.model.store import fingerprint
from slidejax.train.held_out import Guard
from slidejax.train.state import Checkpoint, Clock, State
from slidejax.train.step import loss_in_float32, make_update, mean_loss
from slidejax.variants.prepared import drop_prepared
from slidejax.variants.trainable import Selection, combine, deploy, masters, partition
from slidejax.weights.checks import check_one_process
from slidejax.weights.layout import as_array
from slidejax.weights.numerics import all_finite, dtype_of

__all__ = ["Fitted", "Shuffled", "fit"]

_POSITIVE = Bound(0, above=True)
_RANGES = {
    "steps": COUNT,
    "minutes": _POSITIVE,
    "learning_rate": _POSITIVE,
    "warmup": COUNT_OR_NONE,
    "typical": _POSITIVE,
    "accumulate": COUNT,
    "every": COUNT,
}
_OPTIONAL = ("steps", "minutes", "typical")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The result of `fit`.

    Attributes:
      params: the trained tree; its packed weights have the dtype that they will serve with.
      steps: the number of updates, with those of the earlier runs that this one continued.
      seconds: the time of the training in seconds, with compilation and earlier runs.
      losses: float32 `[steps]`, the loss of each step before its update.
      checked: pairs of a step and the loss on the held-out batch after it, from step 0 on; empty
        without such a batch.
      kept: the step after which `params` were as they are.
    """

    params: Any
    steps: int
    seconds: float
    losses: np.ndarray
    checked: tuple[tuple[int, float], ...] = ()
    kept: int = 0


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Batches of rows, in a new random order for each epoch; `fit` takes this as `batches`.

    Args:
      rows: `[n, ...]`.
      size: the number of rows in a batch, at most n.
      seed: the seed of the order.

    Raises:
      ValueError: if there are no rows, or `size` is not in 1..n.

    >>> batches = Shuffled(np.arange(4), size=2)
    >>> sorted(batches(0).tolist() + batches(1).tolist())
    [0, 1, 2, 3]
    >>> batches(7).tolist() == batches(7).tolist()
    True
    """

    rows: np.ndarray
    size: int
    seed: int = 0

    def __post_init__(self):
        masked = isinstance(self.rows, np.ma.MaskedArray)  # its mask would be lost
        if masked or not getattr(self.rows, "shape", ()):
            raise TypeError(f"rows must be an array [n, ...], got {type(self.rows).__name__}")
        COUNT.check(self.size, "size")
        Bound(0, 2**63, whole=True).check(self.seed, "seed")
        if not 1 <= self.size <= len(self.rows):
            raise ValueError(
                f"size must be in 1..{len(self.rows)}, the number of rows, got {self.size}"
            )

    def __call__(self, step: int) -> np.ndarray:
        # The last rows of an epoch may fill no batch: they are left out, and the next epoch has
        # another order.
        epoch, batch = divmod(step, len(self.rows) // self.size)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        return self.rows[order[batch * self.size : (batch + 1) * self.size]]


def schedule(step: int, total: int, peak: float, warmup: int) -> float:
    """The learning rate of a step: linear warm-up, then half a cosine down to zero at `total`.

    Args:
      step: the number of the step, from 0.
      total: the number of all steps.
      peak: the learning rate at the end of the warm-up.
      warmup: the number of steps of the warm-up.

    >>> [round(schedule(s, 12, 1.0, 2), 2) for s in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warm = (step + 1) / max(warmup, 1)
    share = min(max(step - warmup, 0) / max(total - warmup, 1), 1)
    return peak * min(warm, 0.5 * (1 + math.cos(math.pi * share)))


def fit(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    batches: Callable[[int], Any],
    *args: Any,
    steps: int | None = None,
    minutes: float | None = None,
    qdtype: Any = None,
    trained: Selection = None,
    learning_rate: float = 3e-4,
    warmup: int = 20,
    typical: float | None = None,
    optimizer: Any = None,
    accumulate: int = 1,
    held_out: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 200,
    progress: Callable[[int, int | None, float], None] | None = None,
) -> Fitted:
    """Minimises a loss over a tree of parameters in which kernels may be packed.

    Args:
      loss_fn: `(params, batch, *args) -> scalar`. It runs the model (`slidejax.linen.apply`, a
        converted model's `__call__`, an NNX model from `nnx.merge`) and is jitted. The tree that it
        gets has master weights in the place of 8-bit ones. Layers compute with them exactly as
        `slidejax.linear` will compute with the result.
      params: the tree. 8-bit `SlideWeight`s are trained as float32 masters and come back in 8 bit.
      batches: a function from the number of a step to its batch, a pytree of arrays: `Shuffled`, or
        a function of your own.
      *args: further arguments of `loss_fn`, such as a teacher's parameters. In a closure they would
        be constants of the compiled program.
      steps: the number of updates. The same arguments give the same result, to the bit.
      minutes: may be given in place of `steps`: as many updates as fit into that time, with
        compilation. Their number is known after the first few; `Fitted.steps` has it at the end.
      qdtype: int8 or float8_e4m3fn, for float-packed weights that will be quantised; None leaves
        them unquantised.
      trained: the leaves to train (`slidejax.partition`); None trains all floating ones.
      learning_rate: the peak of the learning rate, which rises linearly for `warmup` steps and then
        falls to zero along half a cosine.
      warmup: the number of steps of the warm-up.
      typical: the root mean square of values for which the learning rate is meant. Leaves that
        begin with smaller values take smaller steps in proportion, down to a hundredth. None: all
        leaves take equal steps.
      optimizer: an optax transformation with its own learning rate, in place of Adam with that
        schedule.
      accumulate: the number of parts that each batch is cut into along its first axis. Their
        gradients are averaged, which takes less memory.
      held_out: a batch that is not trained on, cut into as many parts. The loss on it is measured
        before the first step, up to 20 times on the way, and after the last step. The result is
        the parameters for which it was lowest: never worse, on this batch, than the start. Where
        more than half of what was won is lost again, the training goes back to these, and goes on
        with half the learning rate; with an `optimizer` of your own it does not. It takes 4 more
        bytes a trained value. None: the result is that of the last step.
      checkpoint: a directory for the state of the training. If it holds a state, the training goes
        on from there, if it is the same training: settings, parameters, held-out rows and batches
        are compared by hashes. What a `loss_fn` or an `optimizer` computes is not. Parameters that
        are spread over several processes have none, and no minutes.
      every: the number of steps between saved states. The last state is always saved.
      progress: called after each step with the number of steps done, the number of all steps (None
        while it is unknown), and the loss.

    Returns:
      A `Fitted`.

    Raises:
      TypeError: naming it, if an argument is of another kind.
      ValueError: if a number is out of range or arguments do not fit each other, the loss is not
        finite, or the checkpoint belongs to another training; what differs is named.
      OSError: if the checkpoint cannot be written. That is tried before the first step, too.
      ImportError: if optax is missing.

    >>> import slidejax as sj
    >>> x = np.asarray(jax.random.normal(jax.random.key(0), (64, 16)))
    >>> w = sj.pack(jax.random.normal(jax.random.key(1), (16, 4)), "6:8", dtype="int8")
    >>> loss = lambda params, x: jnp.mean((sj.linear(x, params) - x[:, :4]) ** 2)
    >>> fitted = fit(loss, w, Shuffled(x, 32), steps=50, learning_rate=3e-2)
    >>> fitted.params.dtype.name, bool(fitted.losses[-1] < fitted.losses[0])
    ('int8', True)
    """
    clock = Clock()
    check_function(loss_fn, "loss_fn")
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint")
    for leaf in jax.tree.leaves(held_out):
        as_array(leaf, "held_out")
    checked = _check(
        batches,
        optimizer,
        progress,
        steps=steps,
        minutes=minutes,
        learning_rate=learning_rate,
        warmup=warmup,
        typical=typical,
        accumulate=accumulate,
        every=every,
    )
    # Numbers of NumPy are none that a checkpoint can note.
    steps, minutes, learning_rate, warmup, typical, accumulate, every = checked.values()
    if checkpoint is not None or minutes is not None:
        # Each process has its own clock and its own part of the state.
        flag = "checkpoint" if checkpoint is not None else "minutes"
        check_one_process(params, f"fit with {flag} runs in one process, and params", copies=False)
    tree = masters(params, qdtype)
    train, rest = partition(tree, trained)
    if not jax.tree.leaves(train):
        raise ValueError("params have nothing to train: no floating array and no packed weight")
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, train)
    # Copies, because each step gives their memory to the next.
    train = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), train)
    transform, sizes = _optimizer(optimizer), _step_sizes(train, typical)
    state = State(train, transform.init(train), 0, steps)
    store = None
    if checkpoint is not None:
        settings = {
            "learning_rate": learning_rate,
            "warmup": warmup,
            "accumulate": accumulate,
            "steps": steps,
            "minutes": minutes,
            "optimizer": None if optimizer is None else "own",
            "typical": typical,
            "held_out": held_out is not None,
        }
        data = {
            "params": fingerprint(drop_prepared(tree)),
            "qdtype": str(dtype_of(qdtype)),
            "trained": fingerprint([str(path) for path, _ in jax.tree.leaves_with_path(train)]),
            "args": fingerprint(drop_prepared(args)),
            "held_out": fingerprint(held_out),
            "batches": fingerprint(vars(batches)) if isinstance(batches, Shuffled) else None,
        }
        store = Checkpoint(Path(checkpoint), train, dtypes, settings, data, batches)
        state = store.load(state, clock)
        store.check(state)
    loss_of = loss_in_float32(loss_fn, dtypes)
    update = make_update(loss_of, transform, accumulate, scheduled=optimizer is None)
    guard = None
    if held_out is not None:
        measure = jax.jit(functools.partial(mean_loss, loss_of, parts=accumulate))
        guard = Guard(lambda train: measure(train, rest, held_out, args), back=optimizer is None)
    training = _Training(clock, state, store, guard, learning_rate, warmup, minutes, every)
    training.check_held_out()
    while training.goes_on():
        batch, rate = batches(state.step), training.rate()
        state.train, state.memory, loss = update(
            state.train, state.memory, rest, batch, args, rate, sizes
        )
        training.note(batch, loss, progress)
    best = state.train if guard is None else state.kept.best
    trained_tree = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), best, dtypes)
    made = jax.block_until_ready(deploy(combine(trained_tree, rest)))
    found = tuple(state.kept.checked)
    return Fitted(
        params=made,
        steps=state.step,
        seconds=clock.seconds(),
        losses=np.asarray([float(loss) for loss in state.losses], np.float32),
        checked=found,
        kept=state.kept.lowest()[0] if found else state.step,
    )


@dataclasses.dataclass(frozen=True)
class _Training:
    """The state of a training, and what happens between its steps.

    Attributes:
      clock, state, store, guard: its parts; without a checkpoint there is no store, and without a
        held-out batch no guard.
      learning_rate, warmup, minutes, every: arguments of `fit`.
    """

    clock: Clock
    state: State
    store: Checkpoint | None
    guard: Guard | None
    learning_rate: float
    warmup: int
    minutes: float | None
    every: int

    def goes_on(self) -> bool:
        """Whether there is another step."""
        return self.state.total is None or self.state.step < self.state.total

    def rate(self) -> np.float32:
        """The learning rate of the next step."""
        # While the number of steps is unknown the steps are in the warm-up, which does not depend
        # on it.
        total, peak = self.state.total or 10**9, self.learning_rate * self.state.kept.scale
        return np.float32(schedule(self.state.step, total, peak, self.warmup))

    def check_held_out(self) -> None:
        """Measures the loss on the held-out batch, where a check is due."""
        state = self.state
        if self.guard is not None and self.guard.due(state.kept, state.step, state.total):
            state.train = self.guard.check(state.kept, state.step, state.train)

    def note(self, batch: Any, loss: jax.Array, progress: Callable[..., None] | None) -> None:
        """Counts a step, shows its progress, and checks and saves what is due after it."""
        state = self.state
        if self.store is not None:
            self.store.saw(state.step, batch)
        state.losses.append(loss)
        state.step += 1
        if state.total is None and self.minutes is not None:
            checks = self.guard is not None
            state.total = self.clock.steps_in(self.minutes, state.step, loss, checks)
        # The loss of the previous step: waiting for this one would leave the device idle.
        at = max(len(state.losses) - 2, 0)
        shown = _finite_loss(state.losses, at, self.learning_rate)
        if progress is not None:
            progress(state.step, state.total, shown)
        self.check_held_out()
        due = self.store is not None and state.step % self.every == 0
        if due or state.step == state.total:  # what is kept must be good: a wait does not matter
            self._keep()

    def _keep(self) -> None:
        """Saves the state, if there is a checkpoint; ValueError if it is not finite."""
        state = self.state
        _finite_loss(state.losses, -1, self.learning_rate)
        if not all_finite(state.train):
            raise ValueError(
                f"parameters are not finite after step {state.step}: lower learning_rate "
                f"({self.learning_rate}), or look at the model"
            )
        if self.store is not None:
            self.store.save(state, self.clock)


def _finite_loss(losses: list[Any], at: int, learning_rate: float) -> float:
    """The loss of a step; ValueError if it is not finite."""
    loss = float(losses[at])
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} at step {range(len(losses))[at] + 1}: lower learning_rate "
            f"({learning_rate}), or look at the model and its batches"
        )
    return loss


_LEAST_STEP = 0.01  # of the learning rate, so that a leaf of zeros can be trained


def _step_sizes(train: Any, typical: float | None) -> Any:
    """The share of the learning rate that each leaf takes: see `fit`.

    Adam changes all values by about the learning rate. For a model whose kernels have a tenth of
    another model's values, that is ten times the change.
    """
    if typical is None:
        return jax.tree.map(lambda leaf: np.float32(1), train)

    def share(leaf: jax.Array) -> np.float32:
        size = float(jnp.sqrt(jnp.mean(leaf.astype(jnp.float32) ** 2)))
        return np.float32(min(max(size / typical, _LEAST_STEP), 1))

    return jax.tree.map(share, train)


def _check(batches: Any, optimizer: Any, progress: Any, **numbers: Any) -> dict[str, Any]:
    """The numbers, as those of Python.

    Raises ValueError or TypeError for arguments of `fit` that cannot be right.
    """
    steps, minutes, typical = (numbers[name] for name in _OPTIONAL)
    if (steps is None) == (minutes is None):
        raise ValueError(f"give either steps or minutes, got steps={steps} and minutes={minutes}")
    numbers = {
        name: None if value is None and name in _OPTIONAL else _RANGES[name].check(value, name)
        for name, value in numbers.items()
    }
    if not callable(batches):
        raise TypeError(f"batches must be a function of a step's number, got {batches!r:.60}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function or None, got {progress!r:.60}")
    if optimizer is not None and not hasattr(optimizer, "update"):
        raise TypeError(f"optimizer must be a transformation of optax, got {optimizer!r:.60}")
    if typical is not None and optimizer is not None:
        raise ValueError(
            f"typical is for the learning rate of fit, got {typical} with an optimizer of your own"
        )
    return numbers


def _optimizer(own: Any) -> Any:
    """The user's transformation, or Adam without a learning rate, with clipped gradients."""
    try:
        import optax
    except ImportError as e:
        raise ImportError("training needs the extra: pip install 'slidejax[train]'") from e
    return (
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95))
        if own is None
        else own
    )

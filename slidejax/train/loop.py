"""A training loop for trees with packed weights. Masks stay, and 8-bit rounding is in the loop.

The loop trains float32 master copies (`slidejax.trainable`). The model computes in the dtype that
the tree had, and 8-bit weights run through the op that will serve them. A batch depends only on the
number of its step, so a training that was interrupted and resumed has the same result, to the bit,
as one that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.variants.trainable import Selection, combine, deploy, masters, partition
from slidejax.weights.checks import check_one_process

__all__ = ["Fitted", "Shuffled", "fit"]

# This many steps are timed, after compilation, to find how many fit into the minutes.
_TIMED = 8


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The result of `fit`.

    Attributes:
      params: the trained tree; its packed weights have the dtype that they will serve with.
      steps: the number of updates, with those of the earlier runs that this one continued.
      seconds: the time of the training in seconds, with compilation and earlier runs.
      losses: float32 `[steps]`, the loss of each step before its update.
    """

    params: Any
    steps: int
    seconds: float
    losses: np.ndarray


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
      checkpoint: a directory for the state of the training. If it holds a state, the training goes
        on from there. Parameters that are spread over several processes have none, and no minutes.
      every: the number of steps between saved states. The last state is always saved.
      progress: called after each step with the number of steps done, the number of all steps (None
        while it is unknown), and the loss.

    Returns:
      A `Fitted`.

    Raises:
      ValueError: if arguments do not fit each other, the checkpoint belongs to another training, or
        the loss is not finite.
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
    clock = _Clock()
    _check(steps, minutes, accumulate, warmup, learning_rate, typical, optimizer)
    if checkpoint is not None or minutes is not None:
        # Each process has its own clock and its own part of the state.
        flag = "checkpoint" if checkpoint is not None else "minutes"
        check_one_process(params, f"fit with {flag} runs in one process, and params", copies=False)
    train, rest = partition(masters(params, qdtype), trained)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, train)
    # Copies, because each step gives their memory to the next.
    train = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), train)
    transform, sizes = _optimizer(optimizer), _step_sizes(train, typical)
    state = _State(train, transform.init(train), 0, steps)
    own = None if optimizer is None else "own"
    settings = [learning_rate, warmup, accumulate, steps, minutes, own, typical]
    store = None if checkpoint is None else _Checkpoint(Path(checkpoint), train, dtypes, settings)
    if store is not None:
        state = store.load(state, clock)
        store.check(state)
    update = _make_update(loss_fn, dtypes, transform, accumulate, scheduled=optimizer is None)
    losses: list[Any] = state.losses
    while state.total is None or state.step < state.total:
        # While the number of steps is unknown the steps are in the warm-up, which does not depend
        # on it.
        rate = np.float32(schedule(state.step, state.total or 10**9, learning_rate, warmup))
        state.train, state.memory, loss = update(
            state.train, state.memory, rest, batches(state.step), args, rate, sizes
        )
        losses.append(loss)
        state.step += 1
        if state.total is None and minutes is not None:
            state.total = clock.steps_in(minutes, state.step, loss)
        # The loss of the previous step: waiting for this one would leave the device idle.
        at = max(len(losses) - 2, 0)
        shown = _finite_loss(losses, at, learning_rate)
        if progress is not None:
            progress(state.step, state.total, shown)
        due = store is not None and state.step % every == 0
        if due or state.step == state.total:  # what is kept must be good: a wait does not matter
            _finite_loss(losses, -1, learning_rate)
            if not _all_finite(state.train):
                raise ValueError(
                    f"parameters are not finite after step {state.step}: lower learning_rate "
                    f"({learning_rate}), or look at the model"
                )
            if store is not None:
                store.save(state, clock)
    trained_tree = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), state.train, dtypes)
    made = jax.block_until_ready(deploy(combine(trained_tree, rest)))
    return Fitted(
        made, state.step, clock.seconds(), np.asarray([float(loss) for loss in losses], np.float32)
    )


def _finite_loss(losses: list[Any], at: int, learning_rate: float) -> float:
    """The loss of a step; ValueError if it is not finite."""
    loss = float(losses[at])
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} at step {range(len(losses))[at] + 1}: lower learning_rate "
            f"({learning_rate}), or look at the model and its batches"
        )
    return loss


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    """Whether a tree of floating arrays holds neither inf nor nan."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _make_update(
    loss_fn: Callable[..., jax.Array], dtypes: Any, transform: Any, accumulate: int, scheduled: bool
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """The jitted step.

    Args:
      loss_fn: as `fit` takes it.
      dtypes: a tree like the trained one: the dtypes in which the model computes.
      transform: the optax transformation.
      accumulate: the number of parts that a batch is cut into.
      scheduled: multiply the change by the learning rate of the step; else the transformation does
        that itself.

    Returns:
      `(train, memory, rest, batch, args, rate, sizes) -> (train, memory, loss)`; the first two
      arguments are donated.
    """

    def loss_of(train, rest, batch, args):
        cast = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), train, dtypes)
        return loss_fn(combine(cast, rest), batch, *args).astype(jnp.float32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(train, memory, rest, batch, args, rate, sizes):
        loss, gradient = _gradient(loss_of, train, rest, batch, args, accumulate)
        change, memory = transform.update(gradient, memory, train)
        if scheduled:
            change = jax.tree.map(lambda c, size: -rate * size * c, change, sizes)
        return jax.tree.map(jnp.add, train, change), memory, loss

    return update


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


def _check(steps, minutes, accumulate, warmup, learning_rate, typical, optimizer) -> None:
    """Raises ValueError for arguments of `fit` that cannot be right."""
    if (steps is None) == (minutes is None):
        raise ValueError(f"give either steps or minutes, got steps={steps} and minutes={minutes}")
    for name, value in (
        ("steps", steps),
        ("minutes", minutes),
        ("accumulate", accumulate),
        ("learning_rate", learning_rate),
        ("typical", typical),
    ):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup}")
    if typical is not None and optimizer is not None:
        raise ValueError(
            f"typical is for the learning rate of fit, got {typical} with an optimizer of your own"
        )


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


def _gradient(loss_of, train, rest, batch, args, parts: int):
    """The loss and its gradient, averaged over parts of the batch that run one after the other."""
    value_and_grad = jax.value_and_grad(loss_of)
    if parts == 1:
        return value_and_grad(train, rest, batch, args)

    def cut(leaf):
        if leaf.shape[0] % parts:
            raise ValueError(f"accumulate={parts} does not divide a batch of {leaf.shape[0]}")
        return leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:])

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(train, rest, part, args)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, train))
    total, _ = jax.lax.scan(add, zero, jax.tree.map(cut, batch))
    return jax.tree.map(lambda leaf: leaf / parts, total)


# --- time and state


class _Clock:
    """Measures the seconds of a training, over all runs of it."""

    def __init__(self):
        self._begin = time.perf_counter()
        self._compiled: float | None = None

    def seconds(self) -> float:
        """The seconds until now."""
        return time.perf_counter() - self._begin

    def resume(self, seconds: float) -> None:
        """Adds the seconds of earlier runs."""
        self._begin -= seconds

    def steps_in(self, minutes: float, done: int, loss: jax.Array) -> int | None:
        """The number of steps that fit into the minutes, or None while too few steps were timed."""
        if self._compiled is None:
            jax.block_until_ready(loss)
            self._compiled = self.seconds()
            self._first = done
        timed = done - self._first
        # Slow steps may take half of the time before enough of them are timed: then these few
        # decide.
        if timed == 0 or (timed < _TIMED and self.seconds() < 30 * minutes):
            return None
        jax.block_until_ready(loss)
        each = (self.seconds() - self._compiled) / timed
        return done + max(0, int((60 * minutes - self.seconds()) / each))


@dataclasses.dataclass
class _State:
    """The state of a training: masters, optimiser's memory, steps done, all steps, and losses."""

    train: Any
    memory: Any
    step: int
    total: int | None
    losses: list[Any] = dataclasses.field(default_factory=list)


class _Checkpoint:
    """The state of a training in a directory, written whole or not at all."""

    def __init__(self, path: Path, train: Any, dtypes: Any, settings: list[Any]):
        """`settings` and the leaves of `train` say which training the state belongs to."""
        leaves = zip(jax.tree.leaves(train), jax.tree.leaves(dtypes), strict=True)
        named = [[list(leaf.shape), np.dtype(dtype).name] for leaf, dtype in leaves]
        self._path = path
        self._run = json.dumps({"leaves": named, "settings": settings})

    def check(self, state: _State) -> None:
        """Raises before the first step what would keep the state from being saved after it."""
        from slidejax.checkpoint import staging, store

        arrays = jax.tree.leaves((state.train, state.memory))
        size = sum(jnp.asarray(leaf).nbytes for leaf in arrays)
        staging.check_writing(self._path, store.METADATA, size, "checkpoint")

    def save(self, state: _State, clock: _Clock) -> None:
        """Writes the state in the place of the one that was saved before."""
        from slidejax.checkpoint import store

        content = {
            "run": self._run,
            "step": state.step,
            "total": state.total,
            "seconds": clock.seconds(),
            "losses": np.asarray([float(loss) for loss in state.losses], np.float32),
            "train": jax.tree.leaves(state.train),
            "memory": jax.tree.leaves(state.memory),
        }
        store.save(self._path, content)

    def load(self, state: _State, clock: _Clock) -> _State:
        """The saved state, in the form of `state`; `state` itself if nothing was saved."""
        from slidejax.checkpoint import store

        if not (self._path / store.METADATA).is_file():
            return state
        saved = store.load(self._path)
        if not isinstance(saved, dict) or saved.get("run") != self._run:
            raise ValueError(
                f"checkpoint {str(self._path)!r} is of a training with other parameters or "
                "settings: name another directory"
            )
        keys = ("step", "total", "seconds", "losses")
        step, total, seconds, losses = (saved.get(key) for key in keys)
        for key, good in (
            ("step", type(step) is int and step >= 0),
            ("total", total is None or (type(total) is int and total >= 0)),
            ("seconds", isinstance(seconds, float) and 0 <= seconds < math.inf),
            ("losses", getattr(losses, "shape", None) == (step,)),
        ):
            if not good:
                raise ValueError(f"checkpoint {str(self._path)!r}: key {key!r} is damaged")
        train = self._like(state.train, saved, "train")
        memory = self._like(state.memory, saved, "memory")
        if not _all_finite(train):
            raise ValueError(
                f"checkpoint {str(self._path)!r} holds parameters that are not finite: remove it"
            )
        assert isinstance(step, int) and isinstance(seconds, float)
        clock.resume(seconds)
        return _State(train, memory, step, total, list(np.asarray(losses)))

    def _like(self, tree: Any, saved: dict[str, Any], key: str) -> Any:
        """The saved leaves under a key, in the form of a tree."""
        leaves, expected = saved.get(key), jax.tree.leaves(tree)
        kinds = [(np.shape(leaf), jnp.asarray(leaf).dtype) for leaf in expected]
        if not isinstance(leaves, list) or kinds != [
            (np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves
        ]:
            raise ValueError(
                f"checkpoint {str(self._path)!r}: key {key!r} does not fit this training"
            )
        return jax.tree.unflatten(jax.tree.structure(tree), [jnp.asarray(leaf) for leaf in leaves])

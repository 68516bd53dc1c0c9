"""A training loop for trees with packed weights: masks kept, 8-bit rounding in the loop, resumable to the bit.

What is trained are float32 master copies (`slidejax.trainable`); everything is computed in the dtype that the tree had, and
8-bit weights through the op that will serve them. Batches depend on the number of the step alone, so a run that was
interrupted and resumed is the run that was not.
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

__all__ = ["Fitted", "Shuffled", "fit"]

# Steps that are timed, once compiled, to find how many fit into the minutes.
_TIMED = 8


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` made.

    Attributes:
      params: the tree that was passed in, trained; its packed weights have the dtype that they will serve with.
      steps: updates made, those of earlier runs that were resumed included.
      seconds: the time they took, compilation and earlier runs included.
      losses: float32 `[steps]`, the loss of each step before its update.
    """

    params: Any
    steps: int
    seconds: float
    losses: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Batches of rows in an order drawn anew for each epoch: what `fit` takes as `batches`.

    Args:
      rows: `[n, ...]`.
      size: rows in a batch, at most n.
      seed: of the order.

    Raises:
      ValueError: no rows, or a size that is not in 1..n.

    >>> batches = Shuffled(np.arange(4), size=2)
    >>> sorted(batches(0).tolist() + batches(1).tolist()), batches(7).tolist() == batches(7).tolist()
    ([0, 1, 2, 3], True)
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
        # rows that fill no batch wait for the next epoch, whose order is another
        epoch, batch = divmod(step, len(self.rows) // self.size)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        return self.rows[order[batch * self.size : (batch + 1) * self.size]]


def schedule(step: int, total: int, peak: float, warmup: int) -> float:
    """The learning rate of a step: linear warm-up, then half a cosine down to zero at `total`.

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
    optimizer: Any = None,
    accumulate: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 200,
    progress: Callable[[int, int | None, float], None] | None = None,
) -> Fitted:
    """Minimises a loss over a tree of parameters in which kernels may be packed.

    Args:
      loss_fn: `(params, batch, *args) -> scalar`, which runs the model (`slidejax.linen.apply`, a converted model's
        `__call__`, an NNX model from `nnx.merge`); it is jitted. The tree it gets has master weights in the place of 8-bit
        ones: layers run them as `slidejax.linear` will run what is returned.
      params: the tree. 8-bit `SlideWeight`s are trained as float32 masters and come back in 8 bit.
      batches: number of the step -> its batch, a pytree of arrays: `Shuffled`, or a function of your own.
      *args: further arguments of `loss_fn`, such as a teacher's parameters; inside a closure they would be constants of
        the compiled program.
      steps: how many updates; with the same arguments, the same result to the bit.
      minutes: in place of `steps`: as many as fit into that time, compilation included. They are counted out after
        the first few, and `Fitted.steps` says how many it were.
      qdtype: int8 or float8_e4m3fn, for float-packed weights that will be quantised; None leaves them unquantised.
      trained: which leaves to train (`slidejax.partition`); None: all that are floating.
      learning_rate: its peak: linear warm-up over `warmup` steps, then half a cosine down to zero.
      warmup: see there.
      optimizer: an optax transformation with a learning rate of its own, in place of Adam with that schedule.
      accumulate: cut each batch into so many parts along its first axis, and average their gradients: less memory.
      checkpoint: a directory for the state of the training; if it holds one, the run goes on from there.
      every: save it after so many steps; it is saved at the end too.
      progress: called after each step with the steps done, how many there will be (None: not known yet), and the loss.

    Returns:
      A `Fitted`.

    Raises:
      ValueError: for arguments that do not fit each other; a checkpoint of another run; a loss that is not finite.
      ImportError: optax is missing.

    >>> import slidejax as sj
    >>> x = np.asarray(jax.random.normal(jax.random.key(0), (64, 16)))
    >>> w = sj.pack(jax.random.normal(jax.random.key(1), (16, 4)), "6:8", dtype="int8")
    >>> loss = lambda params, x: jnp.mean((sj.linear(x, params) - x[:, :4]) ** 2)
    >>> fitted = fit(loss, w, Shuffled(x, 32), steps=50, learning_rate=3e-2)
    >>> fitted.params.dtype.name, bool(fitted.losses[-1] < fitted.losses[0])
    ('int8', True)
    """
    clock = _Clock()
    _check(steps, minutes, accumulate, warmup, learning_rate)
    train, rest = partition(masters(params, qdtype), trained)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, train)
    # Copies, because each step gives their memory to the next.
    train = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), train)
    transform = _optimizer(optimizer)
    state = _State(train, transform.init(train), 0, steps)
    own = None if optimizer is None else "own"
    settings = [learning_rate, warmup, accumulate, steps, minutes, own]
    store = None if checkpoint is None else _Checkpoint(Path(checkpoint), train, dtypes, settings)
    if store is not None:
        state = store.load(state, clock)
    update = _make_update(loss_fn, dtypes, transform, accumulate, scheduled=optimizer is None)
    losses: list[Any] = state.losses
    while state.total is None or state.step < state.total:
        # While the number of steps is unknown the steps are in the warm-up, which does not depend on it.
        rate = np.float32(schedule(state.step, state.total or 10**9, learning_rate, warmup))
        state.train, state.memory, loss = update(
            state.train, state.memory, rest, batches(state.step), args, rate
        )
        losses.append(loss)
        state.step += 1
        if state.total is None and minutes is not None:
            state.total = clock.steps_in(minutes, state.step, loss)
        # The loss of the previous step: waiting for this one would leave the device idle.
        shown = float(losses[-2] if len(losses) > 1 else loss)
        if not math.isfinite(shown):
            raise ValueError(
                f"the loss is {shown} at step {len(losses) - 1}: lower learning_rate ({learning_rate}), or look at the model"
            )
        if progress is not None:
            progress(state.step, state.total, shown)
        if store is not None and (state.step % every == 0 or state.step == state.total):
            store.save(state, clock)
    trained_tree = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), state.train, dtypes)
    made = jax.block_until_ready(deploy(combine(trained_tree, rest)))
    return Fitted(
        made, state.step, clock.seconds(), np.asarray([float(loss) for loss in losses], np.float32)
    )


def _make_update(
    loss_fn: Callable[..., jax.Array], dtypes: Any, transform: Any, accumulate: int, scheduled: bool
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """The jitted step.

    Args:
      loss_fn: as `fit` takes it.
      dtypes: a tree like the trained one: the dtypes in which the model computes.
      transform: the optax transformation.
      accumulate: the number of parts that a batch is cut into.
      scheduled: multiply the change by the learning rate of the step; else the transformation does that itself.

    Returns:
      `(train, memory, rest, batch, args, rate) -> (train, memory, loss)`; the first two arguments are donated.
    """

    def loss_of(train, rest, batch, args):
        cast = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), train, dtypes)
        return loss_fn(combine(cast, rest), batch, *args).astype(jnp.float32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(train, memory, rest, batch, args, rate):
        loss, gradient = _gradient(loss_of, train, rest, batch, args, accumulate)
        change, memory = transform.update(gradient, memory, train)
        if scheduled:
            change = jax.tree.map(lambda c: -rate * c, change)
        return jax.tree.map(jnp.add, train, change), memory, loss

    return update


def _check(steps, minutes, accumulate, warmup, learning_rate) -> None:
    if (steps is None) == (minutes is None):
        raise ValueError(f"give either steps or minutes, got steps={steps} and minutes={minutes}")
    for name, value in (
        ("steps", steps),
        ("minutes", minutes),
        ("accumulate", accumulate),
        ("learning_rate", learning_rate),
    ):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup}")


def _optimizer(own: Any) -> Any:
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
    """The loss and its gradient, averaged over parts of the batch that are run one after the other."""
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


# --- time and state ---------------------------------------------------------------------------------------------------


class _Clock:
    """Seconds of training, over all the runs that one was resumed from."""

    def __init__(self):
        self._begin = time.perf_counter()
        self._compiled: float | None = None

    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def resume(self, seconds: float) -> None:
        self._begin -= seconds

    def steps_in(self, minutes: float, done: int, loss: jax.Array) -> int | None:
        """How many steps will fit into that many minutes, or None while too few were timed."""
        if self._compiled is None:
            jax.block_until_ready(loss)
            self._compiled = self.seconds()
            self._first = done
        timed = done - self._first
        if timed == 0 or (
            timed < _TIMED and self.seconds() < 30 * minutes
        ):  # half of the time, so slow are they
            return None
        jax.block_until_ready(loss)
        each = (self.seconds() - self._compiled) / timed
        return done + max(0, int((60 * minutes - self.seconds()) / each))


@dataclasses.dataclass
class _State:
    """Where a training stands."""

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

    def save(self, state: _State, clock: _Clock) -> None:
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
        """The saved state in the form of a fresh one; the fresh one if there is none."""
        from slidejax.checkpoint import store

        if not (self._path / store.METADATA).is_file():
            return state
        saved = store.load(self._path)
        if not isinstance(saved, dict) or saved.get("run") != self._run:
            raise ValueError(
                f"checkpoint {str(self._path)!r} is of a training with other parameters or settings: name another directory"
            )

        def like(tree, leaves):
            return jax.tree.unflatten(
                jax.tree.structure(tree), [jnp.asarray(leaf) for leaf in leaves]
            )

        clock.resume(saved["seconds"])
        losses = list(np.asarray(saved["losses"]))
        return _State(
            like(state.train, saved["train"]),
            like(state.memory, saved["memory"]),
            saved["step"],
            saved["total"],
            losses,
        )

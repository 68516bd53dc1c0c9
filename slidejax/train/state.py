"""The memory of a training: its clock, and its state, in memory and in a directory."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.prune.model.store import fingerprint
from slidejax.train.held_out import Kept, steps_beside_checks
from slidejax.weights.numerics import all_finite

__all__ = ["Checkpoint", "Clock", "State"]

# This many steps are timed, after compilation, to find how many fit into the minutes.
_TIMED = 8


class Clock:
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

    def steps_in(self, minutes: float, done: int, loss: jax.Array, checks: bool) -> int | None:
        """The number of steps that fit into the minutes, or None while too few steps were timed.

        Args:
          minutes: the time of the whole training.
          done: the steps done.
          loss: the loss of the last of them.
          checks: leave time for checks on a held-out batch.
        """
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
        fitting = max(0.0, (60 * minutes - self.seconds()) / each)
        return done + (steps_beside_checks(fitting) if checks else int(fitting))


@dataclasses.dataclass
class State:
    """The state of a training.

    Attributes:
      train, memory: the masters, and the optimiser's memory.
      step, total: the steps done, and all steps (None while that is unknown).
      losses: the loss of each step.
      kept: what the checks on a held-out batch have found.
    """

    train: Any
    memory: Any
    step: int
    total: int | None
    losses: list[Any] = dataclasses.field(default_factory=list)
    kept: Kept = dataclasses.field(default_factory=Kept)


class Checkpoint:
    """The state of a training in a directory, written whole or not at all.

    Args:
      path: the directory.
      train: the masters before the first step.
      dtypes: a tree like `train`: the dtypes in which the model computes.
      settings: the numbers of the training by name.
      data: hashes of the parts of the training, by name. None is not compared.
      batches: a function from the number of a step to its batch.
    """

    def __init__(
        self,
        path: Path,
        train: Any,
        dtypes: Any,
        settings: Mapping[str, Any],
        data: Mapping[str, str | None],
        batches: Callable[[int], Any],
    ):
        leaves = zip(jax.tree.leaves(train), jax.tree.leaves(dtypes), strict=True)
        self._leaves = [[list(leaf.shape), np.dtype(dtype).name] for leaf, dtype in leaves]
        self._path, self._settings, self._data = path, settings, dict(data)
        self._batches, self._last = batches, None

    def check(self, state: State) -> None:
        """Raises before the first step what would keep the state from being saved after it."""
        from slidejax.checkpoint import staging, store

        arrays = jax.tree.leaves((state.train, state.memory, state.kept.best))
        size = sum(jnp.asarray(leaf).nbytes for leaf in arrays)
        staging.check_writing(self._path, store.METADATA, size, "checkpoint")

    def saw(self, step: int, batch: Any) -> None:
        """Remembers the batch of a step. The first one and the last one stand for all."""
        if step == 0:
            self._data["batch 0"] = fingerprint(batch)
        self._last = batch

    def save(self, state: State, clock: Clock) -> None:
        """Writes the state in the place of the one that was saved before."""
        from slidejax.checkpoint import store

        run = {"leaves": self._leaves, "settings": list(self._settings.values())}
        content = {
            "run": json.dumps(run),
            "data": json.dumps(self._data | {"last batch": fingerprint(self._last)}),
            "step": state.step,
            "total": state.total,
            "seconds": clock.seconds(),
            "losses": np.asarray([float(loss) for loss in state.losses], np.float32),
            "train": jax.tree.leaves(state.train),
            "memory": jax.tree.leaves(state.memory),
            "best": jax.tree.leaves(state.kept.best),
            "checked": np.asarray(state.kept.checked, np.float64).reshape(-1, 2),
            "scale": state.kept.scale,
        }
        store.save(self._path, content)

    def load(self, state: State, clock: Clock) -> State:
        """The saved state, in the form of `state`; `state` itself if nothing was saved."""
        from slidejax.checkpoint import store

        if not (self._path / store.METADATA).is_file():
            return state
        saved = store.load(self._path)
        saved = saved if isinstance(saved, dict) else {}
        self._check_run(saved.get("run"))
        keys = ("step", "total", "seconds", "losses", "checked", "scale")
        step, total, seconds, losses, checked, scale = (saved.get(key) for key in keys)
        for key, good in (
            ("step", type(step) is int and step >= 0),
            ("total", total is None or (type(total) is int and total >= 0)),
            ("seconds", isinstance(seconds, float) and 0 <= seconds < math.inf),
            ("losses", getattr(losses, "shape", None) == (step,)),
            ("checked", getattr(checked, "shape", ())[1:] == (2,)),
            ("scale", isinstance(scale, float) and 0 < scale <= 1),
        ):
            if not good:
                raise ValueError(f"checkpoint {str(self._path)!r}: key {key!r} is damaged")
        assert isinstance(step, int) and isinstance(seconds, float) and isinstance(scale, float)
        self._check_data(saved.get("data"), step)
        train = self._like(state.train, saved, "train")
        memory = self._like(state.memory, saved, "memory")
        if not all_finite(train):
            raise ValueError(
                f"checkpoint {str(self._path)!r} holds parameters that are not finite: remove it"
            )
        clock.resume(seconds)
        pairs = [(int(at), float(loss)) for at, loss in np.asarray(checked)]
        best = self._like(state.train, saved, "best") if pairs else None
        kept = Kept(best, pairs, scale)
        return State(train, memory, step, total, list(np.asarray(losses)), kept)

    def _check_run(self, saved: Any) -> None:
        """Raises a ValueError that names the settings, if a state is of another training."""
        try:
            run = json.loads(saved)
            leaves, settings = (
                run["leaves"],
                dict(zip(self._settings, run["settings"], strict=True)),
            )
        except (KeyError, TypeError, ValueError):
            leaves, settings = None, {}
        other = [
            f"{name} {settings[name]!r} and not {value!r}"
            for name, value in self._settings.items()
            if settings and settings[name] != value
        ]
        if leaves != self._leaves:
            other.append("leaves of other shapes or dtypes")
        if other:
            raise ValueError(
                f"checkpoint {str(self._path)!r} is of a training with other parameters or "
                f"settings ({', '.join(other)}): name another directory, or remove this one"
            )

    def _check_data(self, saved: Any, step: int) -> None:
        """Raises a ValueError that names what differs, if a state is of other data."""
        if saved is None:
            warnings.warn(
                f"checkpoint {str(self._path)!r} is of an earlier version, which did not write "
                "down which data a training has: that they are these is not checked",
                stacklevel=4,
            )
            return
        try:
            data = dict(json.loads(saved))
        except (TypeError, ValueError) as e:
            raise ValueError(f"checkpoint {str(self._path)!r}: key 'data' is damaged") from e
        now = dict(self._data)
        if step > 0:
            self.saw(0, self._batches(0))
            self.saw(step - 1, self._batches(step - 1))
            now = self._data | {"last batch": fingerprint(self._last)}
        other = [
            name
            for name, value in now.items()
            if None not in (value, data.get(name)) and data[name] != value
        ]
        if other:
            raise ValueError(
                f"checkpoint {str(self._path)!r} is of a training with other data: its "
                f"{' and '.join(other)} differ. Name another directory, or remove this one"
            )

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

"""Solving the layers of one input: their target, and the method on it, on one device or several.

Each output of a layer is a problem of its own, so outputs are shared among devices and nothing is
sent between them while they are solved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slidejax.prune.model.ahead import jitted
from slidejax.prune.model.methods import Solve
from slidejax.prune.sparsegpt import EXACT, damped

__all__ = ["solved_by"]

_LEAST = 256  # outputs that are worth a device of their own


def solved_by(solve: Solve, outputs: int, least: int = _LEAST) -> Callable[..., Any]:
    """`(kernels, moments, correct, damping) -> (finite, [Pruned])` for a method.

    Equal arguments get the same object, so that its compiled programs serve again. It can be
    compiled ahead (`slidejax.prune.model.ahead`).

    Args:
      solve: the method for one kernel.
      outputs: how many outputs the kernels have together. They are shared among this process's
        devices.
      least: at least this many outputs are given to each device.
    """
    devices = min(len(jax.local_devices()), outputs // least)
    return _on_one(solve) if devices < 2 else _Spread.of(solve, devices)


@functools.cache
def _on_one(solve: Solve) -> Callable[..., Any]:
    def solved(kernels, moments, correct, damping):
        kernel, wanted = _joined(kernels, moments)
        finite, result = _solve(solve, kernel, wanted, moments[0], correct, damping)
        return finite, _parted(result, kernels)

    return jitted(solved)


class _Spread:
    """The same on several devices, with the result in the host's memory.

    Args:
      solve: the method for one kernel.
      devices: how many of this process's devices are used.
    """

    def __init__(self, solve: Solve, devices: int):
        mesh = Mesh(np.array(jax.local_devices()[:devices]), ("outputs",))
        self._devices, self._mesh = devices, mesh
        whole, columns = PartitionSpec(), PartitionSpec(None, "outputs")
        self._placed = [NamedSharding(mesh, spec) for spec in (columns, columns, *[whole] * 3)]

        def solved(kernel, wanted, gram, correct, damping):
            def on_each(kernel, wanted, gram, correct, damping):
                finite, result = _solve(solve, kernel, wanted, gram, correct, damping)
                return finite[None], result

            shapes = jax.eval_shape(solve, kernel, kernel, gram, damping)
            last = jax.tree.map(
                lambda leaf: PartitionSpec(*[None] * (leaf.ndim - 1), "outputs"), shapes
            )
            return jax.shard_map(
                on_each,
                mesh=mesh,
                in_specs=(columns, None if wanted is None else columns, whole, whole, whole),
                out_specs=(PartitionSpec("outputs"), last),
                check_vma=False,  # loops begin with constants, which are the same on all devices
            )(kernel, wanted, gram, correct, damping)

        self._join, self._solved = jitted(self._filled), jitted(solved)

    @classmethod
    @functools.cache
    def of(cls, solve: Solve, devices: int) -> _Spread:
        return cls(solve, devices)

    def _filled(self, kernels, moments):
        """The joined kernels, with as many columns for each device: the last one is repeated."""

        def fill(x):
            missing = -x.shape[1] % self._devices
            return jnp.pad(x, ((0, 0), (0, missing)), mode="edge")

        return jax.tree.map(fill, _joined(kernels, moments))

    def lower(self, kernels, moments, correct, damping):
        """Lowers the program, as jitted functions do."""
        kernel, wanted = jax.eval_shape(self._filled, kernels, moments)
        args = [
            None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for x, sharding in zip(
                (kernel, wanted, moments[0], correct, damping), self._placed, strict=True
            )
        ]
        with jax.set_mesh(self._mesh):  # the caller may have set another
            return self._solved.lower(*args)

    def __call__(self, kernels, moments, correct, damping):
        kernel, wanted = self._join(kernels, moments)
        args = [
            None if x is None else jax.device_put(x, sharding)
            for x, sharding in zip(
                (kernel, wanted, moments[0], correct, damping), self._placed, strict=True
            )
        ]
        with jax.set_mesh(self._mesh):
            finite, result = jax.device_get(self._solved(*args))
        return finite.all(axis=0), _parted(result, kernels)


def _joined(kernels, moments):
    """The kernels as one, and `Z^T` times the outputs that are wanted; None if nothing is lost."""
    _, cross, wanted, *_ = moments
    kernel = jnp.concatenate(kernels, axis=1)
    if cross is None and all(w is None for w in wanted):
        return kernel, None
    parts = [
        jnp.matmul(cross, k, precision=EXACT) if w is None else w
        for k, w in zip(kernels, wanted, strict=True)
    ]
    return kernel, jnp.concatenate(parts, axis=1)


def _solve(solve: Solve, kernel, wanted, gram, correct, damping):
    """`(finite, Pruned)` of a kernel; `finite` is of the inputs, and of the solution."""
    target = kernel
    if wanted is not None:
        target = kernel + correct * (_target(gram, wanted, kernel, damping) - kernel)
    result = solve(kernel, target, gram, damping)
    inputs = jnp.isfinite(gram).all() & jnp.isfinite(kernel).all()
    values = [leaf for leaf in jax.tree.leaves(result) if leaf.dtype != jnp.bool_]
    solution = jnp.array([jnp.isfinite(leaf).all() for leaf in (target, *values)]).all()
    return jnp.stack([inputs, solution]), result


def _parted(result, kernels):
    """The result for each of the kernels that were joined."""
    ends = np.cumsum([k.shape[1] for k in kernels])
    return [
        jax.tree.map(lambda leaf, end=end, k=k: leaf[..., end - k.shape[1] : end], result)
        for end, k in zip(ends, kernels, strict=True)
    ]


def _target(gram, wanted, kernel, damping):
    """The least-squares kernel without the pattern.

    Damping pulls it towards the original kernel.
    """
    full = damped(gram, damping)
    ridge = (jnp.diagonal(full) - jnp.diagonal(gram))[:, None]
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(full), wanted + ridge * kernel)

"""Compiling in threads: programs that will be needed compile together, while others run already."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

__all__ = ["CompileAhead", "jitted", "shapes_of"]

# XLA does not search for the fastest kernels of these programs on a GPU. They run for seconds, and
# the search would take minutes of processor time.
_COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}


def jitted(fn: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit(fn, **options)` for the large programs of a conversion.

    They are called from Python, and never while something is traced.
    """
    return jax.jit(fn, compiler_options=_COMPILER_OPTIONS, **options)


def shapes_of(tree: Any) -> Any:
    """The tree with the `ShapeDtypeStruct` of each array in its place.

    >>> import numpy as np
    >>> shapes_of({"x": np.zeros((2, 3), np.float32), "y": None})
    {'x': ShapeDtypeStruct(shape=(2, 3), dtype=float32), 'y': None}
    """
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


class CompileAhead:
    """Programs that are compiled before they are called.

    JAX keeps what it has compiled for a jitted function, so a call finds the program that a thread
    has compiled. JAX does not notice a program that is being compiled, so `call` waits for it. A
    program that was never begun compiles when it is called, as usual.

    Programs are traced and lowered by the caller, and only compiled by a thread. What the caller
    has set with JAX's context managers (precision, 64 bits, a mesh) holds in its own thread alone,
    and a program of other settings would not be found.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="slidejax-compile")
        self._begun: dict[Any, Future] = {}

    def __enter__(self) -> CompileAhead:
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, fn: Any, *args: Any) -> None:
        """Begins to compile a jitted function for arguments of these shapes, unless it has begun.

        Arrays among the arguments are not read.
        """
        key = _key(fn, args)
        if key in self._begun:
            return
        try:
            lowered = fn.lower(*args)
        except Exception:  # the call raises it
            return
        self._begun[key] = self._pool.submit(lowered.compile)

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)`, after its program has been compiled."""
        begun = self._begun.get(_key(fn, args))
        if begun is not None and not begun.done():
            begun.exception()  # waits; an error in the program is raised by the call below
        return fn(*args)


def _key(fn: Any, args: Any) -> Any:
    leaves, tree = jax.tree.flatten(args)
    return fn, tree, tuple((x.shape, str(x.dtype)) if hasattr(x, "shape") else x for x in leaves)

"""Prepared forms: what an implementation needs beyond the packed form, made once outside the loop.

| name | what it holds | where it pays |
|---|---|---|
| `dense` | the kernel's codes `[out, in]` in the values' dtype, zeros included | a CPU, and a GPU where dense is the faster choice: nothing is unpacked in the loop. Not with the pattern "dense", whose values are these codes already |
| `cusparselt` | cuSPARSELt's opaque compressed form, uint8 | every use of that library |
| `hopper` | the 2:4 metadata in the order in which the kernel's lanes read it, uint8 | every use of the kernel |

A prepared form is counted in a weight's bytes, never saved, and dropped by `drop_prepared`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from slidejax.ops import choice, registry
from slidejax.ops.cuda import library
from slidejax.ops.implementations.base import Form
from slidejax.weights.packed import SlideWeight, check_weight

__all__ = ["drop_prepared", "map_weights", "prepare", "weights_of"]


def map_weights(fn: Callable[[SlideWeight], Any], tree: Any) -> Any:
    """Applies `fn` to every `SlideWeight` of a tree; other leaves stay."""
    return jax.tree.map(
        lambda node: fn(node) if _is_weight(node) else node, tree, is_leaf=_is_weight
    )


def weights_of(tree: Any) -> list[SlideWeight]:
    """Every `SlideWeight` of a tree."""
    return [node for node in jax.tree.leaves(tree, is_leaf=_is_weight) if _is_weight(node)]


def _is_weight(node: Any) -> bool:
    return isinstance(node, SlideWeight)


def drop_prepared(tree: Any) -> Any:
    """The tree without prepared forms: what is saved, and what moves to another device."""
    return map_weights(lambda w: w.replace(prepared={}) if w.prepared else w, tree)


def prepare(tree: Any, implementation: str | None = None) -> Any:
    """Adds to every `SlideWeight` of a tree the prepared form that an implementation wants.

    Args:
      tree: any pytree, such as a model's variables.
      implementation: "dense", "cusparselt" or "hopper"; None: what the measured choice for this device and each weight's
        shape wants ("dense" on a CPU).

    Returns:
      The tree; other leaves, and weights for which nothing pays, as they were: among them those of the pattern "dense", which runs
      from its values.

    Raises:
      ValueError: for an unknown name, or under tracing of a form that needs the device ("cusparselt").
      NotImplementedError: if the implementation that was asked for cannot run here.

    >>> from slidejax import pack
    >>> import jax.numpy as jnp
    >>> w = prepare(pack(jnp.ones((8, 4)), "6:8", dtype="int8"), implementation="dense")
    >>> w.prepared["dense"].shape, w.prepared["dense"].dtype.name
    ((4, 8), 'int8')
    """
    if implementation is not None:
        _form(implementation)
    return map_weights(lambda w: _prepare(check_weight(w), implementation), tree)


def _prepare(w: SlideWeight, implementation: str | None) -> SlideWeight:
    if not w.pattern.prunes:
        return w
    forms = dict(w.prepared)
    for form in _wanted(w) if implementation is None else (_form(implementation),):
        if form.name not in forms:
            forms[form.name] = form.of(w.replace(prepared={}))
    return w.replace(prepared=forms)


def _form(implementation: str) -> Form:
    form = registry.get(implementation).form
    if form is None:
        raise ValueError(f"implementation {implementation!r} has no prepared form")
    return form


def _wanted(w: SlideWeight) -> tuple[Form, ...]:
    """The forms that pay here: by the measured table on a GPU, else that of what runs everywhere."""
    names = choice.forms(w) if library.on_gpu() else None
    return tuple(
        i.form
        for i in registry.competing()
        if i.form is not None
        and (i is registry.FALLBACK if names is None else i.form.name in names)
    )

"""Prepared forms: arrays that implementations keep beside the packed form.

They are made once, outside the loop. An implementation names its form and makes it
(`slidejax.ops.implementations.base.Form`):

| name | contents | where it pays |
|---|---|---|
| `dense` | the values with their zeros, `[out, in]` | a CPU, and a GPU where "dense" is faster |
| `cusparselt` | cuSPARSELt's compressed form, uint8 | every use of that library |
| `hopper` | the 2:4 metadata in the order of the kernel's lanes, uint8 | every use of that kernel |

A weight of the pattern "dense" needs no form. Prepared forms count in a weight's bytes and are
never saved; `drop_prepared` removes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from slidejax.ops import choice, registry
from slidejax.ops.cuda import library
from slidejax.ops.implementations.base import Form, Implementation
from slidejax.variants.boxes import refuse_boxed
from slidejax.weights.packed import SlideWeight, check_weight

__all__ = ["drop_prepared", "map_weights", "prepare", "weights_of"]


def map_weights(fn: Callable[[SlideWeight], Any], tree: Any) -> Any:
    """Applies `fn` to every `SlideWeight` of a tree. Other leaves stay."""
    return jax.tree.map(
        lambda node: fn(node) if _is_weight(node) else node, tree, is_leaf=_is_weight
    )


def weights_of(tree: Any) -> list[SlideWeight]:
    """Every `SlideWeight` of a tree."""
    return [node for node in jax.tree.leaves(tree, is_leaf=_is_weight) if _is_weight(node)]


def _is_weight(node: Any) -> bool:
    return isinstance(node, SlideWeight)


def drop_prepared(tree: Any) -> Any:
    """The tree without prepared forms, to be saved or moved to another device."""
    return map_weights(lambda w: w.replace(prepared={}) if w.prepared else w, tree)


def prepare(tree: Any, implementation: str | None = None, *, tune: bool = True) -> Any:
    """Adds prepared forms to every `SlideWeight` of a tree.

    Args:
      tree: any pytree, such as a model's variables.
      implementation: the implementation whose form to add: "dense", "cusparselt" or "hopper". None
        adds the forms that pay on this device for each weight's shape, by the measured table, or by
        estimates where nothing was measured. On a CPU this is "dense".
      tune: whether an implementation whose form is added may search for its fastest settings, once
        for each shape and machine. For "cusparselt" this takes seconds. Under a trace nothing is
        searched.

    Returns:
      The tree. Weights for which no form pays, and other leaves, stay as they were.

    Raises:
      ValueError: for an unknown name, or an implementation without a form.
      TypeError: naming the path, if a weight's leaves are boxed.
      NotImplementedError: if the implementation cannot run here.

    >>> from slidejax import pack
    >>> import jax.numpy as jnp
    >>> w = prepare(pack(jnp.ones((8, 4)), "6:8", dtype="int8"), implementation="dense")
    >>> w.prepared["dense"].shape, w.prepared["dense"].dtype.name
    ((4, 8), 'int8')
    """
    if implementation is not None:
        _form(implementation)
    refuse_boxed(tree)
    return map_weights(lambda w: _prepare(check_weight(w), implementation, tune), tree)


def _prepare(w: SlideWeight, implementation: str | None, tune: bool) -> SlideWeight:
    if not w.pattern.prunes:
        return w
    forms = dict(w.prepared)
    may_search = tune and library.on_gpu() and not isinstance(w.values, jax.core.Tracer)
    for runs in _wanted(w) if implementation is None else (registry.get(implementation),):
        form = _form(runs.name)
        if form.name not in forms:
            forms[form.name] = form.of(w.replace(prepared={}))
        if may_search:
            runs.search_missing(w)
    return w.replace(prepared=forms)


def _form(implementation: str) -> Form:
    form = registry.get(implementation).form
    if form is None:
        raise ValueError(f"implementation {implementation!r} has no prepared form")
    return form


def _wanted(w: SlideWeight) -> tuple[Implementation, ...]:
    """The implementations whose forms pay here: by the table or by estimates on a GPU.

    Elsewhere it is the fallback.
    """
    names = choice.forms(w) if library.on_gpu() else None
    return tuple(
        i
        for i in registry.competing()
        if i.form is not None
        and (i is registry.FALLBACK if names is None else i.form.name in names)
    )

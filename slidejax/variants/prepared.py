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

The forms of a weight that lies over a mesh are made on each device, of its part. `dense` can be cut
wherever the weight can be, `hopper` by 64 outputs, and `cusparselt` not at all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slidejax.ops import choice, registry
from slidejax.ops.cuda import library
from slidejax.ops.implementations.base import Form, Implementation
from slidejax.ops.sharding import spec_axes, spec_of
from slidejax.variants.boxes import refuse_boxed, refuse_hidden
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
    """The tree without prepared forms, to be saved or moved to another device.

    Raises:
      TypeError: if it is an NNX model or its state (see `slidejax.nnx.map_weights`).
    """
    refuse_hidden(tree, "drop_prepared")
    return map_weights(lambda w: w.replace(prepared={}) if w.prepared else w, tree)


def prepare(tree: Any, implementation: str | None = None, *, tune: bool = True) -> Any:
    """Adds prepared forms to every `SlideWeight` of a tree.

    Args:
      tree: any pytree, such as a model's variables.
      implementation: the implementation whose form to add: "dense", "cusparselt" or "hopper". None
        adds the forms that pay on this device for each weight's shape, by the measured table, or by
        estimates where nothing was measured. On a CPU this is "dense". On Hopper GPUs it is nothing
        for 8-bit weights of a shape that is far from what was measured.
      tune: whether an implementation whose form is added may search for its fastest settings, once
        for each shape and machine. For "cusparselt" this takes seconds. Under a trace nothing is
        searched.

    Returns:
      The tree. Weights for which no form pays, and other leaves, stay as they were. The forms of a
      weight that lies over a mesh lie as it does. Under a trace only the compiler knows how it
      lies, and it may gather what a form is made of: prepare outside of `jax.jit`.

    Warns:
      UserWarning: where a form cannot be cut as its weight is. It is not made then.

    Raises:
      ValueError: for an unknown name, or an implementation without a form.
      TypeError: naming the path, if a weight's leaves are boxed; or if the tree is an NNX model or
        its state (see `slidejax.nnx.map_weights`).
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
    refuse_hidden(tree, "prepare")
    return map_weights(lambda w: _prepare(check_weight(w), implementation, tune), tree)


def _prepare(w: SlideWeight, implementation: str | None, tune: bool) -> SlideWeight:
    if not w.pattern.prunes:
        return w
    forms = dict(w.prepared)
    may_search = tune and library.on_gpu() and not isinstance(w.values, jax.core.Tracer)
    for runs in _wanted(w) if implementation is None else (registry.get(implementation),):
        form = _form(runs.name)
        if form.name not in forms:
            made = _made(form, w.replace(prepared={}))
            if made is None:
                continue
            forms[form.name] = made
        if may_search:
            runs.search_missing(w)
    return w.replace(prepared=forms)


def _made(form: Form, w: SlideWeight) -> jax.Array | None:
    """The form of a weight, made where the weight lies; None if it cannot be cut as the weight is.

    A custom call is not split by the compiler: each device would gather the whole weight.
    """
    # The leaves may be arrays of NumPy, too.
    is_traced = isinstance(w.values, jax.core.Tracer)
    sharding = None if is_traced else getattr(w.values, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return form.of(w)
    mesh = cast(Mesh, sharding.mesh)
    *batch, out, k, kept = spec_of(w.values)
    parts = [math.prod(mesh.shape[a] for a in spec_axes(axes)) for axes in (out, k)]
    whole_blocks = k is None or w.in_features % (w.pattern.block * parts[1]) == 0
    if not form.bears(w.out_features, *parts) or not whole_blocks or kept is not None:
        warnings.warn(
            f"prepare: the form {form.name!r} cannot be cut as the weight is, "
            f"{sharding.spec} of [out, groups, kept], and is not made: each device reads the "
            "packed form",
            stacklevel=4,
        )
        return None
    specs = w.partition_spec(out, k, tuple(batch))
    # With explicit axes zeros and scale may lie in another way, as `pack` has made them.
    w = jax.device_put(w, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    axes = (*batch, out, k) if form.inputs else (*batch, out) if form.outputs else batch
    on_each = jax.shard_map(form.of, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(*axes))
    with jax.set_mesh(mesh):  # the caller may have set another
        return jax.jit(on_each)(w)


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

"""Converting Linen models: packed weights take the place of kernels in the parameters.

The module stays. Which axes of a kernel are inputs is read from the layer that owns it, while the
model is traced abstractly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import FrozenDict, freeze, unfreeze

from slidejax.contraction import Axes, Contraction, stacked_axes, to_matrix
from slidejax.linen.intercept import apply, traced_anew
from slidejax.linen.known import kernel_name, layer_of, own_kernel, split_input
from slidejax.linen.layer import pack_boxed
from slidejax.rules import (
    Converted,
    Prune,
    Report,
    Rule,
    RuleSet,
    Skipped,
    nbytes,
    pack_by_rule,
)
from slidejax.weights import numerics
from slidejax.weights.packed import LinearWeight, SlideWeight, TreeLayout

__all__ = ["convert"]

# Wrappers that compute a layer's kernel from its parameter.
_TRANSFORMS = (nn.SpectralNorm, nn.WeightNorm)


def convert(
    variables: Mapping,
    rules,
    model: nn.Module | None = None,
    *example_args,
    report: Report | None = None,
    prune: Prune | None = None,
    rngs: Any = None,
    **example_kwargs,
) -> Any:
    """Prunes and packs the kernels that the rules choose; the result runs with `apply`.

    Args:
      variables: the dict or FrozenDict that `model.init` returns, or its "params".
      rules: see `slidejax.rules`. A single pattern or `Rule` is for all linear layers but output
        embeddings and routers (`slidejax.rules.HEADS`, `ROUTERS`).
      model: the module. It is traced abstractly (nothing is computed) to find the layer that owns
        each kernel: Dense, DenseGeneral, Einsum, GPT-2's Conv1D, gemma's Einsum or a class that
        `slidejax.linen.register` made known, also inside `nn.scan`, `nn.vmap` and `nn.remat`.
        Without the module, 2-D parameters called "kernel" count as kernels of
        `nn.Dense`, and all others are skipped.
      *example_args, **example_kwargs: arguments of `model.init`: arrays or `jax.ShapeDtypeStruct`s.
      report: an empty `Report`, which is filled in.
      prune: how to prune a kernel (`slidejax.rules.Prune`). None prunes by magnitude.
      rngs: the keys for `model.init`.

    Returns:
      `variables` in the same form, with a `SlideWeight` in the place of each converted kernel.
      Other leaves are the same objects. A kernel that is in two places becomes one `SlideWeight` in
      two places, or with `prune` one for each. The axis names of `nn.Partitioned` kernels go to the
      leaves.

    Raises:
      ValueError: for bad rules, or for parameters that are not this model's; or if the converted
        model does not trace. That happens when other code than its layer reads a kernel (tied
        weights): skip that layer.
      TypeError: for variables or a model of the wrong kind.

    Warns:
      UserWarning: for rules that decided no layer. If no rule decided any, it is a ValueError.

    >>> variables = nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 8)))
    >>> report = Report()
    >>> convert(variables, [(".*", "6:8")], report=report)["params"]["kernel"].dtype.name
    'int8'
    >>> len(report.converted), report.skipped
    (1, {})
    """
    if not isinstance(variables, Mapping):
        raise TypeError(
            "variables must be the dict that model.init returns or its 'params', "
            f"got {type(variables).__name__}"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a flax.linen Module, got {type(model).__name__} "
            "(see slidejax.nnx and slidejax.huggingface)"
        )
    rules, report = RuleSet(rules), Report.of(report)
    whole = isinstance(variables.get("params"), Mapping)
    tree = unfreeze(variables) if isinstance(variables, FrozenDict) else variables
    flat = traverse_util.flatten_dict(tree["params"] if whole else tree, keep_empty_nodes=True)
    rngs = jax.random.key(0) if rngs is None else rngs
    axes_of: AxesOf = _axes_without_model
    owners: dict[tuple[str, ...], _Owner] = {}
    abstract: dict = {}
    if model is not None:
        owners, abstract = _owners(model, rngs, example_args, example_kwargs)
        axes_of = functools.partial(_axes_in, owners)
    kernels = [key for key in flat if key[-1] == "kernel" or key in owners]
    any_packed = _pack_kernels(flat, kernels, rules, axes_of, prune, report)
    _name_the_rest(flat, report)
    params = traverse_util.unflatten_dict(flat)
    if model is not None and any_packed:
        whole_tree = {**abstract, **(tree if whole else {}), "params": params}
        _check_runs(model, whole_tree, rngs, example_args, example_kwargs)
    rules.finish(report)
    converted = {**tree, "params": params} if whole else params
    return freeze(converted) if isinstance(variables, FrozenDict) else converted


# (key of a kernel among the flattened parameters, its path, its shape) -> its axes inside its layer
AxesOf = Callable[[tuple, str, tuple[int, ...]], Axes]


def _pack_kernels(
    flat: dict,
    kernels: Sequence[tuple],
    rules: RuleSet,
    axes_of: AxesOf,
    prune: Prune | None,
    report: Report,
) -> bool:
    """Packs the kernels that the rules choose, in place; the report says what was done with each.

    Args:
      flat: the flattened parameters.
      kernels: the keys of those that may be kernels.
      rules, axes_of, prune, report: see `convert` and `AxesOf`.

    Returns:
      Whether any kernel was packed.
    """
    # A kernel in two places is packed once, but not where its inputs decide how.
    packed: dict[Any, tuple[SlideWeight, Converted]] = {}
    for key in kernels:
        leaf, path = flat[key], "/".join(map(str, key))
        try:
            rule = rules.match(path)
            if isinstance(leaf, (LinearWeight, TreeLayout)):
                raise Skipped("it is packed already")
            kernel = leaf.value if isinstance(leaf, nn.Partitioned) else nn.meta.unbox(leaf)
            axes = axes_of(key, path, jnp.shape(kernel))
            if not numerics.holds_floats(kernel.dtype):
                raise Skipped(f"its kernel is {np.dtype(kernel.dtype).name}")
            same = (id(leaf), rule, axes, None if prune is None else path)
            if same not in packed:
                packed[same] = _convert_kernel(leaf, rule, axes, path, prune)
        except Skipped as reason:
            report.skipped[path] = str(reason)
            continue
        flat[key], line = packed[same]
        report.converted.append(dataclasses.replace(line, path=path))
    return bool(packed)


def _name_the_rest(flat: dict, report: Report) -> None:
    """Writes into the report which arrays with two axes or more are no kernel of a linear layer."""
    for key, leaf in flat.items():
        path = "/".join(map(str, key))
        array = nn.meta.unbox(leaf)
        if getattr(array, "ndim", 0) < 2 or path in report.skipped:
            continue
        if not isinstance(array, (LinearWeight, TreeLayout)):
            report.unpacked[path] = "x".join(map(str, array.shape))


def _convert_kernel(
    leaf, rule: Rule, axes: Axes, path: str, prune: Prune | None
) -> tuple[SlideWeight, Converted]:
    """One packed kernel and its line of the report; raises Skipped if the kernel stays as it is."""
    shape: list[int] = []

    def make(kernel):
        matrix = to_matrix(jnp.asarray(kernel), axes)
        shape.extend(matrix.shape)
        return pack_by_rule(matrix, rule, path, prune)

    w = pack_boxed(leaf, axes, make)
    dtype = np.dtype(jax.tree.leaves(w.values)[0].dtype)
    return w, Converted(path, rule, dtype, tuple(shape), nbytes(leaf), nbytes(w))


def _axes_without_model(key: tuple, path: str, shape: tuple[int, ...]) -> Axes:
    if len(shape) != 2:
        raise Skipped(f"{len(shape)}-D kernels need the model, which knows the axes of its inputs")
    return Contraction.dense(1).kernel


@dataclasses.dataclass(frozen=True)
class _Owner:
    """The layer that owns a kernel.

    Attributes:
      axes: the kernel's axes inside the layer; None if the layer cannot hold a packed weight.
      shape: the kernel's shape inside the layer.
      reason: why the layer cannot hold a packed weight.
    """

    axes: Axes | None
    shape: tuple[int, ...]
    reason: str = ""


def _owners(model: nn.Module, rngs, args, kwargs) -> tuple[dict[tuple[str, ...], _Owner], dict]:
    """The owner of each kernel by path, and the model's abstract variables; nothing is computed."""
    found: dict[tuple[str, ...], _Owner] = {}
    running: list[nn.Module] = []

    def record(next_fun, args, kwargs, context):
        running.append(context.module)
        try:
            y = next_fun(*args, **kwargs)
        finally:
            running.pop()
        owner = _owner_of(context, args, kwargs, running)
        if owner is not None:
            path = (*context.module.path, kernel_name(context.module, layer_of(context)))
            found[path] = _agreed(found.get(path), owner)
        return y

    with nn.intercept_methods(record):
        init = functools.partial(model.init, traced_anew(rngs))
        variables = _eval_shape(init, *args, **kwargs)
    return found, unfreeze(variables)


def _owner_of(context, args, kwargs, around: list[nn.Module]) -> _Owner | None:
    """The module that has run, as the owner of its kernel; None if it has no kernel.

    Args:
      context, args, kwargs: those of the interceptor.
      around: the modules that are still running.
    """
    module, layer = context.module, layer_of(context)
    kernel = own_kernel(module, layer)
    if kernel is None:
        return None
    shape = jnp.shape(kernel)
    wrapper = next((type(m).__name__ for m in around if isinstance(m, _TRANSFORMS)), None)
    if wrapper is not None:
        return _Owner(None, shape, f"its kernel is computed by {wrapper}")
    if layer is None:
        name = type(module).__name__
        return _Owner(
            None, shape, f"{name} is not a linear layer that slidejax knows (linen.register)"
        )
    x, args, kwargs = split_input(args, kwargs, layer)
    try:
        axes, _ = layer(module, x, *args, **kwargs)
    except Skipped as reason:
        return _Owner(None, shape, str(reason))
    return _Owner(axes.kernel, shape)


def _agreed(known: _Owner | None, owner: _Owner) -> _Owner:
    """The owner of a kernel after another of its calls."""
    if known is None or known.axes is None:
        return owner
    if owner.axes is None:
        return known  # a subclass around a layer that we know
    if known.axes != owner.axes:
        return dataclasses.replace(owner, axes=None, reason="its kernel is used in two ways")
    return owner


def _eval_shape(fn: Callable, *args, **kwargs):
    """`jax.eval_shape` for arguments among which some are no arrays, such as flags and strings."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = {
        i: leaf
        for i, leaf in enumerate(leaves)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }

    def traced(arrays):
        args, kwargs = jax.tree.unflatten(
            tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        )
        return fn(*args, **kwargs)

    return jax.eval_shape(traced, arrays)


def _check_runs(model: nn.Module, variables, rngs, args, kwargs) -> None:
    """Traces the converted model, so that an error that would come later comes now."""
    rngs = rngs if isinstance(rngs, Mapping) else {"params": rngs}
    try:
        _eval_shape(
            functools.partial(apply, model, rngs=rngs, mutable=True), variables, *args, **kwargs
        )
    except Exception as error:
        raise ValueError(
            f"the converted model does not run: {type(error).__name__}: {error}. A kernel that "
            "other code than its layer reads (tied weights) must be skipped: put (its path, None) "
            "before the other rules"
        ) from error


def _axes_in(owners: Mapping[tuple, _Owner], key: tuple, path: str, shape: tuple[int, ...]) -> Axes:
    """The kernel's axes inside its layer. Axes of scan and vmap come before them.

    Raises:
      Skipped: with the reason, if the kernel cannot be packed.
      ValueError: if the parameters are not this model's.
    """
    owner = owners.get(key)
    if owner is None:
        raise Skipped("the model did not run it with these arguments")
    if owner.axes is None:
        raise Skipped(owner.reason)
    stacked_axes(shape, owner.shape, path)
    return owner.axes

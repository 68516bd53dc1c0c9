"""Converting NNX models: their linear layers become layers that hold packed weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slidejax.contraction import Contraction, stacked_axes, to_matrix
from slidejax.kinds import check_function, check_kind
from slidejax.nnx.layers import (
    SlideEinsum,
    SlideLayer,
    SlideLinear,
    SlideLinearGeneral,
    asked_dtype,
    changes,
    general_contraction,
)
from slidejax.nnx.registered import packed_class, parameter_of, registered
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
from slidejax.variants.prepared import prepare
from slidejax.weights import numerics

__all__ = ["convert", "map_weights"]


def convert(
    model: nnx.Module, rules, *, report: Report | None = None, prune: Prune | None = None
) -> nnx.Module:
    """A model in which the linear layers that the rules choose hold packed weights.

    `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum` (if it is a product of matrices) are
    converted, also if `nnx.vmap` or `nnx.scan` stacked them along the first axis. Subclasses are
    skipped, because they may use their kernel in another way. Layers of other libraries are
    converted once `slidejax.nnx.register` has made them known.

    Args:
      model: any NNX module. It stays as it is.
      rules: see `slidejax.rules`, with paths such as `blocks/0/mlp/kernel`. A layer that is shared
        has its first path. A single pattern or `Rule` is for all linear layers but output
        embeddings and routers (`slidejax.rules.HEADS`, `ROUTERS`).
      report: an empty `slidejax.Report`, which is filled in.
      prune: how to prune a kernel (`slidejax.rules.Prune`). None prunes by magnitude.

    Returns:
      A new model. Layers that were shared are still shared, and arrays that did not change are the
      same objects. On a GPU 8-bit layers have their prepared forms (`slidejax.prepare`).

    Raises:
      ValueError: for bad rules.
      TypeError: if `model` is not an NNX module.

    Warns:
      UserWarning: for rules that decided no layer. If no rule decided any, it is a ValueError.

    >>> model = convert(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), "6:8")
    >>> type(model).__name__, model(jnp.ones((2, 8))).shape
    ('SlideLinear', (2, 4))
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be a flax.nnx Module, got {type(model).__name__} "
            "(slidejax.linen.convert takes parameters)"
        )
    rules, report = RuleSet(rules), Report.of(report)
    model = nnx.clone(model)
    layers = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    wrappers = [
        (path, node)
        for path, node in layers
        if isinstance(node, (nnx.WeightNorm, nnx.SpectralNorm))
    ]
    done: dict[int, _Done] = {}
    for path, layer in layers:
        parameter = parameter_of(layer)
        kernel = vars(layer).get(parameter)
        if not isinstance(kernel, nnx.Variable):
            continue
        name = "/".join(map(str, (*path, parameter)))
        try:
            for outer, wrapper in wrappers:
                inside = (*path, parameter)[len(outer) + 1 :]  # behind "layer_instance"
                if path[: len(outer)] == outer and changes(wrapper, inside, kernel):
                    raise Skipped(f"its kernel is computed by {type(wrapper).__name__}")
            report.converted.append(
                _convert_layer(layer, kernel, rules.match(name), name, prune, done)
            )
        except Skipped as reason:
            report.skipped[name] = str(reason)
    _name_the_rest(model, report)
    rules.finish(report)
    return model


def _name_the_rest(model: nnx.Module, report: Report) -> None:
    """Writes into the report which parameters with two axes or more belong to no linear layer."""
    modules = dict(nnx.iter_graph(model))
    for path, node in modules.items():
        if not isinstance(node, nnx.Param) or jnp.ndim(node.get_value()) < 2:
            continue
        name = "/".join(map(str, path))
        owner = modules.get(path[:-1])
        if isinstance(owner, SlideLayer) or name in report.skipped:
            continue
        size = "x".join(map(str, jnp.shape(node.get_value())))
        if isinstance(owner, nnx.Embed) or path[-1] == "embedding":  # Flax's name for one
            report.unpacked[name] = f"{size}, an embedding"
            continue
        report.unpacked[name] = (
            f"{size} of {type(owner).__name__}, which is no linear layer that slidejax knows: "
            "nnx.register"
        )


# --- one layer ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Done:
    """A layer that was converted, for other layers that share its kernel.

    Attributes:
      kernel: the Variable that the layer had. It is held here so that no other object gets its id.
      layer: the layer.
      result: the class that the layer became, the kernel's axes and the rule.
      line: the layer's line in the report.
    """

    kernel: nnx.Variable
    layer: SlideLayer
    result: tuple
    line: Converted


def _convert_layer(
    layer, kernel: nnx.Variable, rule: Rule, path: str, prune: Prune | None, done: dict[int, _Done]
) -> Converted:
    """Packs the kernel of one layer, in place: the layer may be in several places of the model."""
    cls, axes, shape = _known(layer)
    array, result = kernel.get_value(), (cls, axes, rule)
    stacked_axes(array.shape, shape, path)
    if not numerics.holds_floats(array.dtype):
        raise Skipped(f"its kernel is {np.dtype(array.dtype).name}")
    first = done.get(id(kernel))
    if first is not None:  # tied layers go on sharing their Variables
        if first.result != result:
            raise Skipped(
                f"it shares its kernel with {first.line.path}, which uses it in another way"
            )
        _become(layer, cls).share(first.layer)
        return dataclasses.replace(first.line, path=path)
    matrix = to_matrix(jnp.asarray(array), axes)
    w = pack_by_rule(matrix, rule, path, prune)
    if (
        jax.default_backend() == "gpu"
        and numerics.is_quantized(w.dtype)
        and not isinstance(array, jax.core.Tracer)
    ):
        w = prepare(w)
    _become(layer, cls).hold(w, kernel, axes)
    line = Converted(path, rule, w.dtype, matrix.shape, nbytes(array), nbytes(w))
    done[id(kernel)] = _Done(kernel, layer, result, line)
    return line


def _become(layer, cls: type[SlideLayer]) -> SlideLayer:
    """Makes a layer one of another class, in place, without its kernel."""
    known = registered(type(layer))
    if known is not None:
        layer.packed_shape = tuple(getattr(layer, known.parameter).get_value().shape)
        layer.registered_as = nnx.static(known)
    delattr(layer, parameter_of(layer))
    layer.__class__ = cls
    return layer


def _known(layer) -> tuple:
    """The class that a layer becomes, and the axes and the shape of its kernel."""
    known = registered(type(layer))
    if known is not None:
        shape = tuple(getattr(layer, known.parameter).get_value().shape)
        cls: Any = type(layer)
        return packed_class(cls), known.axes(layer), shape
    if type(layer) not in _LAYERS:
        raise Skipped(
            f"{type(layer).__name__} is not a linear layer that slidejax knows "
            "(slidejax.nnx.register)"
        )
    return _LAYERS[type(layer)](layer)


def _check_product(layer) -> None:
    try:
        asked_dtype(layer)
    except ValueError as error:
        raise Skipped(f"it has a product of its own ({error})") from error


def _linear(layer):
    _check_product(layer)
    return SlideLinear, Contraction.dense(1).kernel, (layer.in_features, layer.out_features)


def _linear_general(layer):
    _check_product(layer)
    # the kernel's axes do not depend on the rank of the input, so any rank serves
    shape = (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    return SlideLinearGeneral, general_contraction(layer, len(shape) + 1).kernel, shape


def _einsum(layer):
    _check_product(layer)
    if layer.einsum_op is not jnp.einsum:
        raise Skipped("it has an einsum_op of its own")
    operand = layer.einsum_str.replace(" ", "").partition(",")[0]
    x_ndim = len(operand.replace("...", "")) + operand.count("...")
    return (
        SlideEinsum,
        Contraction.einsum(layer.einsum_str, x_ndim).kernel,
        tuple(layer.kernel_shape),
    )


_LAYERS: dict[type, Callable] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
}


# --- other weights --------------------------------------------------------------------------------


def map_weights(model: nnx.Module, fn: Callable[[dict[str, Any]], dict[str, Any]]) -> nnx.Module:
    """Applies a function of trees to the packed weights of a model.

    Such functions are those of `slidejax.adapters` and `slidejax.trainable`:

        add = functools.partial(sj.adapters.add, rank=8)
        model = sj.nnx.map_weights(model, add)                   # trains nnx.LoRAParam
        model = sj.nnx.map_weights(model, sj.adapters.merge)
        model = sj.nnx.map_weights(model, sj.trainable.masters)  # float32 nnx.Param, runs in 8 bit
        model = sj.nnx.map_weights(model, sj.trainable.deploy)

    Args:
      model: a model from `convert`. It stays as it is.
      fn: a function of `{path: weight}`. It returns the same paths with other weights of the same
        shapes and masks.

    Returns:
      A new model. Layers that shared a weight still share it.
    """
    check_kind(model, nnx.Module, "model", "a module of flax.nnx")
    check_function(fn, "fn")
    model = nnx.clone(model)
    layers = [
        ("/".join(map(str, path)), node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, SlideLayer)
    ]
    owners: dict[int, tuple[str, Any]] = {}
    for path, layer in layers:
        owners.setdefault(id(layer.values), (path, layer))
    shared = {path: owners[id(layer.values)][1] for path, layer in layers}
    mapped = fn({path: layer.kernel for path, layer in owners.values()})
    for path, layer in owners.values():
        layer.replace_kernel(mapped[path])
    for path, layer in layers:
        if shared[path] is not layer:
            layer.share(shared[path])
    return model

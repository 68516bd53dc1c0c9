"""Flax NNX: the layer `SlideLinear`, and `convert`, which makes the linear layers of a model sparse.

A sparse layer keeps its packed weight in Variables: float values in a `Param`, so that `nnx.grad`, optax and `nnx.split`
see what can be trained and nothing else; 8-bit values, zeros and scale in `Packed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from slidejax.contraction import (
    Contraction,
    axis_names,
    contract,
    promote_packed,
    stacked_axes,
    to_matrix,
)
from slidejax.prune.model.inputs import see_input, see_output
from slidejax.rules import Converted, LeftDense, Prune, Report, Rule, RuleSet, nbytes, pack_by_rule
from slidejax.variants.adapters import AdaptedWeight
from slidejax.variants.prepared import prepare
from slidejax.variants.trainable import MasterWeight
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight, WrappedWeight, pack
from slidejax.weights.pattern import Pattern

__all__ = ["Packed", "SlideEinsum", "SlideLinear", "SlideLinearGeneral", "convert", "map_weights"]


class Packed(nnx.Variable):
    """What a packed weight holds that has no gradient: zeros, scale, 8-bit values, prepared forms."""


class _SlideLayer(nnx.Module):
    """A layer with a packed kernel; `values`, `zeros`, `scale` and `prepared` are its Variables.

    With a master weight `values` are its float32 values and `master` the dtype that they run in; with an adapter there are
    `lora_a` and `lora_b` too.
    """

    implementation: str | None = None
    master: Any = None
    lora: tuple[float, bool] | None = None  # scaling, masked
    lora_a: Any = None
    lora_b: Any = None
    if TYPE_CHECKING:  # what the layer had before it was converted
        bias: Any
        dtype: Any
        promote_dtype: Any
        out_features: Any
        einsum_str: str
        kernel_shape: tuple[int, ...]

    def _hold(self, w: SlideWeight, kernel: nnx.Variable, axes) -> None:
        """Takes `w` in place of the Variable `kernel`, whose axis names go over to the leaves."""
        metadata = kernel.get_metadata()
        kept = {
            name: metadata[name]
            for name in ("mesh", "sharding_rules", "eager_sharding")
            if name in metadata
        }
        names = metadata.get("out_sharding")
        specs = (
            None if names is None else axis_names(w, tuple(names), kernel.get_value().ndim, axes)
        )

        def variable(kind, leaf):
            named = {} if specs is None else {"out_sharding": tuple(getattr(specs, leaf))}
            return kind(getattr(w, leaf), **kept, **named)

        self.values = variable(Packed if numerics.is_quantized(w.dtype) else nnx.Param, "values")
        self.zeros = variable(Packed, "zeros")
        self.scale = variable(Packed, "scale")
        self.prepared = nnx.data(Packed(dict(w.prepared)) if w.prepared else None)
        self.pattern, self.kernel_features = w.pattern, w.in_features

    def _replace(self, w: SlideWeight | WrappedWeight) -> None:
        """Takes another weight of the same shape, pattern and mask; Variables keep their metadata."""
        packed = w.weight if isinstance(w, WrappedWeight) else w
        self.master = w.qdtype if isinstance(w, MasterWeight) else None
        for name in ("values", "zeros", "scale"):
            kind = (
                nnx.Param
                if name == "values" and not numerics.is_quantized(packed.dtype)
                else Packed
            )
            setattr(self, name, kind(getattr(packed, name), **getattr(self, name).get_metadata()))
        self.prepared = nnx.data(Packed(dict(packed.prepared)) if packed.prepared else None)
        adapted = w if isinstance(w, AdaptedWeight) else None
        self.lora = None if adapted is None else (adapted.scaling, adapted.masked)
        self.lora_a = nnx.data(None if adapted is None else nnx.LoRAParam(adapted.lora_a))
        self.lora_b = nnx.data(None if adapted is None else nnx.LoRAParam(adapted.lora_b))

    @property
    def kernel(self) -> SlideWeight | WrappedWeight:
        """The packed weight, and what is around it, from the layer's Variables."""
        prepared = {} if self.prepared is None else dict(self.prepared.get_value())
        values, zeros, scale = (
            variable.get_value() for variable in (self.values, self.zeros, self.scale)
        )
        w = SlideWeight(values, zeros, scale, self.pattern, self.kernel_features, prepared)
        if self.master is not None:
            return MasterWeight(values, zeros, self.pattern, self.kernel_features, self.master)
        if self.lora is not None:
            return AdaptedWeight(w, self.lora_a.get_value(), self.lora_b.get_value(), *self.lora)
        return w

    def _run(self, x, axes: Contraction, features: tuple[int, ...], out_sharding) -> jax.Array:
        w, bias = (
            self.kernel.check(f"kernel of {type(self).__name__}"),
            None if self.bias is None else self.bias.get_value(),
        )
        x, w, bias = promote_packed(
            lambda *arrays: self.promote_dtype(arrays, dtype=self.dtype), x, w, bias
        )
        y = contract(x, w, axes, features, bias, self.implementation)
        return y if out_sharding is None else lax.with_sharding_constraint(y, out_sharding)


class SlideLinear(_SlideLayer):
    """`nnx.Linear` with a packed sparse kernel: a drop-in that prunes and packs when it is made.

    With `qdtype=None` the values are a `Param` and can be trained, the mask stays as it is; 8-bit values are `Packed` and
    have no gradient. `kernel` gives the `SlideWeight`.

    Args:
      in_features, out_features: the sizes.
      pattern: such as `"6:8"`.
      qdtype: dtype of the values, see `slidejax.Rule`; None keeps `param_dtype`.
      use_bias: whether to add a bias.
      dtype: of the computation; None: promoted from input, bias and, unless they are 8-bit, values.
      param_dtype: of the bias and of the kernel before packing.
      kernel_init: of the dense kernel `[in, out]`, before it is pruned by magnitude.
      bias_init: of the bias.
      promote_dtype: as in `nnx.Linear`.
      implementation: of `slidejax.linear`; None: the fastest that fits.
      rngs: the keys.
      kernel_metadata, bias_metadata: of the Variables; `out_sharding` names the axes `(in, out)` of the dense kernel, and
        they are put on the packed leaves.

    Raises:
      ValueError: for a bad pattern or dtype.

    >>> layer = SlideLinear(8, 4, pattern="6:8", qdtype="int8", rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 8))).shape, layer.kernel.shape
    ((2, 4), (8, 4))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pattern: str | Pattern = "6:8",
        qdtype: Any = "int8",
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable = nnx.nn.linear.default_kernel_init,
        bias_init: Callable = nnx.nn.linear.default_bias_init,
        promote_dtype: Callable = nnx.nn.dtypes.promote_dtype,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        rule = Rule(pattern, qdtype)
        kernel = nnx.Param(
            kernel_init(rngs.params(), (in_features, out_features), param_dtype), **kernel_metadata
        )
        self._hold(
            pack(kernel.get_value(), rule.pattern, dtype=rule.qdtype),
            kernel,
            Contraction.dense(1).kernel,
        )
        bias = (
            nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata)
            if use_bias
            else None
        )
        self.bias = nnx.data(bias)
        self.in_features, self.out_features, self.use_bias = in_features, out_features, use_bias
        self.dtype, self.param_dtype, self.promote_dtype = dtype, param_dtype, promote_dtype
        self.implementation = implementation

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """`[..., in_features]` to `[..., out_features]`."""
        return self._run(inputs, Contraction.dense(inputs.ndim), (self.out_features,), out_sharding)


class SlideLinearGeneral(_SlideLayer):
    """What `convert` makes of an `nnx.LinearGeneral`."""

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        return self._run(inputs, _general(self, inputs.ndim), self.out_features, out_sharding)


class SlideEinsum(_SlideLayer):
    """What `convert` makes of an `nnx.Einsum` that is a product of matrices."""

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding=None
    ) -> jax.Array:
        axes = Contraction.einsum(
            self.einsum_str if einsum_str is None else einsum_str, inputs.ndim
        )
        if axes.kernel != Contraction.einsum(self.einsum_str, inputs.ndim).kernel:
            raise ValueError(
                f"the kernel is packed for {self.einsum_str!r}, and cannot run {einsum_str!r}"
            )
        return self._run(
            inputs, axes, tuple(self.kernel_shape[a] for a in axes.kernel_out), out_sharding
        )


# --- converting -------------------------------------------------------------------------------------------------------


def _general(layer, x_ndim: int) -> Contraction:
    return Contraction.general(x_ndim, layer.axis, tuple(layer.batch_axis), len(layer.out_features))


def _own_product(layer, *names: str) -> None:
    standard = (None, lax.dot_general, jnp.einsum)
    for name in (*names, "preferred_element_type"):
        if getattr(layer, name, None) not in standard:
            raise LeftDense(f"it has a {name} of its own")


def _linear(layer):
    _own_product(layer, "dot_general")
    return SlideLinear, Contraction.dense(1).kernel, (layer.in_features, layer.out_features)


def _linear_general(layer):
    _own_product(layer, "dot_general", "dot_general_cls")
    # any rank of the input will do: the kernel's axes do not depend on it
    shape = (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    return SlideLinearGeneral, _general(layer, len(shape) + 1).kernel, shape


def _einsum(layer):
    _own_product(layer, "einsum_op")
    operand = layer.einsum_str.replace(" ", "").partition(",")[0]
    x_ndim = len(operand.replace("...", "")) + operand.count("...")
    return (
        SlideEinsum,
        Contraction.einsum(layer.einsum_str, x_ndim).kernel,
        tuple(layer.kernel_shape),
    )


class _Seen(nnx.Module):
    """A dense layer that shows its input and output (`slidejax.prune.inputs`)."""

    seen_path: str

    def __call__(self, inputs, *args, **kwargs):
        if isinstance(self, nnx.Linear):
            axes = Contraction.dense(inputs.ndim)
        elif isinstance(self, nnx.LinearGeneral):
            axes = _general(self, inputs.ndim)
        else:
            given = args[0] if args else kwargs.get("einsum_str")
            axes = Contraction.einsum(given or self.einsum_str, inputs.ndim)  # type: ignore[attr-defined]
        y = super().__call__(see_input(self.seen_path, inputs, axes), *args, **kwargs)
        return see_output(self.seen_path, y)


_SEEN = {
    cls: type(cls.__name__, (_Seen, cls), {}) for cls in (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
}


def functional(model: nnx.Module) -> tuple[Callable[..., Any], dict, Callable[[dict], nnx.Module]]:
    """A model as a function of its parameters, for calibration.

    Returns:
      `(run, params, rebuild)`: `run(params, *args)` calls the model, its linear layers showing their inputs
      (`slidejax.prune.inputs`); params are nested dicts; `rebuild(params)` makes the model with others.
    """
    graph, state = nnx.split(model)
    seen = nnx.clone(model)
    for path, layer in list(nnx.iter_graph(seen)):
        if type(layer) in _SEEN and isinstance(vars(layer).get("kernel"), nnx.Variable):
            layer.__class__ = _SEEN[type(layer)]
            layer.seen_path = "/".join(map(str, (*path, "kernel")))
    seen_graph, _ = nnx.split(seen)

    def merged(graph, params):
        fresh = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(fresh, params)
        return nnx.merge(graph, fresh)

    return (
        lambda params, *args: merged(seen_graph, params)(*args),
        nnx.to_pure_dict(state),
        lambda params: merged(graph, params),
    )


_LAYERS: dict[type, Callable] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
}


def convert(
    model: nnx.Module, rules, *, report: Report | None = None, prune: Prune | None = None
) -> nnx.Module:
    """A model whose linear layers, as the rules choose, hold packed weights.

    `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum` (where it is a product of matrices) convert, also when `nnx.vmap` or
    `nnx.scan` stacked them along the first axis; subclasses stay dense, as they may use their kernel in another way.

    Args:
      model: any NNX module; it stays as it is.
      rules: see `slidejax.rules`, with paths such as `blocks/0/mlp/kernel`; a layer that is shared goes by its first
        path. A single pattern or `Rule` is for all linear layers.
      report: an empty `slidejax.Report`, filled in.
      prune: `(kernel [..., in, out], pattern, path) -> mask`, or `(mask, kernel)`; None prunes by magnitude.

    Returns:
      A new model. Layers that were shared are shared, arrays that did not change are the same objects. On a GPU 8-bit
      layers have their prepared forms (`slidejax.prepare`).

    Raises:
      ValueError: for bad rules.
      TypeError: if `model` is not an NNX module.

    Warns:
      UserWarning: for rules that decided no layer.

    >>> model = convert(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), "6:8")
    >>> type(model).__name__, model(jnp.ones((2, 8))).shape
    ('SlideLinear', (2, 4))
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be a flax.nnx Module, got {type(model).__name__} (slidejax.linen.convert takes parameters)"
        )
    rules, report = RuleSet(rules), Report() if report is None else report
    model = nnx.clone(model)
    layers = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    wrappers = [
        (path, type(node).__name__)
        for path, node in layers
        if isinstance(node, (nnx.WeightNorm, nnx.SpectralNorm))
    ]
    packed: dict[int, tuple] = {}
    for path, layer in layers:
        kernel = vars(layer).get("kernel")
        if not isinstance(kernel, nnx.Variable):
            continue
        name = "/".join(map(str, (*path, "kernel")))
        try:
            for outer, kind in wrappers:
                if path[: len(outer)] == outer:
                    raise LeftDense(f"its kernel is computed by {kind}")
            report.converted.append(
                _convert_layer(layer, kernel, rules.match(name), name, prune, packed)
            )
        except LeftDense as reason:
            report.dense[name] = str(reason)
    rules.finish(report)
    return model


def _share(layer, first) -> None:
    """Gives a layer the Variables of another, and what is static about its weight."""
    for name in (
        "values",
        "zeros",
        "scale",
        "prepared",
        "pattern",
        "kernel_features",
        "master",
        "lora",
        "lora_a",
        "lora_b",
    ):
        value = getattr(first, name)
        variable = name in ("prepared", "lora_a", "lora_b")
        setattr(layer, name, nnx.data(None) if value is None and variable else value)


def map_weights(model: nnx.Module, fn: Callable[[dict[str, Any]], dict[str, Any]]) -> nnx.Module:
    """A model whose packed weights went through a function of trees, such as those of `slidejax.adapters` and
    `slidejax.trainable`:

        model = sj.nnx.map_weights(model, functools.partial(sj.adapters.add, rank=8))    # nnx.LoRAParam: what is trained
        model = sj.nnx.map_weights(model, sj.adapters.merge)
        model = sj.nnx.map_weights(model, sj.trainable.masters)      # float32 nnx.Param that runs in 8 bit
        model = sj.nnx.map_weights(model, sj.trainable.deploy)

    Args:
      model: from `convert`; it stays as it is.
      fn: from `{path: weight}` to the same paths with other weights of the same shapes and masks.

    Returns:
      A new model. Layers that shared a weight share it.
    """
    model = nnx.clone(model)
    layers = [
        ("/".join(map(str, path)), node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, _SlideLayer)
    ]
    owners: dict[int, tuple[str, Any]] = {}
    for path, layer in layers:
        owners.setdefault(id(layer.values), (path, layer))
    shared = {path: owners[id(layer.values)][1] for path, layer in layers}
    mapped = fn({path: layer.kernel for path, layer in owners.values()})
    for path, layer in owners.values():
        layer._replace(mapped[path])
    for path, layer in layers:
        if shared[path] is not layer:
            _share(layer, shared[path])
    return model


def _convert_layer(
    layer, kernel: nnx.Variable, rule: Rule, path: str, prune: Prune | None, packed: dict
) -> Converted:
    """Makes one layer sparse, in place: so every place of the model that holds it has the sparse one."""
    if type(layer) not in _LAYERS:
        raise LeftDense(f"{type(layer).__name__} is not a linear layer that slidejax knows")
    cls, axes, shape = _LAYERS[type(layer)](layer)
    array = kernel.get_value()
    stacked_axes(array.shape, shape, path)
    if array.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise LeftDense(f"its kernel is {np.dtype(array.dtype).name}")
    if id(kernel) in packed:  # tied: the layers go on sharing their Variables
        _, first, *how, line = packed[id(kernel)]
        if how != [cls, axes, rule]:
            raise LeftDense(f"it shares its kernel with {line.path}, which uses it in another way")
        del layer.kernel
        layer.__class__ = cls
        _share(layer, first)
        return dataclasses.replace(line, path=path)
    matrix = to_matrix(jnp.asarray(array), axes)
    w = pack_by_rule(matrix, rule, path, prune)
    if (
        jax.default_backend() == "gpu"
        and numerics.is_quantized(w.dtype)
        and not isinstance(array, jax.core.Tracer)
    ):
        w = prepare(w)
    del layer.kernel
    layer.__class__ = cls
    layer._hold(w, kernel, axes)
    line = Converted(path, rule, w.dtype, matrix.shape, nbytes(array), nbytes(w))
    packed[id(kernel)] = (
        kernel,
        layer,
        cls,
        axes,
        rule,
        line,
    )  # the kernel is held, so that its id stays its own
    return line

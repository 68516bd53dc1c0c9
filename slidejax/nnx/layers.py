"""NNX layers that hold a packed weight: `SlideLinear`, and the layers that `convert` makes.

A layer keeps its packed weight in Variables. Float values are a `Param`, so that `nnx.grad`, optax
and `nnx.split` see everything that can be trained, and nothing else. 8-bit values, zeros and scale
are `Packed`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from slidejax.bounds import COUNT
from slidejax.contraction import (
    Contraction,
    axis_names,
    check_product,
    contract,
    promote_packed,
)
from slidejax.rules import Rule
from slidejax.variants.adapters import AdaptedWeight
from slidejax.variants.boxes import HiddenPart
from slidejax.variants.trainable import MasterWeight
from slidejax.weights import numerics
from slidejax.weights.packed import LinearWeight, SlideWeight, pack
from slidejax.weights.pattern import Pattern

__all__ = [
    "Packed",
    "SlideEinsum",
    "SlideLayer",
    "SlideLinear",
    "SlideLinearGeneral",
    "asked_dtype",
    "changes",
    "general_contraction",
]


# Wrappers that compute a layer's kernel from its parameter, by the code that calls the layer.
_WRAPPERS = {
    id(inspect.unwrap(cls.__call__).__code__): cls.__name__
    for cls in (nnx.SpectralNorm, nnx.WeightNorm)
}


class Packed(HiddenPart, nnx.Variable):
    """A part of a packed weight without gradient: zeros, scale, 8-bit values, prepared forms."""


class SlideLayer(nnx.Module):
    """A layer with a packed kernel. Its Variables are `values`, `zeros` and `scale`.

    Each of its prepared forms is one, too, in the dict `prepared`; without forms that is None.
    With a master weight `values` are its float32 values, and `master` is the dtype that they run
    in. With an adapter there are also `lora_a` and `lora_b`.
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

    def hold(self, w: SlideWeight, kernel: nnx.Variable, axes) -> None:
        """Takes a packed weight in the place of its kernel.

        Args:
          w: the packed weight.
          kernel: the Variable of the kernel. Its axis names go to the leaves.
          axes: the kernel's axes inside the layer.
        """
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
        self._hold_forms(w)
        self.pattern, self.kernel_features = w.pattern, w.in_features

    def replace_kernel(self, w: LinearWeight) -> None:
        """Takes another weight of the same shape, pattern and mask.

        Variables keep their metadata.
        """
        packed = w.weight
        self.master = w.qdtype if isinstance(w, MasterWeight) else None
        for name in ("values", "zeros", "scale"):
            kind = (
                nnx.Param
                if name == "values" and not numerics.is_quantized(packed.dtype)
                else Packed
            )
            setattr(self, name, kind(getattr(packed, name), **getattr(self, name).get_metadata()))
        self._hold_forms(packed)
        adapted = w if isinstance(w, AdaptedWeight) else None
        self.lora = None if adapted is None else (adapted.scaling, adapted.masked)
        self.lora_a = nnx.data(None if adapted is None else nnx.LoRAParam(adapted.lora_a))
        self.lora_b = nnx.data(None if adapted is None else nnx.LoRAParam(adapted.lora_b))

    def _hold_forms(self, w: SlideWeight) -> None:
        """Takes the prepared forms of a weight whose other leaves it has taken.

        A form with the axes of the values is cut as they are. Others stay whole.
        """
        metadata = dict(self.values.get_metadata())
        names = metadata.pop("out_sharding", None)
        forms = {}
        for name, form in w.prepared.items():
            alike = names is not None and form.shape == (*w.values.shape[:-2], w.in_features)
            named: dict[str, Any] = {"out_sharding": tuple(names)[:-1]} if alike else {}
            forms[name] = Packed(form, **metadata, **named)
        self.prepared = nnx.data(forms or None)

    def share(self, first: SlideLayer) -> None:
        """Takes the weight of another layer: its Variables, and the static parts."""
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
            setattr(self, name, nnx.data(None) if value is None and variable else value)

    @property
    def parameter(self) -> str:
        """The name of the parameter that the packed kernel stands for."""
        return "kernel"

    @property
    def kernel(self) -> LinearWeight:
        """The weight that the layer's Variables hold."""
        forms = {} if self.prepared is None else self.prepared
        prepared = {name: form.get_value() for name, form in forms.items()}
        values, zeros, scale = (
            variable.get_value() for variable in (self.values, self.zeros, self.scale)
        )
        w = SlideWeight(values, zeros, scale, self.pattern, self.kernel_features, prepared)
        if self.master is not None:
            return MasterWeight(values, zeros, self.pattern, self.kernel_features, self.master)
        if self.lora is not None:
            return AdaptedWeight(w, self.lora_a.get_value(), self.lora_b.get_value(), *self.lora)
        return w

    @kernel.setter
    def kernel(self, value: Any) -> None:
        raise AttributeError(
            f"the kernel of {type(self).__name__} is packed and cannot be set, also not from the "
            "state of a dense model: convert a model that has the new kernel, or change packed "
            "weights with slidejax.nnx.map_weights"
        )

    def _check_unwrapped(self) -> None:
        """Raises a ValueError inside a wrapper of Flax that computes a kernel from its parameter.

        The wrapper computes with the leaves of a packed weight, or passes them by. Nothing tells
        the layer of it, but the wrapper's call is a frame of Python around this one.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name = _WRAPPERS.get(id(frame.f_code))
            if name is not None and _changes_packed(frame.f_locals.get("self")):
                raise ValueError(
                    f"the kernel of {type(self).__name__} is packed, and nnx.{name} around it "
                    "cannot normalise it: skip this layer with a rule of None, or normalise the "
                    f"kernel once, convert the layer, and take nnx.{name} out of the model"
                )
            frame = frame.f_back

    def _run(
        self, x, axes: Contraction, features: tuple[int, ...], out_sharding, residual
    ) -> jax.Array:
        self._check_unwrapped()
        w, bias = (
            self.kernel.check(f"kernel of {type(self).__name__}"),
            None if self.bias is None else self.bias.get_value(),
        )
        x, w, bias = promote_packed(
            lambda *arrays: self.promote_dtype(arrays, dtype=self.dtype), x, w, bias
        )
        preferred = asked_dtype(self)
        y = contract(x, w, axes, features, bias, self.implementation, residual, preferred)
        return y if out_sharding is None else lax.with_sharding_constraint(y, out_sharding)


class SlideLinear(SlideLayer):
    """A drop-in for `nnx.Linear` that prunes and packs its kernel when it is made.

    With `qdtype=None` the values are a `Param` and can be trained, and the mask stays as it is.
    8-bit values are `Packed` and have no gradient. `kernel` gives the `SlideWeight`.

    Args:
      in_features, out_features: the numbers of inputs and outputs.
      pattern: such as `"6:8"`.
      qdtype: dtype of the packed values, see `slidejax.Rule`. None keeps `param_dtype`.
      use_bias: whether to add a bias.
      dtype: dtype of the computation. None promotes the input, the bias and, unless they are 8-bit,
        the values.
      param_dtype: dtype of the bias, and of the kernel before it is packed.
      precision: accepted as `nnx.Linear` accepts it. Products are at least as exact as HIGHEST
        asks.
      kernel_init: makes the kernel `[in, out]`, which is then pruned by magnitude.
      bias_init: makes the bias.
      dot_general: only `jax.lax.dot_general`, or a `functools.partial` of it with a
        `preferred_element_type`. A packed kernel has a product of its own.
      promote_dtype: as in `nnx.Linear`.
      preferred_element_type: dtype of the result: bfloat16, float16 or float32. None takes the
        promoted dtype.
      implementation: as in `slidejax.linear`. None takes the fastest that fits.
      rngs: the keys.
      kernel_metadata, bias_metadata: metadata of the Variables. `out_sharding` names the axes `(in,
        out)` of the kernel; the names go to the packed leaves.

    Raises:
      ValueError: for a bad pattern or dtype, or a `dot_general` that cannot be honoured.

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
        precision: Any = None,
        kernel_init: Callable = nnx.nn.linear.default_kernel_init,
        bias_init: Callable = nnx.nn.linear.default_bias_init,
        dot_general: Callable | None = None,
        promote_dtype: Callable = nnx.nn.dtypes.promote_dtype,
        preferred_element_type: Any = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        COUNT.check(in_features, "in_features")
        COUNT.check(out_features, "out_features")
        rule = Rule(pattern, qdtype)
        check_product("SlideLinear", dot_general, None, preferred_element_type)
        kernel = nnx.Param(
            kernel_init(rngs.params(), (in_features, out_features), param_dtype), **kernel_metadata
        )
        self.hold(
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
        self.precision, self.dot_general = precision, dot_general
        self.preferred_element_type = preferred_element_type
        self.implementation = implementation

    def __call__(
        self, inputs: jax.Array, out_sharding=None, residual: jax.Array | None = None
    ) -> jax.Array:
        """Computes `[..., out_features]` from inputs `[..., in_features]`.

        Args:
          inputs: `[..., in_features]`.
          out_sharding: a sharding of the result, or None.
          residual: `[..., out_features]`, added in float32 before the result is rounded, as
            `slidejax.linear` does; or None. It takes no part in the promotion of dtypes.
        """
        axes = Contraction.dense(inputs.ndim)
        return self._run(inputs, axes, (self.out_features,), out_sharding, residual)


class SlideLinearGeneral(SlideLayer):
    """An `nnx.LinearGeneral` with a packed kernel, made by `convert`.

    Its call takes a `residual` in the shape of the result, as `SlideLinear` does.
    """

    def __call__(
        self, inputs: jax.Array, out_sharding=None, residual: jax.Array | None = None
    ) -> jax.Array:
        axes = general_contraction(self, inputs.ndim)
        return self._run(inputs, axes, self.out_features, out_sharding, residual)


class SlideEinsum(SlideLayer):
    """An `nnx.Einsum` with a packed kernel, made by `convert`.

    Its call takes a `residual` in the shape of the result, as `SlideLinear` does.
    """

    def __call__(
        self,
        inputs: jax.Array,
        einsum_str: str | None = None,
        out_sharding=None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        axes = Contraction.einsum(
            self.einsum_str if einsum_str is None else einsum_str, inputs.ndim
        )
        if axes.kernel != Contraction.einsum(self.einsum_str, inputs.ndim).kernel:
            raise ValueError(
                f"the kernel is packed for {self.einsum_str!r}, and cannot run {einsum_str!r}"
            )
        features = tuple(self.kernel_shape[a] for a in axes.kernel_out)
        return self._run(inputs, axes, features, out_sharding, residual)


def changes(wrapper: nnx.Module, path: tuple, kernel: Any) -> bool:
    """Whether a `WeightNorm` or `SpectralNorm` computes a kernel from this parameter.

    Args:
      wrapper: the wrapper.
      path: of the parameter, inside the wrapped layer.
      kernel: the parameter, a Variable.
    """
    chosen = getattr(wrapper, "variable_filter", None)
    return chosen is None or bool(chosen(path, kernel))


def _changes_packed(wrapper: Any) -> bool:
    """Whether a wrapper normalises the kernel of a packed layer in it, or a leaf of one."""
    inside = getattr(wrapper, "layer_instance", None)
    if inside is None:  # a Flax that this code does not know
        return True
    for path, layer in nnx.iter_graph(inside):
        if not isinstance(layer, SlideLayer):
            continue
        kernel = nnx.Param(jax.ShapeDtypeStruct(layer.kernel.shape, jnp.float32))
        parts = {layer.parameter: kernel} | {
            name: getattr(layer, name) for name in ("values", "zeros", "scale")
        }
        if any(changes(wrapper, (*path, name), part) for name, part in parts.items()):
            return True
    return False


def asked_dtype(layer) -> Any:
    """The dtype that a layer's arguments ask of its result, or None.

    Raises:
      ValueError: if a packed kernel cannot honour them.
    """
    names = "dot_general", "dot_general_cls", "preferred_element_type"
    return check_product(type(layer).__name__, *(getattr(layer, name, None) for name in names))


def general_contraction(layer, x_ndim: int) -> Contraction:
    """How an `nnx.LinearGeneral` contracts an input of this rank with its kernel."""
    return Contraction.general(x_ndim, layer.axis, tuple(layer.batch_axis), len(layer.out_features))

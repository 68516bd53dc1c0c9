"""Flax Linen: the layer `SlideDense`, and sparse weights in models whose code is not ours (`convert`, `apply`).

A converted model keeps its module: the packed weight sits in the parameters where the kernel was, and `apply` intercepts
the layers that own one. Which axes of a kernel are inputs is read from the layer when the model is traced abstractly.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import FrozenDict, freeze, unfreeze
from jax import lax

from slidejax.contraction import (
    Contraction,
    axis_names,
    contract,
    promote_packed,
    stacked_axes,
    to_matrix,
)
from slidejax.ops.linear import linear
from slidejax.ops.prologue import GLU
from slidejax.rules import Converted, LeftDense, Prune, Report, Rule, RuleSet, nbytes, pack_by_rule
from slidejax.variants.projections import FusedPart, FusedWeight
from slidejax.variants.projections import fuse as fuse_projections
from slidejax.variants.projections import unfuse as unfuse_projections
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight, WrappedWeight, pack
from slidejax.weights.pattern import Pattern

__all__ = [
    "SlideDense", "apply", "convert", "fuse_projections", "interceptor", "layer_of", "own_kernel", "split_input", "unfuse_projections"
]  # fmt: skip

_PACKED = (SlideWeight, WrappedWeight)  # what runs sparse where a kernel was
_FUSED = (FusedWeight, FusedPart)  # of these, what is computed together with the layers beside it
_DENSE_AXES = Contraction.dense(1).kernel


# --- the layers that can hold a packed weight -------------------------------------------------------------------------


def _standard_dot(module) -> None:
    if module.dot_general_cls is not None or module.dot_general not in (None, lax.dot_general):
        raise LeftDense("it has a dot_general of its own")


def _dense(module, x) -> tuple[Contraction, tuple[int, ...]]:
    _standard_dot(module)
    return Contraction.dense(jnp.ndim(x)), (module.features,)


def _dense_general(module, x) -> tuple[Contraction, tuple[int, ...]]:
    _standard_dot(module)
    axis, batch, features = (
        tuple(a) if isinstance(a, Sequence) else (a,)
        for a in (module.axis, module.batch_dims, module.features)
    )
    return Contraction.general(jnp.ndim(x), axis, batch, len(features)), features


def _einsum(module, x, einsum_str=None) -> tuple[Contraction, tuple[int, ...]]:
    if module.preferred_element_type is not None:
        raise LeftDense("it has a preferred_element_type")
    axes = Contraction.einsum(
        nn.merge_param("einsum_str", module.einsum_str, einsum_str), jnp.ndim(x)
    )
    return axes, tuple(module.shape[a] for a in axes.kernel_out)


def _conv1d(module, x) -> tuple[Contraction, tuple[int, ...]]:
    """GPT-2's Conv1D in transformers: a dense layer whose kernel is stored as `[out, in]`."""
    return Contraction((), (1,), (0,), (), (jnp.ndim(x) - 1,)), (module.features,)


def _name(method: Callable) -> str:
    return f"{method.__module__}.{method.__qualname__}"


# The body that runs says what a layer does with its kernel: a subclass that overrides `__call__` and calls the inherited
# one is as good as the layer itself, one that does not is not known. By name, as transformers need not be installed.
_LAYERS: dict[str, Callable[..., tuple[Contraction, tuple[int, ...]]]] = {
    _name(nn.Dense.__call__): _dense,
    _name(nn.DenseGeneral.__call__): _dense_general,
    _name(nn.Einsum.__call__): _einsum,
    "transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D.__call__": _conv1d,
}
# Blocks `down(up(x) * act(gate(x)))` whose product is computed where the rows of `down` are quantised, by their bodies' names.
_GATED = tuple(
    f"transformers.models.{name}.modeling_flax_{name}.Flax{name.capitalize()}MLP.__call__"
    for name in ("llama", "mistral", "gemma")
)
# Wrappers that compute a layer's kernel from its parameter.
_TRANSFORMS = (nn.SpectralNorm, nn.WeightNorm)


def layer_of(context) -> Callable[..., tuple[Contraction, tuple[int, ...]]] | None:
    """For an interceptor's context: `(module, x, *args, **kwargs) -> (contraction, output axes)` of the linear layer whose
    `__call__` it is, or None. What is returned raises `LeftDense` for a layer that cannot hold a packed weight."""
    return _LAYERS.get(_body(context))


def _body(context) -> str:
    return _name(inspect.unwrap(getattr(context.orig_method, "func", context.orig_method)))


def own_kernel(module: nn.Module) -> Any:
    """The kernel of this very module as the module sees it, or None."""
    if module.scope is None or not module.has_variable("params", "kernel"):
        return None
    return nn.meta.unbox(module.get_variable("params", "kernel"))


# --- running ----------------------------------------------------------------------------------------------------------


def _bias(module) -> jax.Array | None:
    if not module.use_bias:
        return None
    bias = nn.meta.unbox(module.get_variable("params", "bias"))
    if bias is None:
        raise ValueError(f"{'/'.join(module.path)} has use_bias=True and no parameter 'bias'")
    return bias


def _run(
    module,
    w: SlideWeight | WrappedWeight,
    axes: Contraction,
    features,
    x,
    implementation: str | None = None,
) -> jax.Array:
    return _product(module, w, axes, features, x, _bias(module), implementation)


def _product(
    module,
    w: SlideWeight | WrappedWeight,
    axes: Contraction,
    features,
    x,
    bias,
    implementation: str | None = None,
) -> jax.Array:
    """The layer's result; dtypes are promoted as the layer does it, except that 8-bit values take no part."""
    promote = getattr(module, "promote_dtype", nn.dtypes.promote_dtype)
    x, w, bias = promote_packed(lambda *arrays: promote(*arrays, dtype=module.dtype), x, w, bias)
    return contract(x, w, axes, features, bias, implementation)


# The latest product of each fused weight, by the scope of the module whose layers share it: it ends with the call of the model.
_products: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, Any, jax.Array]]] = (
    weakref.WeakKeyDictionary()
)


def _run_fused(module, w: FusedWeight | FusedPart, axes: Contraction, features, x) -> jax.Array:
    """The result of a layer whose kernel is in a `FusedWeight`: its part of the product of all, which the first of them to be called with x computes."""
    siblings = module.parent.variables["params"]
    holder = w.holder if isinstance(w, FusedPart) else module.name
    held: FusedWeight = siblings[holder]["kernel"].check(
        "/".join((*module.parent.path, holder, "kernel"))
    )
    if axes != Contraction.dense(jnp.ndim(x)):
        return _run(module, held.part(module.name), axes, features, x)
    products = _products.setdefault(module.parent.scope, {})
    how = (module.dtype, getattr(module, "promote_dtype", None))
    if holder not in products or products[holder][0] is not x or products[holder][1] != how:
        y = _product(
            module, held.fused, axes, (held.fused.out_features,), x, _biases(siblings, held)
        )
        products[holder] = x, how, y
    begin, end = held.bounds(module.name)
    return products[holder][2][..., begin:end]


def _biases(modules: Mapping, w: FusedWeight) -> jax.Array | None:
    """The biases of fused layers, one after the other; zero for a layer without."""
    found = [nn.meta.unbox(modules[layer].get("bias")) for layer in w.layers]
    if all(bias is None for bias in found):
        return None
    dtype = jnp.result_type(*(bias for bias in found if bias is not None))
    return jnp.concatenate(
        [
            jnp.zeros(size, dtype) if b is None else b.astype(dtype)
            for b, size in zip(found, w.sizes, strict=True)
        ]
    )


def _activation(function: Callable) -> str | None:
    """A Flax activation as `GLU` calls it, or None."""
    if function in (nn.silu, nn.swish):
        return "silu"
    if function is nn.relu:
        return "relu"
    if (
        isinstance(function, functools.partial)
        and function.func is nn.gelu
        and not function.args
        and set(function.keywords) == {"approximate"}
    ):
        return "gelu_tanh" if function.keywords["approximate"] else "gelu"
    return None


def _gated(module, x) -> jax.Array | None:
    """The result of a gated block whose `down_proj` is 8-bit and sparse, with the gate's product in the kernel that quantises its rows: XLA
    would write it to memory and read it again. None for all others, among them those whose gate and up are fused: XLA reads the parts of their product
    where they are, the lift would need copies."""
    down, activation = module.down_proj, _activation(module.act)
    w = own_kernel(down)
    if (
        activation is None
        or not isinstance(w, SlideWeight)
        or not numerics.is_quantized(w.dtype)
        or down.use_bias
    ):
        return None
    if isinstance(own_kernel(module.gate_proj), _FUSED):
        return None
    w.check("/".join((*down.path, "kernel")))
    up, gate = module.up_proj(x), module.gate_proj(x)
    gate, w, _ = promote_packed(
        lambda *arrays: down.promote_dtype(*arrays, dtype=down.dtype), gate, w, None
    )
    return linear(gate, w, prologue=GLU(up.astype(gate.dtype), activation))


def interceptor(next_fun, args, kwargs, context):
    """For `nn.intercept_methods`: layers whose kernel is a `SlideWeight` run sparse, all else runs as it is. In the MLPs of Llama, Mistral and
    Gemma the gate's product goes into the lift of `down_proj`.

    `apply` enters it; enter it yourself where the call of the model is not yours:

        with nn.intercept_methods(sj.linen.interceptor):
            logits = state.apply_fn(state.params, tokens)
    """
    if (
        len(args) == 1
        and not kwargs
        and _body(context) in _GATED
        and (y := _gated(context.module, *args)) is not None
    ):
        return y
    layer = layer_of(context)
    w = own_kernel(context.module) if layer is not None else None
    if layer is None or not isinstance(w, _PACKED):
        return next_fun(*args, **kwargs)
    w.check("/".join((*context.module.path, "kernel")))
    x, args, kwargs = split_input(args, kwargs)
    axes, features = layer(context.module, x, *args, **kwargs)
    if isinstance(w, _FUSED):
        return _run_fused(context.module, w, axes, features, x)
    return _run(context.module, w, axes, features, x)


def split_input(args, kwargs):
    """The input of a layer's `__call__`, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["inputs"], (), {name: value for name, value in kwargs.items() if name != "inputs"}


def apply(model: nn.Module, variables: Mapping, *args, **kwargs) -> Any:
    """`model.apply(variables, *args, **kwargs)` where kernels in `variables` may be `SlideWeight`s.

    Args:
      model: any Linen module, unchanged.
      variables: as `model.apply` takes them, from `convert`.
      *args, **kwargs: of `model.apply`: inputs, `method`, `mutable`, `rngs`, `capture_intermediates`.

    Returns:
      What `model.apply` returns.

    >>> model, x = nn.Dense(4), jnp.ones((1, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> apply(model, convert(variables, "6:8", model, x), x).shape
    (1, 4)
    """
    with nn.intercept_methods(interceptor):
        return model.apply(variables, *args, **kwargs)


# --- the layer --------------------------------------------------------------------------------------------------------


class SlideDense(nn.Module):
    """`nn.Dense` with a packed sparse kernel: a drop-in that prunes and packs when parameters are initialised.

    The parameters are `{"kernel": SlideWeight, "bias": [features]}`. With `qdtype=None` the values are floats and can be
    trained (`slidejax.partition`), the mask stays as it was at initialisation; 8-bit values have no gradient. With
    `nn.with_partitioning` around `kernel_init` the names `(in, out)` are put on the leaves of the `SlideWeight`; the
    name of the inputs only if they are whole blocks (`Pattern.block`), as K can be cut nowhere else.

    Attributes:
      features: outputs.
      use_bias: whether to add a bias.
      dtype: of the computation; None: promoted from input, bias and, unless they are 8-bit, values.
      param_dtype: of the bias and of the kernel before packing.
      kernel_init: of the dense kernel `[in, out]`, before it is pruned by magnitude.
      bias_init: of the bias.
      promote_dtype: as in `nn.Dense`.
      pattern: such as `"6:8"`.
      qdtype: dtype of the values, see `slidejax.Rule`; None keeps `param_dtype`.
      implementation: of `slidejax.linear`; None: the fastest that fits.

    >>> layer = SlideDense(features=4, pattern="6:8", qdtype="int8")
    >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8)))
    >>> variables["params"]["kernel"].shape, layer.apply(variables, jnp.ones((1, 8))).shape
    ((8, 4), (1, 4))
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.linear.default_kernel_init
    bias_init: Callable = nn.initializers.zeros_init()
    promote_dtype: Callable = nn.dtypes.promote_dtype
    pattern: str | Pattern = "6:8"
    qdtype: Any = "int8"
    implementation: str | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`inputs` `[..., in]` to `[..., features]`.

        Raises:
          ValueError: if the parameter has another pattern or shape, or is not packed.
        """
        rule, shape = Rule(self.pattern, self.qdtype), (jnp.shape(inputs)[-1], self.features)
        w = own_kernel(self)
        if w is not None:
            path = "/".join((*self.path, "kernel"))
            if not isinstance(w, _PACKED):
                raise ValueError(
                    f"{path} is a dense array of shape {jnp.shape(w)}; SlideDense takes a SlideWeight (slidejax.linen.convert)"
                )
            w.check(path)
            pattern = w.weight.pattern if isinstance(w, WrappedWeight) else w.pattern
            if (
                pattern != rule.pattern
                or w.out_features != self.features
                or not (w.is_k_shard or w.shape[-2:] == shape)
            ):
                raise ValueError(
                    f"{path} is a {pattern} weight of shape {w.shape}; expected {rule.pattern} of shape {shape}"
                )
        if w is None or not w.is_k_shard:
            w = self.param(
                "kernel",
                functools.partial(_init_kernel, self.kernel_init, rule),
                shape,
                self.param_dtype,
            )
        if self.use_bias:
            self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return _run(
            self,
            w,
            Contraction.dense(jnp.ndim(inputs)),
            (self.features,),
            inputs,
            self.implementation,
        )


def _init_kernel(init: Callable, rule: Rule, key, shape, dtype) -> SlideWeight:
    return _boxed(
        init(key, shape, dtype),
        _DENSE_AXES,
        lambda kernel: pack(kernel, rule.pattern, dtype=rule.qdtype),
    )


def _boxed(kernel, axes, make: Callable[[jax.Array], SlideWeight]) -> SlideWeight:
    """`make(kernel)`; where the kernel is boxed with the names of its axes, the leaves of the result are."""
    if not isinstance(kernel, nn.meta.AxisMetadata):
        return make(kernel)
    if not isinstance(kernel, nn.Partitioned):
        raise LeftDense(
            f"its kernel is boxed in {type(kernel).__name__}, whose axis names are not known"
        )
    w = make(kernel.value)
    leaf_names = axis_names(w, kernel.names, kernel.value.ndim, axes)
    return jax.tree.map(
        lambda leaf, spec: kernel.replace(value=leaf, names=tuple(spec)), w, leaf_names
    )


# --- converting -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Owner:
    """The layer that owns a kernel: the kernel's axes and shape inside it (None: the reason why it is not linear)."""

    axes: tuple[tuple[int, ...], ...] | None
    shape: tuple[int, ...]
    reason: str = ""


def _owners(model: nn.Module, rngs, args, kwargs) -> tuple[dict[tuple[str, ...], _Owner], dict]:
    """The owner of every kernel by path, and the abstract variables of the model. Nothing is computed."""
    found: dict[tuple[str, ...], _Owner] = {}
    running: list[nn.Module] = []

    def note(module, owner):
        path = (*module.path, "kernel")
        known = found.get(path)
        if known is not None and known.axes is not None and owner.axes is None:
            return  # a subclass around a layer that we know
        if known is not None and known.axes is not None and known.axes != owner.axes:
            owner = dataclasses.replace(owner, axes=None, reason="its kernel is used in two ways")
        found[path] = owner

    def record(next_fun, args, kwargs, context):
        module, layer = context.module, layer_of(context)
        running.append(module)
        try:
            y = next_fun(*args, **kwargs)
        finally:
            running.pop()
        kernel = own_kernel(module)
        if kernel is None:
            return y
        shape = jnp.shape(kernel)
        wrapper = next((type(m).__name__ for m in running if isinstance(m, _TRANSFORMS)), None)
        if wrapper is not None:
            note(module, _Owner(None, shape, f"its kernel is computed by {wrapper}"))
        elif layer is None:
            note(
                module,
                _Owner(
                    None,
                    shape,
                    f"{type(module).__name__} is not a linear layer that slidejax knows",
                ),
            )
        else:
            x, args, kwargs = split_input(args, kwargs)
            try:
                axes, _ = layer(module, x, *args, **kwargs)
                note(module, _Owner(axes.kernel, shape))
            except LeftDense as reason:
                note(module, _Owner(None, shape, str(reason)))
        return y

    with nn.intercept_methods(record):
        variables = _eval_shape(functools.partial(model.init, rngs), *args, **kwargs)
    return found, unfreeze(variables)


def _eval_shape(fn: Callable, *args, **kwargs):
    """`jax.eval_shape`, with the arguments that are no arrays (flags, strings) as they are."""
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
    """Traces the converted model, so that what would fail later fails now."""
    rngs = rngs if isinstance(rngs, Mapping) else {"params": rngs}
    try:
        _eval_shape(
            functools.partial(apply, model, rngs=rngs, mutable=True), variables, *args, **kwargs
        )
    except Exception as error:
        raise ValueError(
            f"the converted model does not run: {type(error).__name__}: {error}. A kernel that other code than its layer "
            f"reads (tied weights) must stay dense: put (its path, None) before the other rules"
        ) from error


def _axes_of(
    owner: _Owner | None, shape: tuple[int, ...], path: str
) -> tuple[tuple[int, ...], ...]:
    """The kernel's axes inside its layer, the axes of scan and vmap before them.

    Raises:
      LeftDense: with the reason, if the kernel cannot be packed.
      ValueError: if the parameters are not this model's.
    """
    if owner is None:
        raise LeftDense("the model did not run it with these arguments")
    if owner.axes is None:
        raise LeftDense(owner.reason)
    stacked_axes(shape, owner.shape, path)
    return owner.axes


def _convert_kernel(
    leaf, rule: Rule, axes, path: str, prune: Prune | None
) -> tuple[SlideWeight, Converted]:
    """One kernel; LeftDense with the reason if it stays dense."""
    shape: list[int] = []

    def make(kernel):
        matrix = to_matrix(jnp.asarray(kernel), axes)
        shape.extend(matrix.shape)
        return pack_by_rule(matrix, rule, path, prune)

    w = _boxed(leaf, axes, make)
    dtype = np.dtype(jax.tree.leaves(w.values)[0].dtype)
    return w, Converted(path, rule, dtype, tuple(shape), nbytes(leaf), nbytes(w))


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
      variables: what `model.init` returns, or its "params". Dict or FrozenDict.
      rules: see `slidejax.rules`; a single pattern or `Rule` is for all linear layers.
      model: the module, traced abstractly (nothing is computed) to find the layer that owns each kernel: Dense,
        DenseGeneral, Einsum, GPT-2's Conv1D, also inside `nn.scan`, `nn.vmap`, `nn.remat`. Without it, 2-D parameters
        called "kernel" are taken for those of `nn.Dense`, all others stay dense.
      *example_args, **example_kwargs: arguments of `model.init`: arrays or `jax.ShapeDtypeStruct`s.
      report: an empty `Report`, filled in.
      prune: `(kernel [..., in, out], pattern, path) -> mask`, or `(mask, kernel)`; None prunes by magnitude.
      rngs: of `model.init`; None: a key.

    Returns:
      `variables` in the same form, a `SlideWeight` in place of each converted kernel; other leaves are the same objects,
      a kernel that is in two places becomes one `SlideWeight` in two places. Axis names of `nn.Partitioned` kernels are
      put on the leaves.

    Raises:
      ValueError: for bad rules, parameters that are not this model's, or if the converted model does not trace, which is
        so when other code than its layer reads a kernel (tied weights): leave that layer dense.
      TypeError: for variables or a model of the wrong kind.

    Warns:
      UserWarning: for rules that decided no layer.

    >>> variables = nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 8)))
    >>> report = Report()
    >>> convert(variables, [(".*", "6:8")], report=report)["params"]["kernel"].dtype.name
    'int8'
    >>> len(report.converted), report.dense
    (1, {})
    """
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables must be the dict that model.init returns or its 'params', got {type(variables).__name__}"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a flax.linen Module, got {type(model).__name__} (see slidejax.nnx and slidejax.huggingface)"
        )
    rules, report = RuleSet(rules), Report() if report is None else report
    whole = isinstance(variables.get("params"), Mapping)
    tree = unfreeze(variables) if isinstance(variables, FrozenDict) else variables
    flat = traverse_util.flatten_dict(tree["params"] if whole else tree, keep_empty_nodes=True)
    rngs = jax.random.key(0) if rngs is None else rngs
    owners, abstract = (
        _owners(model, rngs, example_args, example_kwargs) if model is not None else ({}, {})
    )

    def axes_of(key, path, shape):
        if model is not None:
            return _axes_of(owners.get(key), shape, path)
        if len(shape) != 2:
            raise LeftDense(
                f"{len(shape)}-D kernels need the model, which knows the axes of its inputs"
            )
        return _DENSE_AXES

    packed: dict[Any, tuple[SlideWeight, Converted]] = {}
    for key, leaf in flat.items():
        if key[-1] != "kernel":
            continue
        path = "/".join(map(str, key))
        try:
            rule = rules.match(path)
            if isinstance(leaf, _PACKED):
                raise LeftDense("it is packed already")
            kernel = leaf.value if isinstance(leaf, nn.Partitioned) else nn.meta.unbox(leaf)
            axes = axes_of(key, path, jnp.shape(kernel))
            if kernel.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
                raise LeftDense(f"its kernel is {np.dtype(kernel.dtype).name}")
            same = (id(leaf), rule, axes)
            if same not in packed:
                packed[same] = _convert_kernel(leaf, rule, axes, path, prune)
        except LeftDense as reason:
            report.dense[path] = str(reason)
            continue
        flat[key], line = packed[same]
        report.converted.append(dataclasses.replace(line, path=path))
    params = traverse_util.unflatten_dict(flat)
    if model is not None and packed:
        _check_runs(
            model,
            {**abstract, **(tree if whole else {}), "params": params},
            rngs,
            example_args,
            example_kwargs,
        )
    rules.finish(report)
    converted = {**tree, "params": params} if whole else params
    return freeze(converted) if isinstance(variables, FrozenDict) else converted

"""Functions over variables around a layer: `nn.map_variables`, and what Flax builds on it.

Such a function computes another kernel from a layer's kernel. Applied to the leaves of a packed
weight it computes codes and positions of zeros that stand for no kernel, and nothing in their
shapes or dtypes would tell. Flax calls no hook between the function and the layer, but the function
runs in a frame of Python around the layer. That frame knows the variables before and after it, so
the leaves that it has changed are those that are other objects. JAX's own transforms (`nn.scan`,
`nn.vmap`, `nn.remat`) run in other frames.

The code of that frame is found by trying. If a Flax has none that fits, a packed kernel in such a
function is an error.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any

import flax
import flax.linen as nn
import jax
from flax.core import unfreeze

from slidejax.weights.packed import LinearWeight, TreeLayout

__all__ = ["check_unmapped", "check_wrapper", "is_mapped"]

# Primitives whose results have the values of their operands, one by one.
_IDENTITIES = frozenset(
    {"copy", "device_put", "name", "optimization_barrier", "sharding_constraint", "stop_gradient"}
)
_CALLS = frozenset({"jit", "pjit"})  # of another program, whose results may be such, too
_WRAPPERS = (nn.SpectralNorm, nn.WeightNorm)


def is_mapped(kernel: Any, name: str) -> bool:
    """Whether a function over variables that runs around the caller has computed this kernel.

    Args:
      kernel: an array or a node, as a layer sees it.
      name: the name of the layer's parameter, such as "kernel".
    """
    seen = {id(leaf) for leaf in jax.tree.leaves(kernel)}
    codes = _mapping_codes()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes and _has_changed(frame.f_locals, seen, name):
            return True
        frame = frame.f_back
    return False


def check_unmapped(w: LinearWeight | TreeLayout, name: str, path: str) -> None:
    """Raises a ValueError if a function over variables has changed the leaves of a packed weight.

    Args:
      w: the weight, as a layer sees it.
      name: the name of the layer's parameter.
      path: the path of the parameter, for the error.
    """
    if is_mapped(w, name):
        raise _refusal(path)


def check_wrapper(module: nn.Module) -> None:
    """Raises a ValueError if the module is a `WeightNorm` or `SpectralNorm` of a packed weight."""
    if not isinstance(module, _WRAPPERS):
        return
    params = module.layer_instance.variables.get("params", {})
    names = getattr(module, "variable_filter", None)
    for key, leaf in jax.tree.leaves_with_path(params, is_leaf=_is_packed):
        path = "/".join(str(getattr(part, "key", part)) for part in key)
        if _is_packed(leaf) and (not names or any(name in path for name in names)):
            raise _refusal("/".join((*module.layer_instance.path, path)))


def _refusal(path: str) -> ValueError:
    return ValueError(
        f"{path} is packed, and a function over the model's variables (nn.map_variables, "
        "nn.WeightNorm, nn.SpectralNorm) has changed its leaves, which stand for no kernel then. "
        "Skip this layer: convert with (its path, None) before the other rules. Or apply "
        "the function to the kernel once, convert the result, and take the function out of the "
        "model"
    )


def _is_packed(node: Any) -> bool:
    return isinstance(node, LinearWeight | TreeLayout)


class _Probe(nn.Module):
    """Collects the code of the frames that a transform puts around a function."""

    @nn.compact
    def __call__(self, transform: Callable) -> set[CodeType]:
        codes: set[CodeType] = set()

        def collect(_):
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code is not own:
                codes.add(frame.f_code)
                frame = frame.f_back

        own = sys._getframe(0).f_code
        transform(collect)(self)
        return codes


@functools.cache
def _mapping_codes() -> frozenset[CodeType]:
    """The code of Flax that runs a function over variables, and no other transform.

    Raises:
      NotImplementedError: if there is none, so that no such function could be seen.
    """

    def mapped(collect):
        return nn.map_variables(collect, "params", lambda tree: tree)

    def codes_of(transform) -> Any:
        return _Probe(parent=None).apply({"params": {}}, transform)

    codes = frozenset(codes_of(mapped) - codes_of(nn.remat))
    if not codes:
        raise _unknown_flax()
    return codes


def _unknown_flax() -> NotImplementedError:
    return NotImplementedError(
        f"flax {flax.__version__} runs functions over a model's variables (nn.map_variables) in a "
        "way that slidejax does not know. Whether they change packed kernels cannot be seen: "
        "install flax 0.12.8, or take the function out of the model"
    )


def _has_changed(frame: Mapping[str, Any], seen: set[int], name: str) -> bool:
    """Whether the function that runs in a frame has changed a kernel.

    Args:
      frame: the variables of the frame.
      seen: the ids of the kernel's leaves as the layer sees them. Under a transform of JAX inside
        the frame they are in none of its trees. Then any kernel of this name counts.
      name: the name of the layer's parameter.
    """
    if any(known not in frame for known in ("variable_groups", "target", "map_in_fn")):
        raise _unknown_flax()
    before, after = dict(_leaves(frame["variable_groups"][0])), dict(_leaves(frame["target"]))
    if seen and seen <= {id(leaf) for leaf in before.values()}:
        return False
    keys = [key for key in before if jax.tree_util.DictKey(name) in key and key in after]
    keys = [key for key in keys if id(after[key]) in seen] or keys
    changed = {key for key in keys if after[key] is not before[key]}
    return bool(changed) and not changed <= _passed_on(frame)


def _passed_on(frame: Mapping[str, Any]) -> set[tuple]:
    """The keys of leaves whose values the function passes on, as `stop_gradient` does."""
    target = frame["variable_groups"][0]
    closed, made = jax.make_jaxpr(
        lambda trees: tuple(frame["map_in_fn"](unfreeze(tree)) for tree in trees),
        return_shape=True,
    )(target)
    sources = _sources(closed.jaxpr)
    before = [key for key, _ in _leaves(target)]
    after = [key for key, _ in _leaves(made)]
    return {
        key
        for key, source in zip(after, sources, strict=True)
        if source is not None and before[source] == key
    }


def _sources(jaxpr: Any) -> list[int | None]:
    """For each result of a program the number of the operand whose values it has, or None."""
    numbers = {id(var): i for i, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        given = [numbers.get(id(var)) for var in eqn.invars]
        if eqn.primitive.name in _CALLS:
            inner = _sources(eqn.params["jaxpr"].jaxpr)
            given = [None if i is None else given[i] for i in inner]
        elif eqn.primitive.name not in _IDENTITIES:
            continue
        numbers |= {
            id(var): number
            for var, number in zip(eqn.outvars, given, strict=True)
            if number is not None
        }
    return [numbers.get(id(var)) for var in jaxpr.outvars]


def _leaves(tree: Any) -> list[tuple[tuple, Any]]:
    return jax.tree.leaves_with_path(tree)

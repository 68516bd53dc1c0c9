"""The stages of a chain of linear layers, and what is checked of them."""

from __future__ import annotations

import dataclasses
import operator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops.prologue import GLU, Prologue
from slidejax.weights.layout import as_array
from slidejax.weights.packed import LinearWeight, check_held

__all__ = ["Stage", "check_outputs", "check_shapes", "check_stages", "gate_of"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One linear layer of a chain.

    Its input is x of the chain, or the result of the stage before.

    Attributes:
      weight: a `SlideWeight`, or another weight that `slidejax.linear` multiplies with.
      bias: floating `[out]`, or None.
      prologue: an `RMSNorm`, `LayerNorm`, `Activation` or `GLU`, applied to the input first; or
        None. A `GLU` has no array: its input is the gate and up side by side, `[..., 2 in]`.
      residual: an array `[..., out]`, or the number of an earlier stage, whose result is added; or
        None.
    """

    weight: LinearWeight
    bias: jax.Array | None = None
    prologue: Prologue | None = None
    residual: jax.Array | int | None = None


def gate_of(stage: Stage) -> str | None:
    """The activation of the gate in a stage's input; None for none."""
    return stage.prologue.activation if isinstance(stage.prologue, GLU) else None


def check_stages(stages) -> list[Stage]:
    stages = list(stages) if isinstance(stages, (list, tuple)) else stages
    if not isinstance(stages, list) or not all(isinstance(stage, Stage) for stage in stages):
        kinds = stages if not isinstance(stages, list) else [type(s).__name__ for s in stages]
        raise TypeError(f"stages must be a list of Stage, got {kinds!r}")
    if not stages:
        raise ValueError("stages must have at least one Stage, got none")
    for i, stage in enumerate(stages):
        where = f"stages[{i}]"
        if not isinstance(stage.weight, LinearWeight):
            raise TypeError(
                f"{where}.weight must be a LinearWeight, got {type(stage.weight).__name__}"
            )
        check_held(stage.weight, f"{where}.weight")
        prologue = stage.prologue
        if prologue is not None and not isinstance(prologue, Prologue):
            raise TypeError(
                f"{where}.prologue must be an RMSNorm, LayerNorm, Activation or GLU of slidejax, "
                f"got {type(prologue).__name__}"
            )
        if prologue is not None and prologue.ROWS and jax.tree.leaves(prologue):
            raise ValueError(
                f"{where}.prologue must be a {type(prologue).__name__} without an array, of an "
                "input with both halves side by side"
            )
    return stages


def check_outputs(outputs, count: int) -> tuple[int, ...]:
    try:
        wanted = (count - 1,) if outputs is None else tuple(operator.index(i) for i in outputs)
    except TypeError:
        wanted = ()
    if not wanted or len({*wanted}) != len(wanted) or not all(0 <= i < count for i in wanted):
        raise ValueError(
            f"outputs must be different numbers of stages, 0 to {count - 1}, got {outputs!r:.60}"
        )
    return wanted


def check_shapes(x: jax.Array, stages: list[Stage]) -> list[Stage]:
    """The stages with their residuals and biases as arrays."""
    columns, checked = x.shape[-1], []
    widths: list[int] = []
    for i, stage in enumerate(stages):
        where, w = f"stages[{i}]", stage.weight.check(f"stages[{i}].weight")
        wants = w.shape[-2] * (1 if gate_of(stage) is None else 2)
        if columns != wants and not w.is_k_shard:
            raise ValueError(
                f"{where}.weight has {w.shape[-2]} inputs and needs an input of {wants} columns"
                f"{' with its gate' if gate_of(stage) is not None else ''}, got {columns}"
            )
        residual, out = stage.residual, w.out_features
        if isinstance(residual, (bool, np.bool_)):
            raise TypeError(f"{where}.residual must be an array or a number of a stage, got a bool")
        if isinstance(residual, (int, np.integer)):
            residual = int(residual)
            if not 0 <= residual < i or widths[residual] != out:
                raise ValueError(
                    f"{where}.residual must be the number of an earlier stage with {out} outputs, "
                    f"got {residual}"
                )
        elif residual is not None:
            residual = as_array(residual, f"{where}.residual")
            if residual.shape != (*x.shape[:-1], out) or residual.dtype not in (
                jnp.bfloat16,
                jnp.float16,
                jnp.float32,
            ):
                raise ValueError(
                    f"{where}.residual must be bfloat16, float16 or float32 "
                    f"{(*x.shape[:-1], out)}, got {residual.dtype} {residual.shape}"
                )
        bias = None if stage.bias is None else as_array(stage.bias, f"{where}.bias")
        if bias is not None and (
            bias.shape != (out,) or not jnp.issubdtype(bias.dtype, jnp.floating)
        ):
            raise ValueError(
                f"{where}.bias must be floating ({out},), got {bias.dtype} {bias.shape}"
            )
        if stage.prologue is not None:
            stage.prologue.check(
                cast(jax.Array, jax.ShapeDtypeStruct((*x.shape[:-1], columns), x.dtype))
            )
        checked.append(dataclasses.replace(stage, bias=bias, residual=residual))
        widths.append(out)
        columns = out
    return checked

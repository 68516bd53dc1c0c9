"""`linear_chain`: linear layers that follow each other, for few rows in one custom call.

The op is defined as a sequence of `slidejax.linear`, and that is what runs nearly everywhere. It is
one custom call on one GPU where its layers would run in the decode or the Hopper kernel, with few
rows, and one of the two takes them all. The kernels of a call overlap: each is ready before the one
ahead has ended (docs/decode-kernel.md, docs/hopper-kernel.md). The Hopper kernel's lift computes
norms and gates. With the decode kernel a norm is computed by the kernel that reads it, and a gate
by the kernel before.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from slidejax.ops import registry
from slidejax.ops.choice import choose
from slidejax.ops.cuda import calls, prologues
from slidejax.ops.implementations import decode, hopper
from slidejax.ops.implementations.base import Implementation
from slidejax.ops.implementations.dense import DENSE
from slidejax.ops.linear import linear
from slidejax.ops.parameters import fixed
from slidejax.ops.primitive import check_input, make_primitive, map_batched, with_rules
from slidejax.ops.problem import Problem, device_kind
from slidejax.ops.prologue import GLU, RMSNorm
from slidejax.ops.sharding import explicit_mesh, varying_axes
from slidejax.ops.stages import Stage, check_outputs, check_shapes, check_stages, gate_of
from slidejax.weights.packed import SlideWeight

__all__ = ["Stage", "linear_chain", "linear_chain_p", "runs_in"]

# The numbers of activations in the kernels, which tests/cuda/test_limits.py compares.
_ACTIVATION_NUMBERS = {name: i for i, name in enumerate(("silu", "gelu", "gelu_tanh", "relu"))}


@dataclasses.dataclass(frozen=True)
class ChainParams:
    """The static part of a chain, a parameter of its primitive.

    Attributes:
      tree: the structure of the operands: x, and of each stage weight, bias, prologue and an array
        that is its residual.
      adds: of each stage, the number of the earlier one whose result is its residual, or None.
      outputs: the stages whose results are wanted.
      implementation: the name that the caller asked for, or None.
    """

    tree: jax.tree_util.PyTreeDef
    adds: tuple[int | None, ...]
    outputs: tuple[int, ...]
    implementation: str | None

    def operands(self, leaves: Sequence[Any]) -> tuple[Any, tuple[Stage, ...]]:
        """x and the stages, from the op's operands."""
        x, parts = jax.tree.unflatten(self.tree, leaves)
        return x, tuple(
            Stage(weight, bias, prologue, residual if adds is None else adds)
            for (weight, bias, prologue, residual), adds in zip(parts, self.adds, strict=True)
        )

    def rows(self) -> set[int]:
        """The numbers of the operands that have rows: x and residuals."""
        numbers = jax.tree.unflatten(self.tree, range(self.tree.num_leaves))
        return {numbers[0], *(part[3] for part in numbers[1] if part[3] is not None)}


def _sequence(
    x: jax.Array, stages: Sequence[Stage], outputs: Sequence[int], implementation: str | None
) -> list[jax.Array]:
    """The specification: one layer after the other."""
    ys: list[jax.Array] = []
    for stage in stages:
        residual = ys[stage.residual] if isinstance(stage.residual, int) else stage.residual
        x = linear(
            x, stage.weight, stage.bias, implementation, prologue=stage.prologue, residual=residual
        )
        ys.append(x)
    return [ys[i] for i in outputs]


# --- primitive ------------------------------------------------------------------------------------


def _packed(stage: Stage) -> SlideWeight:
    """The weight of a stage of the primitive, which has no others."""
    return cast(SlideWeight, stage.weight)


def _shapes(*operands, settings: ChainParams, sequence: ClosedJaxpr):
    return [(aval.shape, aval.dtype) for aval in sequence.out_avals]


@functools.cache
def _traced(
    settings: ChainParams, operands: tuple[tuple[tuple[int, ...], np.dtype], ...]
) -> ClosedJaxpr:
    """The sequence for operands of these shapes and dtypes.

    The primitive carries it, so that code that walks through a program sees its layers.
    """

    def sequence(*operands):
        return _sequence(*settings.operands(operands), settings.outputs, settings.implementation)

    return jax.make_jaxpr(sequence)(*(jax.ShapeDtypeStruct(*each) for each in operands))


# Up to this many rows a chain is faster than prepared weights one by one (docs/decode-kernel.md).
_FEW_ROWS = 2
# Up to this many rows a chain of weights as they are packed is fastest in the decode kernels. With
# more it is so where all inputs are small.
_DECODE_ROWS = decode.GEMV_ROWS


def _problem(x, stage: Stage, platform: str, implementation: str | None) -> Problem:
    """The product of a stage, as the choice of an implementation sees it."""
    w, dtype, rows = _packed(stage), np.dtype(x.dtype), math.prod(x.shape[:-1])
    return Problem(
        "linear",
        platform,
        device_kind(platform),
        rows,
        w.in_features,
        w.out_features,
        w.pattern,
        dtype,
        w.dtype,
        dtype,
        () if rows <= _FEW_ROWS else tuple(w.prepared),
        implementation,
        stage.residual is not None,
    )


_Call = Callable[[jax.Array, Sequence[Stage], tuple[int, ...]], list[jax.Array]]


def runs_in(
    operands, settings: ChainParams, platform: str, devices: int | None
) -> Implementation | None:
    """The implementation whose custom call the chain is where it is lowered, or None.

    The operands may be shapes alone.
    """
    kernel = _kernel(operands, settings, platform, devices)
    return None if kernel is None else kernel.implementation


def _kernel(operands, settings: ChainParams, platform: str, devices: int | None) -> _Kernel | None:
    if platform != "cuda" or devices != 1:
        return None
    x, stages = settings.operands(operands)
    if not all(isinstance(size, int) for size in x.shape):  # jax.export may leave rows open
        return None
    if 0 in x.shape or any(_packed(stage).out_features == 0 for stage in stages):
        return None
    if any(type(stage.prologue) not in (type(None), RMSNorm, GLU) for stage in stages):
        return None
    problems = [_problem(x, stage, platform, settings.implementation) for stage in stages]
    chosen = {_runs_alone_in(problem) for problem in problems}
    if not chosen <= {kernel.implementation.name for kernel in _KERNELS}:
        return None
    # A chain runs in one kernel, also where the layers one by one would run in different ones.
    few = problems[0].rows <= _DECODE_ROWS or all(
        decode.is_small(p.rows, p.in_features, p.pattern, p.dtype) for p in problems
    )
    few = few and not any(problem.prepared for problem in problems)
    first_decode = few or chosen == {decode.DECODE.name}
    for kernel in _KERNELS if first_decode else reversed(_KERNELS):
        if settings.implementation not in (None, kernel.implementation.name):
            continue
        refused = any(kernel.refusal(problem) is not None for problem in problems)
        if not refused and kernel.fits(x, stages, settings):
            return kernel
    return None


def _runs_alone_in(problem: Problem) -> str:
    """The implementation of a stage alone. On Hopper the dense product of a weight that prunes
    nothing is the Hopper kernel's."""
    name = choose(problem).implementation
    is_hoppers = name == DENSE.name and not problem.pattern.prunes
    return hopper.HOPPER.name if is_hoppers and hopper.refuses_chained(problem) is None else name


def _gates_are_private(x: jax.Array, stages: Sequence[Stage], settings: ChainParams) -> bool:
    """Whether nothing but a gate reads its halves, which the decode kernel keeps for itself."""
    return not any(
        gate_of(stage) is not None
        and (i in settings.outputs or i in settings.adds or stages[i].residual is not None)
        for i, stage in enumerate(stages[1:])
    )


def _lifts_fit(x: jax.Array, stages: Sequence[Stage], settings: ChainParams) -> bool:
    """Whether the Hopper kernel takes the rows with their residuals, and lifts all prologues."""
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    for stage in stages:
        read = cast(jax.Array, jax.ShapeDtypeStruct((rows, columns), x.dtype))
        w = _packed(stage)
        if stage.prologue is not None and not prologues.fused(read, w.dtype, stage.prologue):
            return False
        if rows > hopper.chained_rows(w):
            return False
        columns = w.out_features
    return True


def _lowering(*operands, platform, devices, settings: ChainParams, sequence: ClosedJaxpr):
    kernel = _kernel(operands, settings, platform, devices)
    if kernel is None:
        return jaxpr_as_fun(sequence)(*operands)
    x, stages = settings.operands(operands)
    ys = kernel.call(x.reshape(-1, x.shape[-1]), stages, settings.outputs)
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


linear_chain_p = make_primitive("slidejax_linear_chain", _shapes, _lowering, asks_devices=True)


def _parameters(stage: Stage) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bias, residual and the weights of a norm as the calls take them: `[0]` stands for none."""
    none, norm, residual = jnp.zeros(0, jnp.float32), stage.prologue, stage.residual
    residual = residual.reshape(-1, residual.shape[-1]) if isinstance(residual, jax.Array) else none
    return (
        none if stage.bias is None else stage.bias.astype(jnp.float32),
        residual,
        norm.weight.astype(jnp.float32) if isinstance(norm, RMSNorm) else none,
    )


def _run(
    target: str,
    x: jax.Array,
    stages: Sequence[Stage],
    outputs: tuple[int, ...],
    operands: Sequence[jax.Array],
    workspace: int,
    gates: Sequence[str | None],
    **attributes: np.ndarray,
) -> list[jax.Array]:
    """The results of a chain's custom call, with the attributes that all have."""
    rows = x.shape[0]
    *ys, _ = calls.call(
        target,
        (
            *(
                jax.ShapeDtypeStruct((rows, _packed(stages[i]).out_features), x.dtype)
                for i in outputs
            ),
            jax.ShapeDtypeStruct((workspace,), jnp.uint8),
        ),
        x,
        *operands,
        adds=np.array(
            [s.residual if isinstance(s.residual, int) else -1 for s in stages], np.int64
        ),
        gates=np.array([-1 if g is None else _ACTIVATION_NUMBERS[g] for g in gates], np.int64),
        eps=np.array([getattr(s.prologue, "eps", 0.0) for s in stages], np.float32),
        outputs=np.array(outputs, np.int64),
        **attributes,
    )
    return ys


def _hopper_call(x: jax.Array, stages: Sequence[Stage], outputs: tuple[int, ...]):
    """A lift and a product for each stage (cuda/hopper/handlers.cc)."""
    rows, operands, parts, workspaces = x.shape[0], [], [], []
    for i, stage in enumerate(stages):
        w = _packed(stage)
        weight = hopper.HopperWeight.of(w)
        _, residual, norm = _parameters(stage)
        operands += [*weight.operands(stage.bias), residual, norm]
        workspaces.append(weight.workspace_bytes(rows))
        parts += [rows * weight.lifted_columns, 4 * rows, workspaces[-1]]
        if i not in outputs:
            parts.append(rows * w.out_features * x.dtype.itemsize)
    workspace = calls.ALIGN + sum(-(-size // calls.ALIGN) * calls.ALIGN for size in parts)
    gates = [*map(gate_of, stages)]  # of the inputs of the stages
    call = ("slidejax_chain_hopper", x, stages, outputs, operands, workspace, gates)
    return _run(*call, workspaces=np.array(workspaces, np.int64))


def _decode_call(x: jax.Array, stages: Sequence[Stage], outputs: tuple[int, ...]):
    """A kernel for each stage (cuda/decode/handlers.cc)."""
    first = stages[0].prologue
    x = first.apply(x) if isinstance(first, GLU) else x
    rows, operands, workspace = x.shape[0], [], decode.ALIGN
    for i, stage in enumerate(stages):
        w = _packed(stage)
        operands += [*decode.operands(w), *_parameters(stage)]
        workspace += decode.workspace_bytes(w, rows)
        if i not in outputs:
            workspace += -(-rows * w.out_features * x.dtype.itemsize // decode.ALIGN) * decode.ALIGN
    gates = [*map(gate_of, stages[1:]), None]  # of results
    return _run("slidejax_chain_decode", x, stages, outputs, operands, workspace, gates)


class _Kernel(NamedTuple):
    """A kernel that a chain can run in.

    Attributes:
      implementation: whose kernel it is.
      refusal: why it refuses a stage, or None.
      fits: whether it takes the whole chain.
      call: makes the custom call.
    """

    implementation: Implementation
    refusal: Callable[[Problem], str | None]
    fits: Callable[..., bool]
    call: _Call


_KERNELS = (
    _Kernel(decode.DECODE, decode.DECODE.refusal, _gates_are_private, _decode_call),
    _Kernel(hopper.HOPPER, hopper.refuses_chained, _lifts_fit, _hopper_call),
)


# --- batching, derivative -------------------------------------------------------------------------


@functools.cache
def _op(settings: ChainParams):
    def primal(*operands):
        sequence = _traced(settings, tuple((a.shape, np.dtype(a.dtype)) for a in operands))
        return tuple(linear_chain_p.bind(*operands, settings=settings, sequence=sequence))

    def vmap_rule(op, axis_size, in_batched, *operands):
        return map_batched(op, axis_size, in_batched, settings.rows(), operands)

    def backward(operands, dys):
        def sequence(*operands):
            x, stages = settings.operands(operands)
            stages = tuple(_without_gradient_of_forms(stage) for stage in stages)
            return tuple(_sequence(x, stages, settings.outputs, settings.implementation))

        _, pull = jax.vjp(sequence, *operands)
        gradients = pull(dys)
        return tuple(None if g.dtype == jax.dtypes.float0 else g for g in gradients)

    return with_rules(primal, vmap_rule, backward)


def _without_gradient_of_forms(stage: Stage) -> Stage:
    """The stage. `fixed` has made sure that nobody wants the gradient of values beside forms."""
    w = _packed(stage)
    if not w.prepared:
        return stage
    values = jax.lax.stop_gradient(w.values)
    return dataclasses.replace(stage, weight=w.replace(values=values, prepared=w.prepared))


# --- public ---------------------------------------------------------------------------------------


def linear_chain(
    x: jax.Array,
    stages: Sequence[Stage],
    outputs: Sequence[int] | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Computes linear layers that follow each other, such as the tail of a transformer's layer.

    It is a sequence of `slidejax.linear`, and has its results and its gradients. For a few rows on
    one GPU it is one custom call, whose kernels overlap. Then all of this must hold:

    - The weights are `SlideWeight`s, and every prologue is an `RMSNorm`, a `GLU` or none.
    - Every stage alone would run in the implementation "decode" or "hopper". On Hopper "dense"
      counts as "hopper" where a weight prunes nothing. For up to 2 rows prepared forms do not
      count.
    - One of the two takes all stages. "decode" is asked first for up to 2 rows of weights as they
      are packed, and where all inputs are small. "hopper" takes at most 256 rows, or 64 where a
      weight prunes nothing.
    - With "decode", nothing else uses the input of a `GLU`.

    In such a call a norm's sum has another order, so codes may differ as the contract allows.

    Args:
      x: `[..., in]`, bfloat16, float16 or float32; leading axes are rows.
      stages: the layers. All results have the dtype of x.
      outputs: the numbers of the stages whose results are wanted. None stands for the last one.
      implementation: as in `slidejax.linear`, of every stage.

    Returns:
      The results of these stages, each `[..., out]`.

    Raises:
      ValueError: for shapes, dtypes, activations or numbers of stages that do not fit.
      TypeError: if `stages` are no `Stage`s, or hold no `LinearWeight`, `Prologue` or array.
      NotImplementedError: if the implementation refuses, with the reason.

    An MLP with its residual and its norm:

    >>> from slidejax import GLU, RMSNorm, pack
    >>> gate_up, down = pack(jnp.ones((8, 32)), "6:8"), pack(jnp.ones((16, 8)), "6:8")
    >>> x = jnp.ones((2, 8))
    >>> norm = RMSNorm(jnp.ones(8), eps=0.0)
    >>> gate = GLU(activation="relu")
    >>> (y,) = linear_chain(
    ...     x, [Stage(gate_up, prologue=norm), Stage(down, prologue=gate, residual=x)]
    ... )
    >>> y.shape, float(y[0, 0])
    ((2, 8), 433.0)
    """
    x = check_input(x)
    stages = check_stages(stages)
    wanted = check_outputs(outputs, len(stages))
    registry.check_name(implementation)
    stages = check_shapes(x, stages)
    plain = all(isinstance(s.weight, SlideWeight) and not s.weight.is_k_shard for s in stages)
    parts = tuple(
        (
            fixed(_packed(s)) if plain else s.weight,
            s.bias,
            s.prologue,
            s.residual if isinstance(s.residual, jax.Array) else None,
        )
        for s in stages
    )
    leaves, tree = jax.tree.flatten((x, parts))
    # Inside `shard_map`, and where arrays carry their mesh in their types, layers cut themselves.
    if not plain or varying_axes(*leaves) or explicit_mesh(leaves) is not None:
        return tuple(_sequence(x, stages, wanted, implementation))
    settings = ChainParams(
        tree,
        tuple(s.residual if isinstance(s.residual, int) else None for s in stages),
        wanted,
        implementation,
    )
    return _op(settings)(*leaves)

"""Which implementation runs: what each one can do, and the choice by measurement.

An implementation is a name, the platforms it runs on, and a function that says why it refuses a problem. The choice is
made when an op is lowered for a platform, and is explained by `explain`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight
from slidejax.weights.pattern import Pattern

__all__ = ["Choice", "Problem", "choose", "cuda_calls", "explain", "implementations", "refusals"]

# Bytes from which on the Hopper kernel multiplies a dense one with one row: 3584 x 3584 took as long either way; SmolLM2-135M, whose kernels have
# a megabyte at most, wrote 857 tokens a second with XLA's products and 590 with the kernel's.
_SMALL_KERNEL = 8 << 20

# A program lowered for CUDA on a machine without a GPU is taken to run on this device.
_AHEAD_OF_TIME_DEVICE = "NVIDIA H100 80GB HBM3"


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the choice of an implementation depends on.

    Attributes:
      op: "linear" or "sparse_matmul".
      platform: "cuda" or "default".
      device: the device's kind, such as "NVIDIA H100 80GB HBM3"; "cpu" where it is not CUDA.
      rows, in_features, out_features: the sizes M, K and N.
      pattern: of the weight.
      x_dtype, dtype, out_dtype: of the input, of the weight's values, and of the result (None: raw accumulators).
      prepared: names of the prepared forms that the weight carries.
      requested: the implementation that the caller named, or None.
    """

    op: str
    platform: str
    device: str
    rows: int
    in_features: int
    out_features: int
    pattern: Pattern
    x_dtype: np.dtype
    dtype: np.dtype
    out_dtype: np.dtype | None
    prepared: tuple[str, ...] = ()
    requested: str | None = None

    @classmethod
    def of(cls, op: str, x, w: SlideWeight, settings, platform: str) -> Problem:
        return cls(
            op, platform, device_kind(platform), x.shape[0], w.in_features, w.out_features, w.pattern, np.dtype(x.dtype), w.dtype,
            settings.out_dtype, settings.prepared, settings.implementation,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that runs a problem, and why."""

    implementation: str
    reason: str
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        refused = "".join(f"; not {name}: {why}" for name, why in self.refused.items())
        return f"{self.implementation} ({self.reason}{refused})"


@functools.cache
def device_kind(platform: str) -> str:
    """The kind of the devices that a program lowered for `platform` will run on."""
    if platform != "cuda":
        return "cpu"
    if jax.default_backend() in ("gpu", "cuda"):
        return jax.devices()[0].device_kind
    return _AHEAD_OF_TIME_DEVICE


def _library() -> str | None:
    """Why custom calls cannot be used, or None. Ahead of time, on a machine without a GPU, they can."""
    return _missing("library")


def _missing(part: str) -> str | None:
    """Why a part of the compiled library ("library", "cusparselt", "hopper") cannot be used on this machine's GPU."""
    if jax.default_backend() not in ("gpu", "cuda"):
        return None
    from slidejax.ops.cuda import calls as ffi

    return ffi.missing(part)


def cuda_calls() -> bool:
    """Whether a program lowered for CUDA here may call the compiled library."""
    return _library() is None


# --- implementations --------------------------------------------------------------------------------------------------


def _refuse_none(problem: Problem) -> str | None:
    return None


def _refuse_cuda_only(problem: Problem) -> str | None:
    if problem.platform != "cuda":
        return "runs on CUDA only"
    return _library()


def _nothing_to_skip(problem: Problem) -> str | None:
    """Why a sparse product does not take the pattern "dense", or None."""
    return (
        None
        if problem.pattern.prunes
        else f"the pattern {problem.pattern} prunes nothing, so there are no zeros to skip"
    )


def _refuse_cusparselt(problem: Problem) -> str | None:
    reason = _nothing_to_skip(problem) or _refuse_cuda_only(problem) or _missing("cusparselt")
    if reason is None and problem.dtype == jnp.float32:
        reason = "float32 values are not supported"
    if reason is None and problem.out_dtype is None and not numerics.is_quantized(problem.dtype):
        reason = f"K is split over a mesh, and the library gives no float32 accumulators of {problem.dtype.name} values"
    return reason


def _refuse_hopper(problem: Problem) -> str | None:
    return (
        _nothing_to_skip(problem)
        or _refuse_cuda_only(problem)
        or _without_hopper(problem.device, problem.dtype)
    )


def _without_hopper(device: str, dtype: np.dtype) -> str | None:
    """Why the Hopper kernel does not run on a CUDA device with values of a dtype, or None."""
    reason = _missing("hopper")
    if reason is None and not any(
        name in device for name in ("H100", "H200", "H800", "H20", "GH200")
    ):
        reason = f"needs a Hopper GPU (compute capability 9.0), not {device}"
    if reason is None and not numerics.is_quantized(dtype):
        reason = f"values must be int8 or float8_e4m3fn, not {dtype.name}"
    return reason


def fused_dense(x, kernel, platform: str) -> bool:
    """Whether a dense 8-bit product `[M, K] @ [out, K]^T` runs in the Hopper kernel, scales and bias included. Its bulk copies want rows
    of the kernel of whole 16 bytes; and one row times a small kernel is faster as XLA has it, without tensor cores."""
    if (
        platform != "cuda"
        or _without_hopper(device_kind(platform), np.dtype(kernel.dtype)) is not None
    ):
        return False
    if x.shape[0] == 1 and kernel.shape[0] * kernel.shape[1] < _SMALL_KERNEL:
        return False
    return min(*x.shape, *kernel.shape) > 0 and kernel.shape[1] % 16 == 0


def _cusparselt(lifted, scale_x, w: SlideWeight, bias, out_dtype):
    from slidejax.ops.implementations import cusparselt

    return cusparselt.linear(lifted, scale_x, w, bias, out_dtype)


def _hopper(lifted, scale_x, w: SlideWeight, bias, out_dtype):
    from slidejax.ops.implementations import hopper

    return hopper.matmul(lifted, scale_x, w, bias, out_dtype)


# name -> why it refuses a problem (None: it does not); in the order in which they are preferred when nothing is measured
_IMPLEMENTATIONS: dict[str, Callable[[Problem], str | None]] = {
    "hopper": _refuse_hopper,
    "cusparselt": _refuse_cusparselt,
    "dense": _refuse_none,
    "reference": _refuse_none,
}
# name -> (lifted, scale_x, w, bias, out_dtype) -> y, for those that are custom calls
CUSTOM_CALLS: dict[str, Callable[..., jax.Array]] = {"hopper": _hopper, "cusparselt": _cusparselt}


def implementations() -> tuple[str, ...]:
    """The names that `implementation=` takes.

    >>> implementations()
    ('hopper', 'cusparselt', 'dense', 'reference')
    """
    return tuple(_IMPLEMENTATIONS)


def check_name(implementation: str | None) -> None:
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {', '.join(_IMPLEMENTATIONS)}, got {implementation!r}"
        )


def refusals(problem: Problem) -> dict[str, str]:
    """Every implementation that refuses the problem, with its reason."""
    return {
        name: reason
        for name, refuse in _IMPLEMENTATIONS.items()
        if (reason := refuse(problem)) is not None
    }


def choose(problem: Problem) -> Choice:
    """The implementation for a problem.

    Raises:
      NotImplementedError: if the one that was asked for refuses, or all do, with every reason.
    """
    refused = refusals(problem)
    if problem.requested is not None:
        if problem.requested in refused:
            raise NotImplementedError(
                f"slidejax {problem.op}: implementation {problem.requested!r} refuses: {refused[problem.requested]}"
            )
        return Choice(problem.requested, "asked for")
    candidates = [name for name in _IMPLEMENTATIONS if name not in refused and name != "reference"]
    if problem.platform != "cuda":
        return Choice("dense", "plain JAX", refused)
    if not problem.pattern.prunes:
        return Choice("dense", "nothing is pruned", refused)
    from slidejax.ops import tuning as tune

    measured = tune.lookup(problem, candidates)
    if measured is not None:
        return Choice(*measured, refused)
    # nothing measured near this shape: dense is never slower than what the user had
    return Choice(
        "dense", "no measurement for this device, shape and dtype: run slidejax tune", refused
    )


# --- explaining -------------------------------------------------------------------------------------------------------


def explain(
    fn: Callable[..., Any], *args, platform: str | None = None, **kwargs
) -> list[tuple[Problem, Choice]]:
    """Which implementation each slidejax op of `fn(*args, **kwargs)` will run, and why. Nothing is computed.

    Args:
      fn: any traceable function.
      *args, **kwargs: its arguments; `jax.ShapeDtypeStruct`s will do.
      platform: "cuda" or "cpu"; None for the platform of this process.

    Returns:
      A list of `(Problem, Choice)` in the order of the program.

    >>> import slidejax as sj
    >>> w = sj.pack(jnp.ones((64, 32)), "6:8", dtype="int8")
    >>> [(problem, choice)] = sj.explain(sj.linear, jnp.ones((4, 64)), w, platform="cpu")
    >>> choice.implementation, problem.rows
    ('dense', 4)
    """
    if platform is None:
        platform = "cuda" if jax.default_backend() in ("gpu", "cuda") else "cpu"
    if platform not in ("cuda", "cpu"):
        raise ValueError(f"platform must be 'cuda', 'cpu' or None, got {platform!r}")
    found: list[tuple[Problem, Choice]] = []
    _walk(
        jax.make_jaxpr(fn)(*args, **kwargs).jaxpr,
        "cuda" if platform == "cuda" else "default",
        found,
    )
    return found


def _walk(jaxpr, platform: str, found: list) -> None:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("slidejax_linear", "slidejax_sparse_matmul"):
            settings = eqn.params["settings"]
            op = eqn.primitive.name.removeprefix("slidejax_")
            avals = [v.aval for v in eqn.invars]
            w, _ = settings.weight(avals[settings.inputs.count if op == "linear" else 2 :])
            problem = Problem.of(op, avals[0], w, settings, platform)
            found.append((problem, choose(problem)))
        for inner in _sub_jaxprs(eqn.params.values()):
            _walk(inner, platform, found)


def _sub_jaxprs(values):
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
        elif isinstance(value, (tuple, list)):
            yield from _sub_jaxprs(value)

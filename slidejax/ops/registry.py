"""Which implementation runs: what each one can do, and the choice by measurement.

An implementation is a name, the platforms it runs on, and a function that says why it refuses a problem. The choice is
made when an op is lowered for a platform, and is explained by `explain`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops import tuning
from slidejax.ops.cuda import library
from slidejax.ops.problem import Problem, device_kind
from slidejax.weights import numerics
from slidejax.weights.packed import SlideWeight

__all__ = ["Choice", "choose", "implementations", "refusals"]

# Bytes from which on the Hopper kernel multiplies a dense one with one row: 3584 x 3584 took as long either way; SmolLM2-135M, whose kernels have
# a megabyte at most, wrote 857 tokens a second with XLA's products and 590 with the kernel's.
_SMALL_KERNEL = 8 << 20


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that runs a problem, and why."""

    implementation: str
    reason: str
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        refused = "".join(f"; not {name}: {why}" for name, why in self.refused.items())
        return f"{self.implementation} ({self.reason}{refused})"


# --- implementations --------------------------------------------------------------------------------------------------


def _refuse_none(problem: Problem) -> str | None:
    return None


def _refuse_cuda_only(problem: Problem) -> str | None:
    if problem.platform != "cuda":
        return "runs on CUDA only"
    return library.unusable()


def _nothing_to_skip(problem: Problem) -> str | None:
    """Why a sparse product does not take the pattern "dense", or None."""
    return (
        None
        if problem.pattern.prunes
        else f"the pattern {problem.pattern} prunes nothing, so there are no zeros to skip"
    )


def _refuse_cusparselt(problem: Problem) -> str | None:
    reason = (
        _nothing_to_skip(problem) or _refuse_cuda_only(problem) or library.unusable("cusparselt")
    )
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
    reason = library.unusable("hopper")
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
    measured = tuning.lookup(problem, candidates)
    if measured is not None:
        return Choice(*measured, refused)
    # nothing measured near this shape: dense is never slower than what the user had
    return Choice(
        "dense", "no measurement for this device, shape and dtype: run slidejax tune", refused
    )

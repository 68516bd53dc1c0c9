"""What an implementation of the products is: one object, in one file.

To add one, write a subclass of `Implementation`:

1. `name`: what users pass as `implementation=`, and what tables and reports show.
2. `refuses(problem)`: why it cannot run a problem, as a sentence for users; None if it can.
3. `matmul(...)`: the product of lifted activations and a packed weight. `linear(...)` too, if it computes a whole layer better
   than by lifting first and multiplying then.
4. `form`: if it wants more than the packed form of a weight, what that is and how it is made.
5. `available()`, `facts()`, `settings(...)`, `search(...)`: what `slidejax info`, `bench` and `tune` say about it, where there is
   something to say.

Then give an object of it to `slidejax.ops.registry.register`. From then on `slidejax.implementations()` lists it, `explain` names
it or its reason to refuse, `prepare` makes its form, `bench` and `tune` time it, and the measured table chooses it where it is
the fastest. `slidejax.ops.implementations.reference` is the specification that its results are tested against.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from slidejax.ops.cuda import library
from slidejax.ops.lift_quantize import lift_rows
from slidejax.ops.problem import Problem
from slidejax.ops.prologue import Prologue, inputs_of
from slidejax.weights.packed import SlideWeight

__all__ = ["Form", "Implementation", "cuda_refusal", "nothing_to_skip"]


@dataclasses.dataclass(frozen=True)
class Form:
    """What an implementation keeps of a weight beside its packed form, made once outside the loop by `slidejax.prepare`.

    Weights of the pattern "dense" have none: their values are what a product reads.

    Attributes:
      name: of the array in `SlideWeight.prepared`, and in the tuning table.
      make: from a weight with values `[out, groups, kept]`, without prepared forms, to an array.
      must_gain: how many times as fast a weight must be with this form than with another one to be given this one; more than 1
        for a form that takes much memory.
    """

    name: str
    make: Callable[[SlideWeight], jax.Array]
    must_gain: float = 1.0

    def of(self, w: SlideWeight) -> jax.Array:
        """The form of a weight, or of a batch of weights."""
        return self.make(w) if w.values.ndim == 3 else jax.lax.map(self.of, w)


class Implementation(abc.ABC):
    """One way to compute `slidejax.sparse_matmul` and `slidejax.linear`.

    Attributes:
      name: how users and tables call it.
      form: what it wants beyond the packed form of a weight, or None.
      cuda_only: whether it runs on CUDA alone.
      competes: whether it is timed, and chosen where it is the fastest; else it runs only where it is asked for.
    """

    name: ClassVar[str]
    form: ClassVar[Form | None] = None
    cuda_only: ClassVar[bool] = False
    competes: ClassVar[bool] = True

    @abc.abstractmethod
    def refuses(self, problem: Problem) -> str | None:
        """Why it does not run a problem, or None. It is asked when a program is lowered."""

    def matmul(
        self,
        lifted: jax.Array,
        scale_x: jax.Array,
        w: SlideWeight,
        bias: jax.Array | None,
        out_dtype: Any,
        platform: str = "default",
    ) -> jax.Array:
        """The product of lifted activations and a weight, `float32(acc) * scale_x * scale_w + bias`.

        It may be left out by an implementation that overrides `linear` and refuses problems whose `op` is "sparse_matmul".

        Args:
          lifted: `[M, K']`, in the dtype of the weight's values; neither it nor the weight is empty.
          scale_x: float32 `[M, 1]`.
          w: values `[out, groups, kept]`; with its prepared form if it has been prepared.
          bias: floating `[out]`, or None.
          out_dtype: of the result; None gives the raw accumulators, int32 of int8 values and float32 of all others, without
            scales and bias.
          platform: "cuda" or "default", for which it is lowered.

        Returns:
          `[M, out]`.
        """
        raise NotImplementedError(f"implementation {self.name!r} has no sparse_matmul")

    def linear(
        self,
        x: jax.Array,
        prologue: Prologue | None,
        w: SlideWeight,
        bias: jax.Array | None,
        out_dtype: Any,
        platform: str = "default",
    ) -> jax.Array:
        """A whole linear layer: prologue, quantisation of the rows, product, scales and bias.

        Args:
          x: `[M, in]`, not empty.
          prologue: what is computed on x first, or None.
          w, bias, out_dtype, platform: as in `matmul`; `out_dtype` is never None.

        Returns:
          `[M, out]`.
        """
        inputs, xs = inputs_of(x, prologue)
        lifted, scale_x = lift_rows(xs, w.pattern, w.dtype, inputs)
        return self.matmul(lifted, scale_x, w, bias, out_dtype, platform)

    def available(self) -> str | None:
        """Why nothing of it can run in this process, or None: for `slidejax info`. `refuses` says the same of a problem."""
        return None

    def facts(self) -> dict[str, str | None]:
        """What `slidejax info` says about it, by name, such as the version of a library behind it."""
        return {}

    def settings(self, w: SlideWeight, rows: int) -> str | None:
        """How it runs a product of a weight and that many rows here, in words for `slidejax bench`; None if there is nothing to choose."""
        return None

    def search(self, w: SlideWeight, rows: int) -> str | None:
        """Looks for the fastest settings of its own for a weight and that many rows, before `slidejax tune` times it, and remembers
        them. Says in words what it found; None if there is nothing to choose.

        Raises:
          NotImplementedError, RuntimeError: if the search fails; `tune` then goes on without.
        """
        return None


def cuda_refusal(problem: Problem) -> str | None:
    """Why custom calls of the compiled library cannot run a problem, or None."""
    return library.unusable() if problem.platform == "cuda" else "runs on CUDA only"


def nothing_to_skip(problem: Problem) -> str | None:
    """Why a sparse product does not take the pattern of a problem, or None."""
    if problem.pattern.prunes:
        return None
    return f"the pattern {problem.pattern} prunes nothing, so there are no zeros to skip"

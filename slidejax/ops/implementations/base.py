"""`Implementation`: one way to compute the products is one object in one file.

To add an implementation, write a subclass of `Implementation` with:

1. `name`: the name that users pass as `implementation=`, and that tables and reports show.
2. `refuses(problem)`: the reason why it cannot run a problem, for users to read; None if it can.
3. `matmul(...)`: the product of lifted activations and a packed weight. Override `linear(...)` if a
   whole layer can be computed in a better way than by lifting first and multiplying afterwards.
4. `form`: the array that it needs beside a weight's packed form, and how to make it. Leave it out
   if the packed form is enough.
5. `takes_residual`, if it adds a residual before it rounds. Otherwise that is done for it.
6. `estimate(problem)`: the seconds that it takes where nothing was measured.
7. `available()`, `facts()`, `note(problem)`, `settings(...)`, `search(...)` and
   `search_missing(...)`: what `slidejax info`, `explain`, `bench` and `tune` report about it, and
   what `prepare` lets it search.

All but the first three are optional.

Then pass an object of this class to `slidejax.ops.registry.register`. From then on
`slidejax.implementations()` lists it, `explain` names it or its reason to refuse, `prepare` makes
its form, and `bench` and `tune` time it. The measured table chooses it where it is the fastest.
Test its results against `slidejax.ops.implementations.reference`, the specification.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.ops.cuda import library
from slidejax.ops.lift_quantize import lift_rows
from slidejax.ops.problem import Problem
from slidejax.ops.prologue import Prologue, inputs_of
from slidejax.weights.packed import SlideWeight

__all__ = [
    "CUDA_ONLY",
    "Form",
    "Implementation",
    "add_residual",
    "cuda_refusal",
    "lift_input",
    "nothing_to_skip",
    "with_residual",
]

CUDA_ONLY = "runs on CUDA only"  # why it refuses another platform


@dataclasses.dataclass(frozen=True)
class Form:
    """An array that an implementation keeps beside a weight's packed form.

    `slidejax.prepare` makes it once, outside the loop. Weights of the pattern "dense" have no
    forms: a product reads their values as they are.

    Attributes:
      name: of the array in `SlideWeight.prepared`, and in the tuning table.
      make: makes the array from a weight with values `[out, groups, kept]` and no prepared forms.
      must_gain: `prepare` prefers this form to another one only if the layer is this many times as
        fast with it. Use more than 1 for a form that takes much memory.
      outputs: if the array can be cut over a mesh as the weight's outputs are. Equal parts along
        its first axis must then be the forms of equal parts of the weight, if each part has a
        multiple of this number of outputs. None: the form is that of a whole weight.
      inputs: whether the second axis has the inputs of the kernel, so that it can be cut with K.
      shape: the array's shape for a weight with values `[out, groups, kept]`, which products check
        where it is known.
    """

    name: str
    make: Callable[[SlideWeight], jax.Array]
    must_gain: float = 1.0
    outputs: int | None = None
    inputs: bool = False
    shape: Callable[[SlideWeight], tuple[int, ...]] | None = None

    def of(self, w: SlideWeight) -> jax.Array:
        """Makes the form of a weight, or of a batch of weights."""
        return self.make(w) if w.values.ndim == 3 else jax.lax.map(self.of, w)

    def bears(self, out_features: int, out_parts: int, k_parts: int) -> bool:
        """Whether the array can be cut when the weight is cut into these numbers of parts."""
        if k_parts > 1 and not self.inputs:
            return False
        if out_parts == 1:
            return True
        return self.outputs is not None and out_features % (self.outputs * out_parts) == 0


class Implementation(abc.ABC):
    """One way to compute `slidejax.sparse_matmul` and `slidejax.linear`.

    Attributes:
      name: its name for users and in tables.
      form: the `Form` that it keeps of a weight, or None.
      cuda_only: whether it runs on CUDA alone.
      reads_packed: whether it needs nothing but the packed form to be faster than a product that
        unpacks the weight first. It is then chosen for a weight without prepared forms, even where
        nothing was measured.
      competes: whether it is timed, and chosen where it is the fastest. Otherwise it runs only if
        the caller asks for it.
      takes_residual: whether it has a `matmul` and a `linear` with one more argument, `residual`:
        bfloat16, float16 or float32 `[M, out]`, which they add in float32 after the bias; or None.
        Otherwise they are asked for float32 results, and the residual is added to these.
    """

    name: ClassVar[str]
    form: ClassVar[Form | None] = None
    cuda_only: ClassVar[bool] = False
    reads_packed: ClassVar[bool] = False
    competes: ClassVar[bool] = True
    takes_residual: ClassVar[bool] = False

    @abc.abstractmethod
    def refuses(self, problem: Problem) -> str | None:
        """The reason why it does not run a problem, or None. Called when a program is lowered."""

    def refusal(self, problem: Problem) -> str | None:
        """The reason why it does not run a problem, with its residual if it has one, or None.

        This is what is asked before it runs. It is `refuses` of the problem that it is given.
        """
        if problem.has_residual and not self.takes_residual:
            float32 = np.dtype(np.float32)
            problem = dataclasses.replace(problem, has_residual=False, out_dtype=float32)
        return self.refuses(problem)

    def run_sparse_matmul(
        self, lifted, scale_x, w, bias, residual, out_dtype, platform: str = "default"
    ) -> jax.Array:
        """`matmul`, and the residual `[M, out]` added if there is one.

        Raises:
          ValueError: if there is a residual and `out_dtype` is None.
        """
        if residual is not None and out_dtype is None:
            raise ValueError(
                "residual must be None where out_dtype is None, since raw accumulators have no "
                f"scales yet; got a residual of shape {residual.shape}"
            )
        operands = (lifted, scale_x, w, bias)
        if residual is not None and self.takes_residual:
            matmul: Callable[..., jax.Array] = self.matmul
            return matmul(*operands, out_dtype, platform, residual=residual)
        return with_residual(
            lambda dtype: self.matmul(*operands, dtype, platform), out_dtype, residual
        )

    def run_linear(
        self, x, prologue, w, bias, residual, out_dtype, platform: str = "default"
    ) -> jax.Array:
        """`linear`, and the residual `[M, out]` added if there is one."""
        operands = (x, prologue, w, bias)
        if residual is not None and self.takes_residual:
            linear: Callable[..., jax.Array] = self.linear
            return linear(*operands, out_dtype, platform, residual=residual)
        return with_residual(
            lambda dtype: self.linear(*operands, dtype, platform), out_dtype, residual
        )

    def matmul(
        self,
        lifted: jax.Array,
        scale_x: jax.Array,
        w: SlideWeight,
        bias: jax.Array | None,
        out_dtype: Any,
        platform: str = "default",
    ) -> jax.Array:
        """Multiplies lifted activations with a weight: `float32(acc) * scale_x * scale_w + bias`.

        An implementation that overrides `linear` may leave this method out. It then has to refuse
        problems whose `op` is "sparse_matmul".

        Args:
          lifted: `[M, K']` in the dtype of the weight's values. Neither this nor the weight is
            empty.
          scale_x: float32 `[M, 1]`.
          w: one weight, values `[out, groups, kept]`, with its prepared form if that was made.
          bias: floating `[out]`, or None.
          out_dtype: dtype of the result. None asks for the raw accumulators, without scales and
            bias: int32 for int8 values, float32 for all others.
          platform: the platform that the product is lowered for, "cuda" or "default".

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
        """Computes a whole linear layer: prologue, quantised rows, product, scales and bias.

        Args:
          x: `[M, in]`, not empty.
          prologue: is applied to x first; or None.
          w, bias, out_dtype, platform: as in `matmul`, but `out_dtype` is never None.

        Returns:
          `[M, out]`.
        """
        return self.matmul(*lift_input(x, prologue, w), w, bias, out_dtype, platform)

    def estimate(self, problem: Problem) -> float | None:
        """The seconds that a problem takes, where nothing was measured.

        It is made of published rates of the device and of what the implementation reads, writes and
        multiplies (`slidejax.ops.estimates`). Estimates decide only where all implementations that
        can run a problem have one.

        Args:
          problem: one that the implementation does not refuse.

        Returns:
          Seconds; None if it cannot tell.
        """
        return None

    def note(self, problem: Problem) -> str | None:
        """What `explain` says about how it runs a problem, beside the reason of the choice."""
        return None

    def available(self) -> str | None:
        """The reason why it cannot run in this process at all, or None, for `slidejax info`."""
        return None

    def facts(self) -> dict[str, str | None]:
        """Further lines of `slidejax info` by name, such as the version of a library."""
        return {}

    def settings(self, w: SlideWeight, rows: int) -> str | None:
        """The settings with which it runs `rows` rows, in words, for `slidejax bench`.

        None if it has no settings.
        """
        return None

    def search(self, w: SlideWeight, rows: int) -> str | None:
        """Finds and remembers its fastest settings for `rows` rows.

        `slidejax tune` calls it before it times the implementation.

        Returns:
          The settings that it found, in words; None if it has no settings.

        Raises:
          NotImplementedError, RuntimeError: if the search fails. `tune` then times it as it is.
        """
        return None

    def search_missing(self, w: SlideWeight, rows: Sequence[int] | None = None) -> None:
        """Searches for the fastest settings for numbers of rows that have none yet.

        `prepare` calls it on a GPU, outside a trace, for a weight that gets the prepared form. It
        may take seconds. What fails is a warning.

        Args:
          w: the weight whose shape to search for.
          rows: numbers of rows of x. None takes all usual ones.
        """
        return None


def lift_input(
    x: jax.Array, prologue: Prologue | None, w: SlideWeight
) -> tuple[jax.Array, jax.Array]:
    """The rows of x after its prologue, lifted for a weight: `(lifted, scale_x)` of `matmul`."""
    inputs, xs = inputs_of(x, prologue)
    return lift_rows(xs, w.pattern, w.dtype, inputs)


def add_residual(y: jax.Array, residual: jax.Array, out_dtype) -> jax.Array:
    """Adds a residual to float32 results of the same shape and rounds once."""
    return (y + residual.astype(jnp.float32)).astype(out_dtype)


def with_residual(
    run: Callable[[Any], jax.Array], out_dtype, residual: jax.Array | None
) -> jax.Array:
    """The result of `run(dtype)`, which adds no residual itself, with the residual if there is one.

    The residual is added to float32 results, so that they are rounded once, as always.
    """
    if residual is None:
        return run(out_dtype)
    return add_residual(run(jnp.float32), residual, out_dtype)


def cuda_refusal(problem: Problem) -> str | None:
    """The reason why custom calls of the compiled library cannot run a problem, or None."""
    return library.unusable() if problem.platform == "cuda" else CUDA_ONLY


def nothing_to_skip(problem: Problem) -> str | None:
    """The reason why a sparse product does not take a problem's pattern, or None."""
    if problem.pattern.prunes:
        return None
    return f"the pattern {problem.pattern} prunes nothing, so there are no zeros to skip"

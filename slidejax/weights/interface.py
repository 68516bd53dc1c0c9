"""The interface of weights, which take the place of kernels in a tree of parameters."""

from __future__ import annotations

import abc
from typing import Any, Self

import jax

__all__ = ["LinearWeight", "TreeLayout", "WrappedWeight"]


class LinearWeight(abc.ABC):
    """The weight of a linear layer. In a tree of parameters it takes the place of a kernel.

    It is a pytree, and `slidejax.linear` multiplies with it. Its subclasses are `SlideWeight`,
    `slidejax.trainable.MasterWeight`, `slidejax.adapters.AdaptedWeight` and
    `slidejax.variants.serving.ServingWeight`. Each of them keeps every promise of this interface.
    """

    @property
    @abc.abstractmethod
    def packed(self) -> Any:
        """The `SlideWeight` inside; None for a `ServingWeight`, which has none."""

    @property
    def weight(self) -> Any:
        """The `SlideWeight` inside, for code that needs one.

        Raises:
          ValueError: if there is none.
        """
        packed = self.packed
        if packed is None:
            raise ValueError(
                f"a {type(self).__name__} was made to serve (slidejax.variants.serving) and holds "
                f"no packed form: use what it was made from"
            )
        return packed

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel that this stands for, `[..., in, out]`."""

    @property
    def out_features(self) -> int:
        return self.shape[-1]

    @property
    def is_k_shard(self) -> bool:
        """Whether this holds only some of the groups of K (inside `shard_map`)."""
        return False

    @abc.abstractmethod
    def check(self, name: str = "w") -> Self:
        """Returns itself if its leaves have the dtypes and shapes that they were made with.

        Raises:
          ValueError: naming the leaf, its dtype or shape and what was expected.
        """

    @abc.abstractmethod
    def trained(self) -> Self:
        """Itself with a bool in place of each leaf: whether `slidejax.partition` trains it."""

    @property
    def promoted(self) -> jax.Array | None:
        """The values that a layer promotes together with its input and bias, or None.

        8-bit values and master values keep their dtype, so they take no part.
        """
        return None

    def with_promoted(self, values: jax.Array) -> Self:
        """Itself with promoted values. Only called where `promoted` is not None."""
        raise ValueError(f"the values of a {type(self).__name__} take no part in promotion")


class WrappedWeight(LinearWeight):
    """A weight that computes its own product: `slidejax.linear` calls its `linear`."""

    @abc.abstractmethod
    def linear(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        *,
        implementation: str | None = None,
        out_dtype: Any = None,
        reduce_axis: Any = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """The product; arguments and result are those of `slidejax.linear`."""


class TreeLayout(abc.ABC):
    """A node that takes the place of a kernel and says where weights are held. It is no weight.

    It is a pytree (`slidejax.variants.projections`). Code that multiplies with weights, trains them
    or adds to them takes the layout apart first.
    """

    @abc.abstractmethod
    def not_a_weight(self) -> ValueError:
        """The error for code that wants a weight in its place."""

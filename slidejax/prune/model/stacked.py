"""Parameters that hold the kernels of many layers, and their elements, which pruning sees alone.

`nn.scan`, `nnx.scan` and `nn.vmap` stack the parameters of equal layers along the first axes. Each
element of such a stack is a kernel of its own, with inputs of its own. So pruning gives it a path:
the element 3 of `layers/up/kernel` is `layers/up/kernel[3]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Elements", "Stacked", "element_path", "for_elements", "joined"]

# path of a parameter -> the sizes of the leading axes along which its elements are stacked
Stacks = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(eq=False)
class Stacked:
    """A value of a program that is made of other values, stacked along its first axes.

    Attributes:
      elements: an array of objects, the numbers of the values.
      whole: the number of the stacked value, once something reads it.
    """

    elements: Any
    whole: int | None = None

    @classmethod
    def of(cls, values: list[Any]) -> Stacked:
        """Values that are stacked along one axis."""
        elements = np.empty(len(values), object)
        elements[:] = values
        return cls(elements)

    def __getitem__(self, index: Any) -> Any:
        found = self.elements[index]
        return Stacked(found) if isinstance(found, np.ndarray) else found


def element_path(path: str, index: tuple[int, ...]) -> str:
    """The path of an element of a stack.

    >>> element_path("layers/up/kernel", (3, 0))
    'layers/up/kernel[3,0]'
    """
    return f"{path}[{','.join(map(str, index))}]" if index else path


class Elements(Mapping):
    """Leaves by path, in which a stack is replaced by its elements.

    An element is cut out when it is asked for, so the leaves are in memory once.

    Args:
      leaves: the leaves by path.
      stacks: which of them are stacks.

    >>> leaves = Elements({"a": np.zeros((2, 3)), "b": np.zeros(4)}, {"a": (2,)})
    >>> list(leaves), leaves["a[1]"].shape
    (['a[0]', 'a[1]', 'b'], (3,))
    """

    def __init__(self, leaves: Mapping[str, Any], stacks: Stacks):
        self._leaves = leaves
        self._places: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in leaves:
            for index in np.ndindex(*stacks.get(path, ())):
                self._places[element_path(path, index)] = path, index

    def __getitem__(self, path: str) -> Any:
        parameter, index = self._places[path]
        leaf = self._leaves[parameter]
        return leaf[index] if index else leaf

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def replaced(self, new: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves in their order, with new arrays for some paths. Stacks are whole again."""
        leaves = dict(self._leaves)
        stacked: dict[str, dict[tuple[int, ...], Any]] = {}
        for path, array in new.items():
            parameter, index = self._places[path]
            if index:
                stacked.setdefault(parameter, {})[index] = array
            else:
                leaves[parameter] = array
        for parameter, changed in stacked.items():
            leaf = jnp.asarray(leaves[parameter])
            for index, array in changed.items():
                leaf = leaf.at[index].set(array)
            leaves[parameter] = leaf
        return leaves


def joined(results: Mapping[str, Any], stacks: Stacks) -> dict[str, Any]:
    """Results by path, where those of a stack's elements become one.

    Args:
      results: path of a kernel -> a tree of arrays. If one element has a result, all have.
      stacks: which parameters are stacks.

    >>> joined({"a[0]": np.ones(2), "a[1]": np.zeros(2)}, {"a": (2,)})["a"].tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    results = dict(results)
    for path, lead in stacks.items():
        if element_path(path, (0,) * len(lead)) in results:
            parts = [results.pop(element_path(path, index)) for index in np.ndindex(*lead)]
            results[path] = _stack(parts, lead)
    return results


def for_elements(fn: Callable[..., Any], lead: tuple[int, ...], *arrays: Any) -> Any:
    """The function of each element of stacked arrays; its results are stacked as the arrays are.

    Args:
      fn: takes an element of each array, and returns a tree of arrays.
      lead: sizes of the axes along which the arrays are stacked. Without any the function gets the
        arrays as they are.
      *arrays: the arrays `[*lead, ...]`.
    """
    if not lead:
        return fn(*arrays)
    return _stack([fn(*(x[index] for x in arrays)) for index in np.ndindex(*lead)], lead)


def _stack(parts: list[Any], lead: tuple[int, ...]) -> Any:
    def stack(*leaves):
        of = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
        return of.stack(leaves).reshape(*lead, *leaves[0].shape)

    return jax.tree.map(stack, *parts)

"""Weights in the registries that are not JAX's own: those of `flax.serialization` and `jax.export`.

`flax.serialization` saves a TrainState, with gradients and optimiser states in the structure of the
parameters. `jax.export` keeps the structure of a program's arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flax import serialization
from jax import export

__all__ = ["register", "register_exported"]


def register(
    cls: type,
    leaves: tuple[str, ...],
    static: Callable[[Any], dict[str, Any]],
    replace: Callable[..., Any],
    load: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Makes a kind of weight known to `flax.serialization` and `jax.export`.

    Args:
      cls: the class, a pytree with keys.
      leaves: the names of the fields that are saved. Prepared forms are none of them.
      static: the other fields, as JSON has them. A state is only loaded into a weight with equal
        ones.
      replace: `(weight, **leaves) -> weight` with other leaves and no prepared forms.
      load: makes the static part of the pytree from what `static` gave, and `"prepared"` from its
        names of prepared forms. None: `jax.export` is not told.
    """

    def to_state(weight) -> dict[str, Any]:
        state = {leaf: serialization.to_state_dict(getattr(weight, leaf)) for leaf in leaves}
        return {**state, "static": json.dumps(static(weight), sort_keys=True)}

    def from_state(weight, state: dict[str, Any]):
        if not isinstance(state, dict) or set(state) != {*leaves, "static"}:
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"the state of a {cls.__name__} has {[*leaves, 'static']}, got {found}"
            )
        here = json.dumps(static(weight), sort_keys=True)
        if state["static"] != here:
            raise ValueError(
                f"the saved {cls.__name__} has {state['static']}, and the target has {here}"
            )
        read = {
            leaf: serialization.from_state_dict(getattr(weight, leaf), state[leaf], name=leaf)
            for leaf in leaves
        }
        return replace(weight, **read)

    serialization.register_serialization_state(cls, to_state, from_state)
    if load is None:
        return

    def serialize(aux: Any) -> bytes:
        # A weight of placeholders has the static part alone.
        weight = cls.tree_unflatten(aux, [None] * (len(leaves) + len(_names(aux))))  # type: ignore[attr-defined]
        return json.dumps({**static(weight), "prepared": _names(aux)}).encode()

    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"slidejax.{cls.__name__}",
        serialize_auxdata=serialize,
        deserialize_auxdata=lambda data: load(json.loads(data)),
    )


def register_exported(cls: type) -> None:
    """Makes a pytree that holds no weight known to `jax.export`.

    Args:
      cls: a NamedTuple, or a dataclass of `jax.tree_util.register_dataclass` whose static fields
        JSON can hold.
    """
    name = f"slidejax.{cls.__name__}"
    if issubclass(cls, tuple):
        export.register_namedtuple_serialization(cls, serialized_name=name)
        return
    export.register_pytree_node_serialization(
        cls,
        serialized_name=name,
        # A number of NumPy is equal to the one of Python that comes back.
        serialize_auxdata=lambda aux: json.dumps(list(aux), default=float).encode(),
        deserialize_auxdata=lambda data: tuple(json.loads(data)),
    )


def _names(aux: Any) -> list[str]:
    """The names of prepared forms, which end the static part of a packed weight."""
    last = aux[-1] if isinstance(aux, tuple) and aux else ()
    return list(last) if isinstance(last, tuple) and all(isinstance(n, str) for n in last) else []

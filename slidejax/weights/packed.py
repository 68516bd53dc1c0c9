"""The packed weight, `SlideWeight`, and the functions around it: `pack`, `unpack`, `quantize`.

If the kept columns of a group are sorted, pair number `w` of them always lies inside window `w`. So
packing needs no search. With the two zeros of a group at `z1 < z2`, kept value `j` comes from
column `j + (j >= z1) + (j >= z2 - 1)`. Packing and unpacking are therefore three shifted copies and
a selection between them. With the pattern "dense" a group has no zeros, and packing only pads,
casts or quantises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from slidejax.weights import numerics
from slidejax.weights.checks import check_content, check_sums, check_values
from slidejax.weights.interface import LinearWeight, TreeLayout, WrappedWeight
from slidejax.weights.layout import (
    as_array,
    check_kernel,
    check_mask,
    from_groups,
    scatter_values,
)
from slidejax.weights.magnitude import magnitude
from slidejax.weights.packing import packed_arrays, quantized_values
from slidejax.weights.pattern import Pattern
from slidejax.weights.registries import register

__all__ = [
    "LinearWeight",
    "SlideWeight",
    "TreeLayout",
    "WrappedWeight",
    "check_held",
    "check_weight",
    "pack",
    "quantize",
    "unpack",
]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class SlideWeight(LinearWeight):
    """A pruned and packed weight, the pytree that takes the place of a kernel `[in, out]`.

    Attributes:
      values: `[..., out, groups, kept]`, int8, float8_e4m3fn, bfloat16, float16 or float32: the
        kept values in column order. A row is the compressed operand of the 2:4 instruction.
      zeros: `[..., out, groups]`, uint8: the columns of a group's two zeros, `z1 | z2 << 4` with
        `z1 < z2`. The pattern "dense" has none: `[..., out, 0]`.
      scale: `[..., out]`, float32: `kernel = values * scale`. Ones if the values are not quantised.
      pattern: the `Pattern`. Static.
      in_features: inputs of the whole kernel, without padding. Static.
      prepared: name -> array: the forms that implementations use beside the packed one.
        `slidejax.prepare` makes them; they are never saved. Other values have other forms, so
        `replace` and `dataclasses.replace` drop them. A `jax.tree.map` cannot see that it changes
        values alone: call `slidejax.drop_prepared` before it.

    Leading axes are a batch of weights, as under `vmap` and `scan`.

    >>> w = pack(jnp.ones((10, 4)), "6:8")
    >>> w.values.shape, w.zeros.shape, w.scale.shape, w.in_features, w.out_features
    ((4, 8, 6), (4, 8), (4,), 10, 4)
    """

    values: jax.Array
    zeros: jax.Array
    scale: jax.Array
    pattern: Pattern
    in_features: int
    prepared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # The forms and what they were made of. `dataclasses.replace` hands this on beside new fields.
    _made: tuple[Any, ...] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self):
        """Drops forms that `dataclasses.replace` has taken from a weight of other values."""
        made, static = self._made, (self.pattern, self.in_features)
        if made is not None and made[0] is self.prepared:
            _, values, zeros, of = made
            if values is not self.values or zeros is not self.zeros or of != static:
                object.__setattr__(self, "prepared", {})
        made = (self.prepared, self.values, self.zeros, static) if self.prepared else None
        object.__setattr__(self, "_made", made)

    def __repr__(self) -> str:
        """One line without the arrays' contents; the leaves may be anything, such as specs."""
        leaves = {"values": self.values, "zeros": self.zeros, "scale": self.scale, **self.prepared}
        parts = [f"{name}={_short(leaf)}" for name, leaf in leaves.items()]
        return f"SlideWeight({self.pattern}, in_features={self.in_features}, {', '.join(parts)})"

    @property
    def packed(self) -> SlideWeight:
        return self

    @property
    def out_features(self) -> int:
        return self.values.shape[-3]

    @property
    def groups(self) -> int:
        """Groups held here, padding included. A shard of K holds fewer than the whole weight."""
        return self.values.shape[-2]

    @property
    def held_features(self) -> int:
        """Inputs held here: those of the kernel, or of the shard of K, whose groups are whole."""
        return self.groups * self.pattern.group if self.is_k_shard else self.in_features

    @property
    def lifted_columns(self) -> int:
        """K': the lifted columns of the groups held here, padding included."""
        return self.groups * self.pattern.windows * 4

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return np.dtype(self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel that this stands for, `[..., in, out]`."""
        return (*self.values.shape[:-3], self.in_features, self.out_features)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, padding and prepared forms included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def is_k_shard(self) -> bool:
        """Whether this holds only some of the groups of K (inside `shard_map`)."""
        return self.groups != self.pattern.groups(self.in_features)

    @property
    def promoted(self) -> jax.Array | None:
        return None if numerics.is_quantized(self.dtype) else self.values

    def with_promoted(self, values: jax.Array) -> SlideWeight:
        return self.replace(values=values, prepared={})

    def trained(self) -> SlideWeight:
        """Trains the values if they are floats, and nothing else."""
        frozen = jax.tree.map(lambda _: False, self)
        values = not numerics.is_quantized(self.dtype)
        return frozen.replace(values=values, prepared=frozen.prepared)

    def replace(self, **changes) -> SlideWeight:
        """Itself with other fields. Prepared forms of other values are dropped.

        >>> w = pack(jnp.ones((8, 2)), "6:8").replace(prepared={"dense": jnp.ones((2, 8))})
        >>> len(w.replace(scale=2 * w.scale).prepared), len(w.replace(values=2 * w.values).prepared)
        (1, 0)
        """
        if not changes.keys().isdisjoint(("values", "zeros", "pattern", "in_features")):
            changes.setdefault("prepared", {})
        if "prepared" in changes:  # given beside other values they are taken as theirs
            changes["prepared"] = dict(changes["prepared"])
        return dataclasses.replace(self, **changes)

    def partition_spec(self, out: Any = None, k: Any = None, batch: tuple = ()) -> SlideWeight:
        """The tree of `PartitionSpec`s that cuts this weight over a mesh.

        Args:
          out: mesh axis (or axes) over which outputs are split.
          k: mesh axis over which K is split, by whole blocks of 8 groups.
          batch: mesh axes of leading batch axes, None where not split.

        Returns:
          A `SlideWeight` whose leaves are `PartitionSpec`s, for `NamedSharding` and `shard_map`.

        Raises:
          ValueError: if K is split and `in_features` is not a whole number of blocks; or if there
            is a prepared form that does not have the kernel's axes, `[..., out, in]`.

        >>> w = pack(jnp.ones((128, 4)), "6:8")
        >>> tuple(w.partition_spec(out="o", k="k").values)
        ('o', 'k', None)

        Every leaf has a spec of its own:

        >>> mesh = jax.make_mesh((1,), ("o",))
        >>> put = lambda leaf, spec: jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))
        >>> jax.tree.map(put, w, w.partition_spec(out="o")).shape
        (128, 4)
        """
        if k is not None and self.in_features % self.pattern.block:
            raise ValueError(
                f"k={k!r}: in_features {self.in_features} is not a whole number of blocks of "
                f"{self.pattern.block} columns (pattern {self.pattern}), so K cannot be split over "
                f"a mesh"
            )
        # The leaves may be anything, such as boxed arrays, where there are no forms.
        alike = {
            name
            for name, form in self.prepared.items()
            if jnp.shape(form) == (*self.values.shape[:-2], self.held_features)
        }
        if (out is not None or k is not None) and (others := sorted({*self.prepared} - alike)):
            raise ValueError(
                f"prepared forms {others} have axes of their own: drop them (slidejax."
                "drop_prepared), place the weight, and prepare it there (slidejax.prepare)"
            )
        zeros = PartitionSpec(*batch, out, k if self.pattern.prunes else None)
        kernel = PartitionSpec(*batch, out, k)
        return self.replace(
            values=PartitionSpec(*batch, out, k, None),
            zeros=zeros,
            scale=PartitionSpec(*batch, out),
            prepared={n: kernel if n in alike else PartitionSpec(*batch) for n in self.prepared},
        )

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        children = (
            (key("values"), self.values),
            (key("zeros"), self.zeros),
            (key("scale"), self.scale),
        )
        names = tuple(sorted(self.prepared))
        prepared = tuple((key(f"prepared_{name}"), self.prepared[name]) for name in names)
        return children + prepared, (self.pattern, self.in_features, names)

    @classmethod
    def tree_unflatten(cls, static, children):
        pattern, in_features, names = static
        values, zeros, scale, *prepared = children
        return cls(
            values, zeros, scale, pattern, in_features, dict(zip(names, prepared, strict=True))
        )

    def check_arrays(self, name: str = "w") -> None:
        """Raises TypeError, naming the leaf, if one is no array, such as a box of Flax."""
        for part in ("values", "zeros", "scale"):
            leaf = getattr(self, part)
            if not (hasattr(leaf, "dtype") and hasattr(leaf, "ndim")):
                boxed = ": take it out of its box first, flax.linen.meta.unbox(tree)"
                raise TypeError(
                    f"{name}.{part} must be an array, got {type(leaf).__name__}"
                    f"{boxed if hasattr(leaf, 'unbox') else ''}"
                )

    def check(self, name: str = "w") -> SlideWeight:
        """Returns self if the leaves are what `pack` makes.

        Raises:
          ValueError: naming the leaf, its dtype or shape and what was expected.
          TypeError: if a leaf is no array.
        """
        self.check_arrays(name)
        expected = (
            "values int8, float8_e4m3fn, bfloat16, float16 or float32, zeros uint8, scale float32"
        )
        if self.values.ndim < 3 or self.values.shape[-1] != self.pattern.kept:
            raise ValueError(
                f"{name}.values must be [..., out, groups, {self.pattern.kept}] for pattern "
                f"{self.pattern}, "
                f"got shape {self.values.shape}"
            )
        *rows, groups, _ = self.values.shape
        zeros = (*rows, groups if self.pattern.prunes else 0)
        if self.zeros.shape != zeros or self.scale.shape != tuple(rows):
            raise ValueError(
                f"{name}: zeros and scale must have shapes {zeros} and {tuple(rows)} "
                f"for values {self.values.shape}, got {self.zeros.shape} and {self.scale.shape}"
            )
        dtypes = self.zeros.dtype, self.scale.dtype
        try:
            numerics.check_dtype(self.values.dtype)
            good = dtypes == (jnp.uint8, jnp.float32)
        except ValueError:
            good = False
        if not good:
            raise ValueError(
                f"{name} has leaves values {self.values.dtype}, zeros {dtypes[0]}, scale "
                f"{dtypes[1]}; pack makes {expected}. "
                "A cast of the whole tree (tree.map(astype), to_bf16) ruins packed weights: cast "
                "before packing"
            )
        if self.values.dtype == jnp.int8:
            check_sums(self.in_features, self.pattern, name)
        return self


register(
    SlideWeight,
    ("values", "zeros", "scale"),
    lambda w: {"pattern": str(w.pattern), "in_features": w.in_features},
    lambda w, **leaves: w.replace(prepared={}, **leaves),
    lambda kept: (Pattern.parse(kept["pattern"]), kept["in_features"], tuple(kept["prepared"])),
)


def _short(leaf: Any) -> str:
    """A leaf in a few words: an array's dtype and shape."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return repr(leaf)


def pack(
    kernel: jax.Array,
    pattern: str | Pattern,
    dtype=None,
    mask: jax.Array | None = None,
    scale: jax.Array | None = None,
) -> SlideWeight:
    """Prunes (unless masked) and packs a kernel.

    Args:
      kernel: `[..., in, out]`; leading axes are a batch of kernels.
      pattern: such as `"6:8"`; "dense" prunes nothing.
      dtype: of the values. None keeps the kernel's dtype. int8 or float8_e4m3fn quantises a float
        kernel with one scale for each output (`slidejax.weights.numerics`). A kernel of int8 or
        float8_e4m3fn holds codes, whose scale is 1.
      mask: bool `[..., in, out]`, True where a weight is kept. None prunes by magnitude.
      scale: `[..., out]`, positive: the scales of 8-bit values, such as those that
        `slidejax.prune.round_kernel` finds. Values beyond the largest code are clipped. None takes
        the smallest scales that clip nothing.

    Returns:
      The `SlideWeight`. Without quantisation nothing is lost:
      `unpack(w) == where(mask & (kernel != 0), kernel, +0)`.

    Raises:
      ValueError: for a bad shape, pattern or dtype, or integers that are no int8 codes; for int8
        values if more than 133,144 columns are kept, whose sum may not fit into int32; or if a
        group would keep more than `pattern.kept` non-zeros, a scale is not positive, or a value
        becomes infinite in `dtype`. The message names the row and the group. Under tracing values
        are not known, and such a row becomes nan instead.

    >>> w = pack(jnp.arange(1., 9.).reshape(8, 1), "6:8")
    >>> unpack(w).ravel().tolist()
    [0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    """
    pattern = Pattern.parse(pattern)
    kernel = check_kernel(kernel)
    dtype = numerics.check_dtype(
        kernel.dtype if dtype is None else dtype, "kernel's dtype" if dtype is None else "dtype"
    )
    check_values(kernel, dtype)
    if dtype == jnp.int8:
        check_sums(kernel.shape[-2], pattern, "kernel", 128 if kernel.dtype == jnp.int8 else 127)
    mask = magnitude(kernel, pattern) if mask is None else check_mask(mask, kernel)
    rounds = numerics.is_quantized(dtype) and not numerics.is_quantized(kernel.dtype)
    if scale is not None:
        scale = as_array(scale, "scale").astype(jnp.float32)
        if not rounds or scale.shape != (*kernel.shape[:-2], kernel.shape[-1]):
            raise ValueError(
                "scale is for an 8-bit dtype and has the shape of the outputs, "
                f"{(*kernel.shape[:-2], kernel.shape[-1])}; "
                f"got shape {scale.shape} for {dtype.name} values of a {kernel.dtype.name} kernel"
            )
        if numerics.known(lambda scale: ((scale <= 0) | jnp.isinf(scale)).any(), scale):
            with jax.ensure_compile_time_eval():
                least = float(scale.min())
            raise ValueError(f"scale must be positive and finite, got {least:g}")
    arrays = packed_arrays(kernel, mask, scale, pattern, dtype)
    values, zeros, scale, crowded, infinite, wrong = arrays
    w = SlideWeight(values, zeros, scale, pattern, kernel.shape[-2])
    if isinstance(wrong, jax.core.Tracer) or not bool(wrong):
        return w
    if infinite.any():
        at = tuple(int(i) for i in np.argwhere(np.asarray(infinite))[0])
        raise ValueError(
            f"kernel has finite values in output {at[-1]} that become infinite in dtype "
            f"{dtype.name}, whose largest number is {float(jnp.finfo(dtype).max):g}"
        )
    *batch, row, group = (int(i) for i in np.argwhere(np.asarray(crowded))[0])
    where = f"kernel {tuple(batch)}, " if batch else ""
    raise ValueError(
        f"mask keeps more than {pattern.kept} non-zeros in {where}output {row}, group {group} "
        "(inputs "
        f"{group * pattern.group} to {group * pattern.group + pattern.group - 1}); pattern "
        f"{pattern} allows "
        f"{pattern.kept}. {int(crowded.sum())} group(s) are too full"
    )


def quantize(w: SlideWeight, dtype) -> SlideWeight:
    """Quantises float-packed values to 8 bit, with one scale for each output.

    Prepared forms are dropped.

    Raises:
      ValueError: if `dtype` is not int8 or float8_e4m3fn, or the values are quantised already.

    >>> w = quantize(pack(jnp.eye(8), "6:8"), "int8")
    >>> w.dtype.name, int(w.values.max())
    ('int8', 127)
    """
    dtype = numerics.check_dtype(dtype)
    check_weight(w)
    if not numerics.is_quantized(dtype):
        raise ValueError(f"dtype must be int8 or float8_e4m3fn, got {dtype.name}")
    if numerics.is_quantized(w.dtype):
        raise ValueError(
            f"w is quantised already (values {w.dtype.name}); quantize takes float-packed weights"
        )
    if dtype == jnp.int8:
        check_sums(w.in_features, w.pattern, "w")
    values, scale = jax.jit(quantized_values, static_argnums=1)(w.values, dtype)
    return w.replace(values=values, scale=scale, prepared={})


def unpack(w: SlideWeight) -> jax.Array:
    """The kernel `[..., in, out]` with its zeros: float32 for 8-bit values, else their own dtype.

    Raises:
      ValueError: if the leaves are not what `pack` makes, or hold only a shard of K. Under tracing
        their content is not known, and an output that stands for no kernel is nan instead.
    """
    check_weight(w)
    if w.is_k_shard:
        raise ValueError(
            f"w holds {w.groups} of {w.pattern.groups(w.in_features)} groups: a shard of K cannot "
            "be unpacked"
        )
    kernel, sound = _unpack(w.replace(prepared={}))
    if not isinstance(sound, jax.core.Tracer) and not bool(sound):
        check_content(w.values, w.zeros, w.scale, w.pattern)
    return kernel


@jax.jit
def _unpack(w: SlideWeight) -> tuple[jax.Array, jax.Array]:
    """The kernel, with nan in outputs that stand for none; and whether there are no such outputs.

    Those are outputs whose leaves were changed after packing, such as by a `tree.map`.
    """
    groups = scatter_values(w.values, w.zeros)
    z1, z2 = w.zeros & 15, w.zeros >> 4
    sound = ((z1 < z2) & (z2 < w.pattern.group)).all(-1)
    if numerics.is_quantized(w.dtype):
        groups = groups.astype(jnp.float32) * w.scale[..., None, None]
    else:
        sound &= w.scale == 1
    kernel = from_groups(groups, w.in_features)
    nan = jnp.full((), jnp.nan, kernel.dtype)
    return jnp.where(sound[..., None, :], kernel, nan), sound.all()


def check_weight(w, name: str = "w", *, held: bool = True) -> SlideWeight:
    """Returns `w` if it is a sound `SlideWeight`; raises TypeError or ValueError otherwise.

    Args:
      w: the weight.
      name: its name, for errors.
      held: whether its leaves must be arrays, and not only say their shapes and dtypes.
    """
    if isinstance(w, TreeLayout):
        raise w.not_a_weight()
    if not isinstance(w, SlideWeight):
        raise TypeError(f"{name} must be a SlideWeight (see slidejax.pack), got {type(w).__name__}")
    if held:
        check_held(w, name)
    return w.check(name)


def check_held(w: LinearWeight, name: str = "w") -> None:
    """Raises a TypeError that names a leaf that has a shape and no numbers."""
    for path, leaf in jax.tree.leaves_with_path(w):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} must be an array, got ShapeDtypeStruct: for "
                "shapes alone trace the function (jax.eval_shape)"
            )

"""Rules say which linear layers of a model are packed, and how. A report says what was done.

Rules are ordered pairs `(regex, choice)`. The regex must match the whole '/'-joined path of a
linear layer's kernel, such as `model/layers/0/mlp/up_proj/kernel`. The final `/kernel` (or another
name of the parameter) may be left out. The first rule that matches decides.

The choice is a pattern (`"6:8"`, which stands for `Rule("6:8")`), a `Rule`, or None. The pattern
`"dense"` quantises and prunes nothing. None skips the layer, which then stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.kinds import check_flag, check_function, check_kind
from slidejax.weights import numerics
from slidejax.weights.magnitude import magnitude
from slidejax.weights.packed import SlideWeight, pack
from slidejax.weights.pattern import Pattern

__all__ = [
    "HEADS",
    "ROUTERS",
    "Converted",
    "Prune",
    "Report",
    "Rule",
    "RuleSet",
    "Skipped",
    "nbytes",
    "pack_by_rule",
]

# (kernel [..., in, out], pattern, path) -> mask; or (mask, kernel), if the kept values change too;
# or (mask, kernel, scale), if they are rounded to 8 bit already
Prune = Callable[[jax.Array, Pattern, str], Any]


# The paths of output embeddings, and of the routers of experts. A pattern alone leaves them as they
# are: pruning them costs much accuracy and saves little. Heads are often tied to the embedding.
HEADS = (
    r"(?:.*/)?(?:lm_head|lm_head/decoder|predictions/decoder|vocab_projector|generator_lm_head)"
    r"(?:/(?:kernel|w))?"
)
ROUTERS = r"(?:.*/)?(?:[^/]*router[^/]*|[^/]*(?:moe|experts)[^/]*/gate)(?:/[^/]+)?"

_UNSET: Any = object()  # an argument that was not given, where None has a meaning


class Skipped(Exception):
    """A layer stays as it is. The message is the reason, for the report."""


LeftDense = Skipped  # its former name


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the linear layers that a rule matches are pruned and packed.

    Attributes:
      pattern: such as `"6:8"`. The pattern "dense" prunes nothing.
      qdtype: dtype of the packed values. int8 and float8_e4m3fn quantise the weight and the
        activations. bfloat16, float16 and float32 store the values in that dtype, and None keeps
        the kernel's own dtype. With the pattern "dense" and one of these the layer computes the
        same as before; it can be trained, or quantised later.
      optional: whether the rule may decide no layer. Otherwise the report and a warning name such a
        rule. Rules that differ in this alone are equal.

    Args:
      dtype: another name for `qdtype`, as in `slidejax.pack`.

    Raises:
      ValueError: for a bad pattern or dtype.
      TypeError: for a pattern of another kind, or `optional` that is no bool.

    >>> Rule("6:8")
    Rule(pattern=Pattern(kept=6, group=8), qdtype=dtype('int8'))
    """

    pattern: Pattern
    qdtype: Any = "int8"
    optional: bool = dataclasses.field(default=False, compare=False, repr=False)

    def __init__(
        self,
        pattern: str | Pattern,
        qdtype: Any = "int8",
        *,
        dtype: Any = _UNSET,
        optional: bool = False,
    ):
        if dtype is not _UNSET:
            qdtype = dtype
        object.__setattr__(self, "optional", check_flag(optional, "optional"))
        object.__setattr__(self, "pattern", Pattern.parse(pattern))
        object.__setattr__(
            self, "qdtype", None if qdtype is None else numerics.check_dtype(qdtype, "qdtype")
        )

    @property
    def dtype(self) -> np.dtype | None:
        """`qdtype`, by the name that `slidejax.pack` has for it."""
        return self.qdtype

    @classmethod
    def of(cls, given: Any, name: str = "rule") -> Rule:
        """A rule as it is, and a pattern as one.

        Args:
          given: what a caller gave.
          name: of the argument, for the error.

        Raises:
          TypeError, ValueError: naming the argument.
        """
        if isinstance(given, cls):
            return given
        try:
            return cls(given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} must be a Rule or a pattern: {error}") from error

    def __str__(self) -> str:
        return f"{self.pattern} {'unquantised' if self.qdtype is None else self.qdtype.name}"


@dataclasses.dataclass(frozen=True)
class Converted:
    """One layer that was packed.

    Attributes:
      path: the path of its kernel.
      rule: the rule that decided.
      dtype: dtype of the packed values.
      shape: the kernel's shape as `[..., in, out]`.
      bytes_before, bytes_after: bytes of the kernel and of the packed weight.
    """

    path: str
    rule: Rule
    dtype: np.dtype
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass
class Report:
    """The report of a conversion.

    Pass an empty one as `report=`; it is filled in and can be printed.

    Attributes:
      converted: the layers that were packed.
      skipped: path -> why the layer was left as it is.
      unmatched: a line for each rule that decided no layer and is not optional.
      allow_unmatched: whether rules may decide no layer at all. Otherwise that is an error.
      notes: other facts, such as how the model was calibrated.
      unpacked: path -> shape and owner of each parameter with two axes or more that belongs to no
        linear layer, such as embeddings and layers that slidejax does not know.
    """

    converted: list[Converted] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    unmatched: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    allow_unmatched: bool = False
    unpacked: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, given: Report | None) -> Report:
        """The report that a caller gave, or a new one.

        Raises:
          TypeError: if it is something else.
          ValueError: if it is that of another conversion.
        """
        report = cls() if given is None else check_kind(given, cls, "report", "a Report or None")
        if report.converted or report.skipped:
            count = len(report.converted) + len(report.skipped)
            raise ValueError(f"report must be empty, and has {count} layers of another conversion")
        return report

    @property
    def dense(self) -> dict[str, str]:
        """The former name of `skipped`."""
        return self.skipped

    @property
    def bytes_before(self) -> int:
        """Bytes of the packed layers' kernels before they were packed."""
        return sum(layer.bytes_before for layer in self.converted)

    @property
    def bytes_after(self) -> int:
        """Bytes of the packed weights, padding and prepared forms included."""
        return sum(layer.bytes_after for layer in self.converted)

    def __str__(self) -> str:
        width = max((len(layer.path) for layer in self.converted), default=0)
        lines = [
            f"{len(self.converted)} layers converted, {mib(self.bytes_before, 2)} MiB to "
            f"{mib(self.bytes_after, 2)} MiB; {len(self.skipped)} skipped"
        ]
        lines += [
            f"  {layer.path:<{width}}  {layer.rule.pattern!s:>5} {layer.dtype.name:<13} "
            f"{'x'.join(map(str, layer.shape))}  "
            f"{mib(layer.bytes_before, 2)} MiB to {mib(layer.bytes_after, 2)} MiB"
            for layer in sorted(self.converted, key=lambda layer: _natural(layer.path))
        ]
        lines += [f"  skipped: {path}: {reason}" for path, reason in self.skipped.items()]
        lines += [f"  not packed: {path}: {what}" for path, what in self.unpacked.items()]
        return "\n".join(lines + [f"  {line}" for line in (*self.unmatched, *self.notes)])


def _natural(path: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split("/")]


def mib(size: int, digits: int) -> str:
    """Bytes as MiB, without the unit.

    >>> mib(3 << 19, 2)
    '1.50'
    """
    return f"{size / 2**20:.{digits}f}"


_NO_RULE = "no rule matches"


class RuleSet:
    """Ordered rules, checked. They count how many layers each of them decided.

    Args:
      rules: `[(regex, "6:8" | Pattern | Rule | None)]`. A single pattern or `Rule` is for all
        linear layers but output embeddings (`HEADS`) and the routers of experts (`ROUTERS`).

    Raises:
      ValueError: naming the rule by its index, for a bad regular expression, pattern or form of
        rules.

    >>> rules = RuleSet([(".*/head", None), (".*", "6:8")])
    >>> str(rules.match("model/up/kernel"))
    '6:8 int8'
    """

    def __init__(self, rules):
        self._all = isinstance(rules, (str, Pattern, Rule))
        if self._all:
            rules = [(".*", rules)]
        # An iterator is empty when it is read again, and a conversion reads its rules twice.
        good = isinstance(rules, Iterable) and not isinstance(rules, (Iterator, Mapping, Set))
        if not good:
            raise ValueError(
                'rules must be an ordered list such as [(".*/mlp/.*", "6:8")], '
                f"got {type(rules).__name__}"
            )
        self._rules = [_parse(index, entry) for index, entry in enumerate(rules)]
        self._decided = [0] * len(self._rules)
        self._shadowed = [0] * len(self._rules)
        self._chosen: list[str] = []  # the layers that a rule wants converted

    def match(self, path: str) -> Rule:
        """The rule for a layer.

        Raises:
          Skipped: with the reason, if the layer stays as it is.
        """
        if self._all and (re.fullmatch(HEADS, path) or re.fullmatch(ROUTERS, path)):
            what = "a router" if re.fullmatch(ROUTERS, path) else "an output embedding"
            raise Skipped(f"{what}, which a pattern alone leaves: a rule of its own converts it")
        matching = [
            i
            for i, (regex, _) in enumerate(self._rules)
            if regex.fullmatch(path) or regex.fullmatch(path.rpartition("/")[0])
        ]
        if not matching:
            raise Skipped(_NO_RULE)
        self._decided[matching[0]] += 1
        for i in matching[1:]:
            self._shadowed[i] += 1
        rule = self._rules[matching[0]][1]
        if rule is None:
            raise Skipped("a rule says so")
        self._chosen.append(path)
        return rule

    def unmatched(self) -> list[str]:
        """A line for each rule that has decided no layer so far, but those that may."""
        return self._idle(optional=False)

    def _idle(self, *, optional: bool) -> list[str]:
        """A line for each rule that has decided no layer so far; with or without optional ones."""
        lines = []
        for i, (regex, rule) in enumerate(self._rules):
            excused = rule is not None and rule.optional and not optional
            if not self._decided[i] and not excused:
                why = (
                    f"earlier rules took its {self._shadowed[i]} layers"
                    if self._shadowed[i]
                    else "it matched no linear layer"
                )
                lines.append(f"rules[{i}] ({regex.pattern!r}) decided nothing: {why}")
        return lines

    def finish(self, report: Report) -> Report:
        """Writes the unmatched rules into the report and warns about them.

        It also warns if rules chose layers and none of these could be converted.

        Raises:
          ValueError: naming the rules, if none of them decided any layer. A report with
            `allow_unmatched` allows it.
        """
        report.unmatched.extend(self.unmatched())
        seen = [layer.path for layer in report.converted] + list(report.skipped)
        example = f" (paths look like {seen[0]!r})" if seen else " (no linear layer was found)"
        # A layer that is skipped for a reason of its own was not missed by the rules.
        missed = all(reason == _NO_RULE for reason in report.skipped.values())
        if self._rules and missed and not any(self._decided) and not report.allow_unmatched:
            raise ValueError(
                f"{'; '.join(self._idle(optional=True))}{example}: nothing would be converted. "
                "report=slidejax.Report(allow_unmatched=True) allows it"
            )
        if report.unmatched:
            warnings.warn("slidejax: " + "; ".join(report.unmatched) + example, stacklevel=3)
        lost = [path for path in self._chosen if path in report.skipped]
        if lost and not report.converted:
            more = f"; {len(lost) - 1} more are skipped" if len(lost) > 1 else ""
            warnings.warn(
                f"slidejax: no layer was converted: {lost[0]}: {report.skipped[lost[0]]}{more}",
                stacklevel=3,
            )
        return report


def _parse(index: int, entry) -> tuple[re.Pattern, Rule | None]:
    if (
        not isinstance(entry, (tuple, list))
        or len(entry) != 2
        or not isinstance(entry[0], (str, re.Pattern))
    ):
        raise ValueError(
            f'rules[{index}] must be a pair (regex, "6:8" | Rule | None), got {entry!r}'
        )
    regex, what = entry
    try:
        regex = re.compile(regex)
    except re.error as error:
        raise ValueError(f"rules[{index}]: bad regular expression {regex!r}: {error}") from error
    if what is None or isinstance(what, Rule):
        return regex, what
    if not isinstance(what, (str, Pattern)):
        raise ValueError(
            f'rules[{index}] must say "6:8", a Rule or None, got {type(what).__name__}'
        )
    try:
        return regex, Rule(what)
    except ValueError as error:
        raise ValueError(f"rules[{index}] ({regex.pattern!r}): {error}") from error


def nbytes(tree) -> int:
    """Bytes of the arrays of a tree, which may be traced."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def pack_by_rule(
    kernel: jax.Array, rule: Rule, path: str, prune: Prune | None = None
) -> SlideWeight:
    """Prunes and packs a kernel as a rule says.

    Args:
      kernel: `[..., in, out]`.
      rule: the rule.
      path: the kernel's path, for `prune` and for errors.
      prune: how to prune; None: by magnitude.

    Raises:
      ValueError: naming the path, if the kernel cannot be pruned or packed so.
      TypeError: if `rule` is no `Rule`, or `prune` no function.
    """
    check_kind(rule, Rule, "rule", "a Rule")
    check_function(prune, "prune", optional=True)
    try:
        _check_finite(kernel)
        result = (
            magnitude(kernel, rule.pattern) if prune is None else prune(kernel, rule.pattern, path)
        )
        if result is None or (isinstance(result, tuple) and len(result) not in (2, 3)):
            got = "None" if result is None else f"{len(result)} of them"
            raise ValueError(
                f"prune must return a mask, (mask, kernel) or (mask, kernel, scale), got {got}"
            )
        mask, kernel, scale = (
            (*result, None)[:3] if isinstance(result, tuple) else (result, kernel, None)
        )
        return pack(kernel, rule.pattern, dtype=rule.qdtype, mask=mask, scale=scale)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_finite(kernel: jax.Array) -> None:
    """Raises a ValueError for inf or nan. Under tracing they give outputs of nan instead."""
    concrete = isinstance(kernel, (jax.Array, np.ndarray))
    if not concrete or not jnp.issubdtype(kernel.dtype, jnp.floating):
        return
    if numerics.known(numerics.all_finite, kernel) is False:
        raise ValueError("the kernel holds inf or nan")

"""Patterns under a budget."""

import re

import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import slidejax as sj
from slidejax.prune.model.choose import choose
from slidejax.prune.model.costs import multiplications, packed_bytes

PATTERNS = [sj.Pattern.parse(p) for p in ("dense", "14:16", "6:8", "4:6", "2:4")]


@given(
    st.lists(st.tuples(st.floats(0, 10), st.sampled_from([32, 64, 200])), min_size=1, max_size=8),
    st.sampled_from([multiplications, packed_bytes]),
)
def test_the_budget_is_kept_and_uniform_is_never_better(layers, cost):
    shapes = {str(i): (width, 16) for i, (_, width) in enumerate(layers)}
    needs = {
        str(i): {p: weight * 2.0**-i for i, p in enumerate(reversed(PATTERNS))}
        for i, (weight, _) in enumerate(layers)
    }
    rules = dict(choose(needs, shapes, "6:8", cost=cost))
    uniform = sum(cost(shape, sj.Pattern(6, 8)) for shape in shapes.values())
    assert sum(cost(shapes[path], rule.pattern) for path, rule in rules.items()) <= uniform * (
        1 + 1e-6
    )
    assert sum(needs[path][rule.pattern] for path, rule in rules.items()) <= sum(
        of[sj.Pattern(6, 8)] for of in needs.values()
    ) * (1 + 1e-9)


def test_a_budget_that_is_too_small():
    with pytest.raises(ValueError, match="less than what the cheapest patterns cost"):
        choose({"a": {sj.Pattern(6, 8): 1.0}}, {"a": (8, 8)}, "2:4")


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 2)), min_size=3, max_size=9))
def test_layers_of_a_group_choose_together(layers):
    needs = {
        f"{group}/{i}": {p: weight * 2.0**-j for j, p in enumerate(reversed(PATTERNS))}
        for i, (weight, group) in enumerate(layers)
    }
    rules = choose(needs, dict.fromkeys(needs, (64, 16)), "6:8", groups=[r"(\d)/\d+"])
    chosen = dict(zip(needs, (rule.pattern for _, rule in rules), strict=True))
    assert all(re.fullmatch(regex, path) for (regex, _), path in zip(rules, needs, strict=True))
    for group in "012":
        assert len({p for path, p in chosen.items() if path.startswith(group)}) <= 1
    uniform = sj.Pattern(6, 8)
    assert sum(multiplications((64, 16), p) for p in chosen.values()) <= len(
        needs
    ) * multiplications((64, 16), uniform) * (1 + 1e-6)
    assert sum(needs[path][p] for path, p in chosen.items()) <= sum(
        of[uniform] for of in needs.values()
    ) * (1 + 1e-9)


def test_groups_that_are_wrong():
    needs, shapes = (
        {"a/q": {sj.Pattern(6, 8): 1.0}, "a/k": {sj.Pattern(4, 6): 1.0}},
        dict.fromkeys(("a/q", "a/k"), (8, 8)),
    )
    with pytest.raises(ValueError, match=r"groups\[1\].*matches no layer"):
        choose(needs, shapes, "14:16", groups=["a/q", "b/.*"])
    with pytest.raises(ValueError, match="no pattern in common"):
        choose(needs, shapes, "14:16", groups=["(a)/."])


def test_a_layer_may_be_quantised_only():
    """The pattern dense costs as much as dense 8-bit products do.

    A rule with None goes before the others.
    """
    dense, half = sj.Pattern.parse("dense"), sj.Pattern(2, 4)
    needs = {"a": {half: 9.0, dense: 0.0}, "b": {half: 1.0, dense: 0.0}}
    shapes = {"a": (64, 16), "b": (64, 16)}
    for budget, chosen in (
        (1.5, ["dense int8", "2:4 int8"]),
        (2.0, ["dense int8"] * 2),
        (1.49, ["2:4 int8", "dense int8"][:1] * 2),
    ):
        assert [str(rule) for _, rule in choose(needs, shapes, budget * 64 * 16)] == chosen
    model = nnx.Sequential(
        nnx.Linear(64, 16, rngs=nnx.Rngs(0)),
        nnx.Linear(16, 8, rngs=nnx.Rngs(1)),
        nnx.Linear(8, 4, rngs=nnx.Rngs(2)),
    )
    report = sj.Report()
    sj.nnx.convert(
        model, [(".*/2/kernel", None), (".*/1/kernel", "2:4"), (".*", "dense")], report=report
    )
    assert [str(line.rule) for line in report.converted] == ["dense int8", "2:4 int8"] and list(
        report.skipped.values()
    ) == ["a rule says so"]

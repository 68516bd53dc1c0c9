"""Rules and the report."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slidejax as sj
from slidejax.rules import Converted, LeftDense, RuleSet, Skipped, mib, pack_by_rule


def test_first_match_wins_and_kernel_may_be_left_out():
    rules = RuleSet(
        [
            (".*/up", "4:6"),
            (".*/up/kernel", "2:4"),
            ("head/kernel", None),
            (re.compile(".*"), sj.Rule("14:16", None)),
        ]
    )
    assert rules.match("m/up/kernel") == sj.Rule("4:6")
    assert rules.match("down/kernel") == sj.Rule("14:16", qdtype=None)
    with pytest.raises(Skipped, match="a rule says so"):
        rules.match("head/kernel")
    (line,) = rules.unmatched()
    assert "rules[1]" in line and "earlier rules took its 1 layers" in line


def test_the_whole_path_must_match():
    with pytest.raises(Skipped, match="no rule matches"):
        RuleSet([("up", "6:8")]).match("m/up/kernel")


@given(
    st.lists(st.sampled_from(["a/.*", "b/.*", ".*", "c"]), max_size=5),
    st.sampled_from(["a/x/kernel", "b/kernel", "c/kernel"]),
)
def test_match_is_the_first_fullmatch(regexes, path):
    patterns = ["2:4", "4:6", "6:8", "8:10", "10:12"]
    rules = RuleSet(list(zip(regexes, patterns, strict=False)))
    want = [
        p
        for r, p in zip(regexes, patterns, strict=False)
        if re.fullmatch(r, path) or re.fullmatch(r, path[: -len("/kernel")])
    ]
    if want:
        assert str(rules.match(path).pattern) == want[0]
    else:
        with pytest.raises(Skipped):
            rules.match(path)


@pytest.mark.parametrize(("rules", "message"), [
    ([("(", "6:8")], r"rules\[0\]: bad regular expression '\('"),
    ([(".*", "6:8"), (".*", "5:8")], r"rules\[1\].*kept = group - 2"),
    ([(".*", 8)], r"rules\[0\] must say"),
    ([".*"], r"rules\[0\] must be a pair"),
    ({".*": "6:8"}, "ordered list"),
    (3, "ordered list"),
    ("6", "'6'"),
])  # fmt: skip
def test_bad_rules_are_one_clear_error(rules, message):
    with pytest.raises(ValueError, match=message):
        RuleSet(rules)


def test_the_dtype_has_two_names():
    for dtype in ("float8_e4m3fn", None):
        rule = sj.Rule("6:8", dtype=dtype)
        assert rule == sj.Rule("6:8", qdtype=dtype) and rule.dtype == rule.qdtype


def test_bad_qdtype():
    with pytest.raises(ValueError, match="qdtype must be one of"):
        sj.Rule("6:8", qdtype="int4")


def test_report_lists_layers_in_their_order():
    paths = ("a/10/up/kernel", "a/2/up/kernel", "a/2/down/kernel", "a/b/kernel", "10/kernel")
    rule, int8 = sj.Rule("6:8"), np.dtype(np.int8)
    report = sj.Report([Converted(path, rule, int8, (8, 2), 64, 20) for path in paths])
    listed = [line.split()[0] for line in str(report).splitlines()[1:]]
    assert listed == [
        "a/b/kernel",
        "a/2/down/kernel",
        "a/2/up/kernel",
        "a/10/up/kernel",
        "10/kernel",
    ]


def test_report_prints_and_warns():
    rules, report = RuleSet([("a", "6:8"), ("nothing.*", "6:8")]), sj.Report()
    report.skipped["b/kernel"] = "no rule matches"
    rules.match("a/kernel")
    with pytest.warns(
        UserWarning,
        match=r"rules\[1\] \('nothing\.\*'\) decided nothing.*paths look like 'b/kernel'",
    ):
        rules.finish(report)
    text = str(report)
    assert (
        "0 layers converted" in text
        and "skipped: b/kernel: no rule matches" in text
        and "nothing" in text
    )
    assert report.dense is report.skipped and LeftDense is Skipped, "the former names"


def test_no_warning_when_all_rules_are_used():
    rules = RuleSet([("a", "6:8")])
    rules.match("a/kernel")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules.finish(sj.Report())


def test_a_method_may_change_the_kernel():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)

    def prune(kernel, pattern, path):
        assert path == "a/kernel"
        return sj.prune.magnitude(kernel, pattern), 2 * kernel

    w = pack_by_rule(kernel, sj.Rule("6:8", None), "a/kernel", prune)
    np.testing.assert_array_equal(sj.unpack(w), 2 * sj.unpack(sj.pack(kernel, "6:8")))
    with pytest.raises(ValueError, match="a/kernel: mask"):
        pack_by_rule(kernel, sj.Rule("6:8"), "a/kernel", lambda *_: jnp.ones((2, 2), bool))


@given(st.integers(0, 2**40))
def test_sizes_are_rounded_to_the_digits_that_are_asked_for(size):
    for digits in (1, 2):
        assert abs(float(mib(size, digits)) * 2**20 - size) <= 2**20 * 0.51 * 10**-digits
    assert (mib(3 << 19, 1), mib(3 << 19, 2)) == ("1.5", "1.50")


def test_rules_that_decide_nothing_at_all_are_an_error():
    rules, report = RuleSet([("typo.*", "6:8"), (".*hed", None)]), sj.Report()
    report.skipped["b/kernel"] = "no rule matches"
    with pytest.raises(ValueError, match=r"'typo\.\*'.*'\.\*hed'.*paths look like 'b/kernel'"):
        rules.finish(report)
    with pytest.warns(UserWarning, match="decided nothing"):
        rules.finish(sj.Report(allow_unmatched=True))
    variables = {"params": {"up": {"kernel": jnp.ones((8, 8))}}}
    for prune in (sj.linen.convert, lambda v, r: sj.linen.convert(v, r, report=sj.Report())):
        with pytest.raises(ValueError, match=r"'up/kernl'.*paths look like 'up/kernel'"):
            prune(variables, [("up/kernl", "6:8")])


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.booleans()), max_size=4))
def test_only_rules_that_must_decide_a_layer_are_named(entries):
    rules = RuleSet([(r, sj.Rule("6:8", optional=optional)) for r, optional in entries])
    names = [r for r, _ in entries]
    try:
        rules.match("a/kernel")
    except Skipped:
        assert "a" not in names
    idle = {i for i, (r, _) in enumerate(entries) if r != "a" or i != names.index("a")}
    named = {int(re.match(r"rules\[(\d+)\]", line)[1]) for line in rules.unmatched()}
    assert named == {i for i in idle if not entries[i][1]}


def test_an_optional_rule_is_excused_but_not_if_nothing_is_converted():
    variables = {"params": {"up": {"kernel": jnp.ones((8, 8))}}}
    missing = ("down/kernel", sj.Rule("6:8", "float8_e4m3fn", optional=True))
    assert missing[1] == sj.Rule("6:8", "float8_e4m3fn") and str(missing[1]).startswith(
        "6:8 float8"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sj.linen.convert(variables, [missing, ("up/kernel", "6:8")], report=sj.Report())
    with pytest.raises(ValueError, match=r"'down/kernel'.*nothing would be converted"):
        sj.linen.convert(variables, [missing], report=sj.Report())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_kernel_that_is_not_finite_is_named(bad):
    variables = {"params": {"up": {"kernel": jnp.ones((8, 8)).at[3, 4].set(bad)}}}
    with pytest.raises(ValueError, match="up/kernel: the kernel holds inf or nan"):
        sj.linen.convert(variables, "6:8")


def test_a_kernel_that_was_pruned_before_needs_no_values():
    """A conversion of files passes its shape alone, and the pruned kernel with `prune`."""
    kernel = jnp.arange(64.0).reshape(16, 4)
    mask = sj.prune.magnitude(kernel, "6:8")
    shape = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    made = pack_by_rule(shape, sj.Rule("6:8"), "up/kernel", lambda *_: (mask, kernel))
    np.testing.assert_array_equal(made.values, sj.pack(kernel, "6:8", "int8", mask=mask).values)


@pytest.mark.parametrize(
    "path",
    [
        "lm_head/kernel",
        "model/lm_head/w",
        "lm_head/decoder/kernel",  # RoBERTa
        "cls/predictions/decoder/kernel",
        "vocab_projector/kernel",  # DistilBERT
        "generator_lm_head/kernel",  # Electra
        "layers/0/mlp/router/kernel",
        "layers/0/block_sparse_moe/gate/kernel",
    ],
)
def test_a_pattern_alone_leaves_heads_and_routers(path):
    with pytest.raises(Skipped, match=r"which a pattern alone leaves"):
        RuleSet("6:8").match(path)
    assert str(RuleSet([(".*", "6:8")]).match(path)) == "6:8 int8"


@pytest.mark.parametrize(
    "path",
    ["layers/0/mlp/gate/kernel", "mlp/gate_proj/kernel", "lm_head/dense/kernel", "head/kernel"],
)
def test_a_pattern_alone_takes_all_others(path):
    assert str(RuleSet("6:8").match(path)) == "6:8 int8"
    assert str(RuleSet([(path.removesuffix("/kernel"), "2:4")]).match(path)) == "2:4 int8"

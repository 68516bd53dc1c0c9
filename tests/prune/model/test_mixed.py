import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import slidejax as sj
from slidejax.contraction import to_matrix
from slidejax.prune.model.choose import choose
from slidejax.prune.model.costs import measured_times, multiplications, packed_bytes
from slidejax.prune.model.grams import collect
from slidejax.prune.model.sensitivity import sensitivities

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


def test_time_as_a_cost(monkeypatch, tmp_path):
    """By the nearest entry of the pattern, in proportion; dense products whatever pattern they were measured with."""
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    measured = {
        ("6:8", 16): {"hopper+prepared": 10.0, "dense+prepared": 12.0},
        ("14:16", 16): {"hopper+prepared": 15.0, "dense": 13.0},
        ("6:8", 4096): {"hopper": 99.0},
    }
    sj.tune.record(
        "A GPU",
        [
            {"in": 64, "out": 32, "pattern": p, "dtype": "int8", "rows": rows, "us": us}
            for (p, rows), us in measured.items()
        ],
    )
    time = measured_times(16, device="A GPU")
    assert [time((64, 32), sj.Pattern.parse(p)) for p in ("6:8", "14:16", "dense")] == [
        10.0,
        13.0,
        12.0,
    ]
    assert (
        time((64, 64), sj.Pattern(6, 8)) == 20.0
        and measured_times(32, device="A GPU")((64, 32), sj.Pattern(6, 8)) == 20.0
    )
    for what, far in ((sj.Pattern(2, 4), (64, 32)), (sj.Pattern(6, 8), (64, 1 << 20))):
        with pytest.raises(ValueError, match="nothing was measured near 16 rows"):
            time(far, what)
    with pytest.raises(ValueError, match="float8_e4m3fn on A GPU"):
        measured_times(16, "float8_e4m3fn", "A GPU")((64, 32), sj.Pattern(6, 8))


class Two(nnx.Module):
    def __init__(self, rngs, heard=0.01):
        self.loud, self.quiet, self.heard = (
            nnx.Linear(32, 16, rngs=rngs),
            nnx.Linear(32, 16, rngs=rngs),
            heard,
        )

    def __call__(self, x):
        return jnp.concatenate([self.loud(x), self.heard * self.quiet(x)], axis=-1)


def squares(y, batch):
    return jnp.sum(y**2) / 2


@pytest.mark.parametrize("heard", [0.01, 0.0])
@pytest.mark.parametrize("count", [1, 4])  # one batch serves for both; else the last is held out
def test_a_layer_that_matters_more_keeps_more(count, heard):
    model, batches = (
        Two(nnx.Rngs(0), heard),
        list(jax.random.normal(jax.random.key(0), (count, 64, 32))),
    )
    rules = sj.prune.mixed(model, "6:8", batches, patterns=["14:16", "6:8", "2:4"], loss=squares)
    assert [(path, str(rule)) for path, rule in rules] == [
        ("loud/kernel", "14:16 int8"),
        ("quiet/kernel", "2:4 int8"),
    ]
    assert len(sj.prune.convert(model, rules, batches).loud.kernel.shape) == 2
    assert rules == sj.prune.mixed(
        model, "6:8", batches, patterns=["14:16", "6:8", "2:4"], loss=squares
    )


def test_what_mixed_cannot_do():
    model, x = Two(nnx.Rngs(0)), jnp.ones((64, 32))
    with pytest.raises(ValueError, match="loss= is needed"):
        sj.prune.mixed(model, "6:8", [x])
    with pytest.raises(ValueError, match="patterns must name at least one"):
        sj.prune.mixed(model, "6:8", [x], patterns=[], loss=squares)
    with pytest.raises(ValueError, match="less than what the cheapest patterns cost"):
        sj.prune.mixed(model, "2:4", [x], patterns=["6:8"], loss=squares)
    with pytest.raises(ValueError, match="batches of one shape"):
        sj.prune.mixed(model, "6:8", [], loss=squares)


def test_held_out_text_is_not_fitted_to(monkeypatch):
    """The kernels that are measured are pruned without it."""
    seen = []
    monkeypatch.setattr(
        "slidejax.prune.model.mixed.collect",
        lambda run, params, batches: seen.extend(batches) or collect(run, params, batches),
    )

    def measured(loss, params, batches, changes):
        seen.extend([None, *batches])
        return sensitivities(loss, params, batches, changes)

    monkeypatch.setattr("slidejax.prune.model.mixed.sensitivities", measured)
    sj.prune.mixed(
        Two(nnx.Rngs(0)),
        "6:8",
        [jnp.full((4, 32), float(i)) + jnp.eye(4, 32) for i in range(8)],
        loss=squares,
    )
    at = seen.index(None)
    assert [float(batch[-1, -1]) for batch in seen[:at]] == [0, 1, 2, 4, 5, 6] and [
        float(batch[-1, -1]) for batch in seen[at + 1 :]
    ] == [3, 7]


class Output(NamedTuple):
    logits: jax.Array


class Language(nnx.Module):
    """Predicts from two layers, of which one is hardly heard."""

    def __init__(self):
        self.embed, self.body = nnx.Embed(64, 32, rngs=nnx.Rngs(0)), Two(nnx.Rngs(1))
        self.head = nnx.Linear(32, 64, rngs=nnx.Rngs(2))

    def __call__(self, ids):
        return Output(4 * self.head(self.body(4 * self.embed(ids))))


def test_what_is_chosen_is_nearer_to_the_dense_model_than_uniform():
    model, ids = Language(), np.random.default_rng(0).integers(64, size=(8, 64))
    rules = dict(sj.prune.mixed(model, "6:8", ids, patterns=["14:16", "6:8", "2:4"]))
    assert str(rules["body/quiet/kernel"]) == "2:4 int8"
    new = [sj.prune.convert(model, how, ids) for how in (list(rules.items()), "6:8")]
    kernels = [layer.kernel for layer in (new[0].body.loud, new[0].body.quiet, new[0].head)]
    assert sum(multiplications(w.shape, w.pattern) for w in kernels) <= 0.75 * (
        2 * 32 * 16 + 32 * 64
    )
    fresh = np.random.default_rng(1).integers(64, size=(8, 64))
    dense = jax.nn.log_softmax(model(fresh).logits)
    mixed, uniform = (
        float(jnp.mean(jnp.exp(dense) * (dense - jax.nn.log_softmax(one(fresh).logits))))
        for one in new
    )
    assert mixed < uniform


def test_a_choice_that_is_no_nearer_is_not_taken(monkeypatch):
    monkeypatch.setattr(
        "slidejax.prune.model.mixed.shrunk",
        lambda found, sizes: {path: 1 / one.value for path, one in found.items()},
    )
    rules = sj.prune.mixed(
        Language(),
        "6:8",
        np.random.default_rng(0).integers(64, size=(4, 64)),
        patterns=["14:16", "6:8", "2:4"],
    )
    assert [str(rule) for _, rule in rules] == ["6:8 int8"] * 3


def test_layers_that_cannot_be_told_apart_share_the_pattern():
    """What may be noise moves nothing: three equal layers at one batch of few rows."""

    class Equal(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(32, 16, rngs=nnx.Rngs(i)) for i in range(3)])

        def __call__(self, x):
            return jnp.concatenate([layer(x) for layer in self.layers], axis=-1)

    rules = sj.prune.mixed(
        Equal(), "6:8", list(jax.random.normal(jax.random.key(0), (4, 6, 32))), loss=squares
    )
    assert {str(rule) for _, rule in rules} == {"6:8 int8"}


def test_a_layer_may_be_quantised_only():
    """ "dense" costs what dense 8-bit products do; None, put before, is for layers that are to stay as they are."""
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


def test_kernels_are_read_as_their_layers_read_them():
    """GPT-2 keeps `[out, in]`, and a square kernel's shape does not tell."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    model, ids = transformers.FlaxGPT2LMHeadModel(config), np.arange(8)[None]
    path = "transformer/h/0/attn/c_proj/kernel"
    leaf = model.params["transformer"]["h"]["0"]["attn"]["c_proj"]["kernel"]
    found = sj.huggingface.functional(model).layers(ids)
    np.testing.assert_array_equal(to_matrix(leaf, found[path].kernel), leaf.T)

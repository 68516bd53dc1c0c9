"""A pattern for each layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slidejax as sj
from slidejax.prune.model.costs import multiplications
from slidejax.prune.model.grams import collect
from slidejax.prune.model.sensitivity import sensitivities


class Two(nnx.Module):
    def __init__(self, rngs, factor=0.01):
        self.loud, self.quiet, self.factor = (
            nnx.Linear(32, 16, rngs=rngs),
            nnx.Linear(32, 16, rngs=rngs),
            factor,
        )

    def __call__(self, x):
        return jnp.concatenate([self.loud(x), self.factor * self.quiet(x)], axis=-1)


def squares(y, batch):
    return jnp.sum(y**2) / 2


@pytest.mark.parametrize("factor", [0.01, 0.0])
@pytest.mark.parametrize("count", [1, 4])  # one batch serves for both; else the last is held out
def test_a_layer_that_matters_more_keeps_more(count, factor):
    model, batches = (
        Two(nnx.Rngs(0), factor),
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


@pytest.mark.parametrize(("speedup", "quiet"), [(1.0, "dense"), (1.05, "14:16"), (1.3, "2:4")])
def test_as_many_times_as_fast_as_dense(speedup, quiet):
    """Dense layers count as 1, 2:4 as a half; what matters least pays."""
    batches = list(jax.random.normal(jax.random.key(0), (4, 64, 32)))
    rules = dict(
        sj.prune.mixed(
            Two(nnx.Rngs(0)),
            "dense",
            batches,
            patterns=["dense", "14:16", "6:8", "2:4"],
            loss=squares,
            speedup=speedup,
        )
    )
    patterns = [rule.pattern for rule in rules.values()]
    cost = sum(multiplications((32, 16), p) for p in patterns)
    assert cost <= 2 * 32 * 16 / speedup * (1 + 1e-9)
    assert str(rules["loud/kernel"].pattern) == "dense"
    assert str(rules["quiet/kernel"].pattern) == quiet


def test_what_mixed_cannot_do():
    model, x = Two(nnx.Rngs(0)), jnp.ones((64, 32))
    with pytest.raises(ValueError, match=r"speedup must be above 0 .*, got 0"):
        sj.prune.mixed(model, "dense", [x], patterns=["dense"], loss=squares, speedup=0)
    with pytest.raises(ValueError, match="loss= is needed"):
        sj.prune.mixed(model, "6:8", [x])
    with pytest.raises(ValueError, match="patterns, at least one"):
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
    """Predicts from two layers, of which one hardly matters."""

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
    """Differences that may be noise move nothing: three equal layers at one batch of few rows."""

    class Equal(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(32, 16, rngs=nnx.Rngs(i)) for i in range(3)])

        def __call__(self, x):
            return jnp.concatenate([layer(x) for layer in self.layers], axis=-1)

    rules = sj.prune.mixed(
        Equal(), "6:8", list(jax.random.normal(jax.random.key(0), (4, 6, 32))), loss=squares
    )
    assert {str(rule) for _, rule in rules} == {"6:8 int8"}

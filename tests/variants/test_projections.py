"""Layers that read the same input as one product: the results are those of the layers."""

import gc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze

import slidejax as sj
from slidejax.linen.fused import FusedProduct
from slidejax.variants.projections import FusedPart, FusedWeight

RULES = [(r".*_proj/kernel", sj.Rule("6:8", "int8"))]


class Attention(nn.Module):
    bias: bool = False
    late: bool = False  # whether k and v read something else than q

    def setup(self):
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Dense(n, use_bias=self.bias) for n in (48, 16, 24)
        )

    def __call__(self, x):
        other = x + 1 if self.late else x
        v, q, k = (
            self.v_proj(other),
            self.q_proj(x),
            self.k_proj(other),
        )  # not in the order of the names
        return jnp.concatenate([q * 2, k, v], -1)


class Block(nn.Module):
    bias: bool = False
    late: bool = False

    def setup(self):
        self.attention = Attention(self.bias, self.late)
        self.gate_proj, self.up_proj, self.down_proj = nn.Dense(40), nn.Dense(40), nn.Dense(64)

    def __call__(self, x):
        x = self.attention(x)[..., :64]
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


def converted(model, x, rules=RULES, seed=0):
    variables = model.init(jax.random.key(seed), x)
    noise = iter(jax.random.split(jax.random.key(seed + 1), 99))
    variables = jax.tree.map(
        lambda leaf: leaf + jax.random.normal(next(noise), leaf.shape) * 0.1, variables
    )
    return sj.linen.convert(variables, rules, model, x)


def products(fn, *args) -> list[int]:
    """Outputs of every product that a program computes."""
    return [problem.out_features for problem, _ in sj.explain(fn, *args)]


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(7), (2, 3, 64))


@pytest.mark.parametrize(("bias", "jit"), [(False, True), (True, False)])
def test_the_results_are_those_of_the_layers(x, bias, jit):
    model = Block(bias)
    variables = converted(model, x)
    fused = sj.linen.fuse_projections(variables)
    run = lambda v, x: sj.linen.apply(model, v, x)  # noqa: E731
    assert products(run, variables, x) == [24, 48, 16, 40, 40, 64]
    assert products(run, fused, x) == [88, 80, 64]
    run = jax.jit(run) if jit else run
    np.testing.assert_array_equal(run(fused, x), run(variables, x))


def test_a_layer_with_another_input_computes_for_itself(x):
    model = Block(late=True)
    variables = converted(model, x)
    fused = sj.linen.fuse_projections(variables)
    np.testing.assert_array_equal(
        sj.linen.apply(model, fused, x), sj.linen.apply(model, variables, x)
    )
    assert (
        products(lambda v, x: sj.linen.apply(model, v, x), fused, x).count(88) == 3
    )  # v; q, which reads x; k


def test_calls_do_not_see_each_others_products(x):
    model = Block()
    variables = converted(model, x)
    fused, other = (
        sj.linen.fuse_projections(variables),
        sj.linen.fuse_projections(converted(model, x, seed=5)),
    )
    for params in (fused, other, fused):
        np.testing.assert_array_equal(
            sj.linen.apply(model, params, x),
            sj.linen.apply(model, sj.linen.unfuse_projections(params), x),
        )
    gc.collect()
    kept = [held for held in gc.get_objects() if isinstance(held, FusedProduct)]
    assert not kept  # and nothing is kept alive


def test_under_vmap_grad_and_remat(x):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(Attention)(name="attention")(x)

    model = Step()
    variables = converted(model, x)
    fused = sj.linen.fuse_projections(variables)
    run = lambda v, x: sj.linen.apply(model, v, x)  # noqa: E731
    np.testing.assert_array_equal(
        jax.vmap(run, (None, 0))(fused, x), jax.vmap(run, (None, 0))(variables, x)
    )
    slope = lambda v: jax.grad(lambda x: run(v, x).sum())(x)  # noqa: E731
    np.testing.assert_allclose(slope(fused), slope(variables), rtol=1e-3, atol=1e-4)


def test_kernels_with_an_axis_of_layers_stay():
    """As a scan over layers has them."""
    w = sj.pack(jnp.ones((2, 64, 8)), "6:8", dtype="int8")
    params = {name: {"kernel": w} for name in ("gate_proj", "up_proj")}
    assert jax.tree.structure(sj.linen.fuse_projections(params)) == jax.tree.structure(params)


def test_what_is_fused(x):
    model = Block(bias=True)
    variables = converted(model, x)
    fused = sj.linen.fuse_projections(freeze(variables))
    assert isinstance(fused, FrozenDict)
    attention = fused["params"]["attention"]
    assert isinstance(attention["q_proj"]["kernel"], FusedWeight) and attention["v_proj"][
        "kernel"
    ] == FusedPart("q_proj")
    assert set(attention["v_proj"]) == {"kernel", "bias"}
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(fused)) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(variables)
    )
    again = sj.linen.unfuse_projections(fused)
    jax.tree.map(np.testing.assert_array_equal, again.unfreeze(), variables)


@pytest.mark.parametrize(
    "rules",
    [
        [(r"[qk]_proj/kernel", sj.Rule("6:8", "int8")), (r"v_proj/kernel", sj.Rule("4:6", "int8"))],
        [(r"[qk]_proj/kernel", sj.Rule("6:8", "int8")), (r"v_proj/kernel", sj.Rule("6:8", None))],
        [(r"[qk]_proj/kernel", sj.Rule("6:8", "int8"))],
    ],
    ids=["another pattern", "another dtype", "a dense one"],
)
def test_what_does_not_fit_stays(x, rules):
    fused = sj.linen.fuse_projections(converted(Attention(), x, rules))
    assert not any(
        isinstance(leaf, FusedWeight)
        for leaf in jax.tree.leaves(fused, is_leaf=lambda n: isinstance(n, FusedWeight))
    )


def test_groups_and_errors(x):
    model = Block()
    variables = converted(model, x)
    fused = sj.linen.fuse_projections(variables, groups=[("gate_proj", "up_proj")])
    assert products(lambda v, x: sj.linen.apply(model, v, x), fused, x) == [24, 48, 16, 80, 64]
    for group in (("gate_proj",), ("up_proj", "up_proj")):
        with pytest.raises(ValueError, match="two layers or more, each once"):
            sj.linen.fuse_projections(variables, groups=[group])
    with pytest.raises(ValueError, match="or take it apart"):
        sj.linear(x, fused["params"]["gate_proj"]["kernel"])
    with pytest.raises(ValueError, match="in the one of gate_proj"):
        sj.linear(x, fused["params"]["up_proj"]["kernel"])


def test_prepared_forms_are_made_anew(x):
    variables = sj.prepare(converted(Block(), x))
    w = sj.linen.fuse_projections(variables)["params"]["gate_proj"]["kernel"].fused
    assert w.prepared["dense"].shape == (80, 64)
    np.testing.assert_array_equal(
        sj.linen.apply(Block(), sj.linen.fuse_projections(variables), x),
        sj.linen.apply(Block(), variables, x),
    )


def test_a_checkpoint_holds_the_layers_of_their_own(x, tmp_path):
    variables = converted(Block(), x)
    sj.checkpoint.save(tmp_path / "out", sj.linen.fuse_projections(variables))
    jax.tree.map(np.testing.assert_array_equal, sj.checkpoint.load(tmp_path / "out"), variables)


def test_nothing_of_it_is_trained(x):
    fused = sj.linen.fuse_projections(
        converted(Block(), x, [(r".*_proj/kernel", sj.Rule("6:8", None))])
    )
    train, rest = sj.partition(fused)
    trained = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(train)}
    assert trained and not any("fused" in path for path in trained)
    jax.tree.map(np.testing.assert_array_equal, sj.combine(train, rest), fused)

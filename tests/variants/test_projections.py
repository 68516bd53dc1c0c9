"""Kernels of layers that read the same input, held as one packed weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from fused_models import Attention, Block, converted, products

import slidejax as sj
from slidejax.variants.projections import FusedPart, FusedWeight


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(7), (2, 3, 64))


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

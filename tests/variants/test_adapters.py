"""Low-rank adapters in trees, Linen and Hugging Face models, and NNX layers.

They change nothing at first, are trained alone, and merge.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import slidejax as sj
from slidejax.variants import adapters

X = jnp.asarray(np.random.default_rng(1).standard_normal((5, 40)), jnp.float32)


def weight(dtype="int8", pattern="6:8"):
    return sj.pack(
        jnp.asarray(np.random.default_rng(0).standard_normal((40, 6)), jnp.float32),
        pattern,
        dtype=dtype,
    )


def moved(tree, size=0.1):
    """The tree with random `lora_b`s."""

    def draw(w):
        random = np.random.default_rng(2).standard_normal(w.lora_b.shape) * size
        return dataclasses.replace(w, lora_b=jnp.asarray(random, w.lora_b.dtype))

    def is_adapted(node):
        return isinstance(node, adapters.AdaptedWeight)

    return jax.tree.map(lambda n: draw(n) if is_adapted(n) else n, tree, is_leaf=is_adapted)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float32"])
def test_the_formula(dtype, masked):
    w = weight(dtype)
    tree = adapters.add({"kernel": w}, rank=3, alpha=6, masked=masked, seed=4)
    np.testing.assert_array_equal(sj.linear(X, tree["kernel"]), sj.linear(X, w))
    a = moved(tree)["kernel"]
    update = 2.0 * a.lora_a @ a.lora_b
    if masked:
        update *= np.asarray(sj.unpack(weight("float32")) != 0)
    np.testing.assert_allclose(
        sj.linear(X, a, jnp.ones(6)),
        sj.linear(X, w, jnp.ones(6)) + X @ update,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_a_merged_masked_adapter_computes_what_it_did(dtype):
    tree = moved(adapters.add({"kernel": weight(dtype)}, rank=3, masked=True))
    merged = adapters.merge(tree)["kernel"]
    assert isinstance(merged, sj.SlideWeight) and merged.dtype == dtype
    np.testing.assert_array_equal(merged.zeros, weight().zeros)
    before, after = sj.linear(X, tree["kernel"]), sj.linear(X, merged)
    # 8 bit: the update is rounded too, by half a step of each of the 40 products at most
    tolerance = (
        1e-5 if dtype == "float32" else float(jnp.abs(X).max() * merged.scale.max()) * 40 / 2
    )
    np.testing.assert_allclose(before, after, atol=tolerance)
    quantised = sj.quantize(merged, "int8") if dtype == "float32" else merged
    kernel = sj.unpack(weight(dtype)) + np.asarray(tree["kernel"].lora_a @ tree["kernel"].lora_b)
    mask = np.asarray(sj.unpack(weight("float32")) != 0)
    expected = sj.quantize(
        sj.pack(jnp.where(mask, kernel, 0), "6:8", mask=jnp.asarray(mask)), "int8"
    )
    assert np.abs(quantised.values.astype(np.int32) - expected.values.astype(np.int32)).max() <= 1


@pytest.mark.parametrize("masked", [False, True])
def test_an_adapter_on_the_pattern_dense_is_merged_whole(masked):
    tree = moved(adapters.add({"kernel": weight("float32", "dense")}, rank=3, masked=masked))
    merged, kernel = adapters.merge(tree)["kernel"], tree["kernel"]
    np.testing.assert_allclose(
        sj.unpack(merged),
        sj.unpack(kernel.base) + kernel.lora_a @ kernel.lora_b,
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_allclose(sj.linear(X, merged), sj.linear(X, kernel), rtol=1e-4, atol=1e-4)


def test_only_the_factors_are_trained():
    tree = adapters.add({"a": {"kernel": weight(), "bias": jnp.zeros(6)}}, rank=3)
    train, rest = sj.partition(tree, adapters.FACTORS)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(train)) == [(3, 6), (40, 3)]
    target = sj.linear(X, weight()) + X[:, :6]

    def loss(train):
        p = sj.combine(train, rest)["a"]
        return ((sj.linear(X, p["kernel"], p["bias"]) - target) ** 2).mean()

    optimiser = optax.adam(0.02)
    state, start = optimiser.init(train), float(loss(train))
    step = jax.jit(jax.value_and_grad(loss))
    for _ in range(60):
        updates, state = optimiser.update(step(train)[1], state)
        train = optax.apply_updates(train, updates)
    assert float(loss(train)) < 0.2 * start
    np.testing.assert_array_equal(
        sj.combine(train, rest)["a"]["kernel"].base.values, weight().values
    )


def test_factors_are_saved_beside_the_model(tmp_path):
    tree = moved(adapters.add({"a": {"kernel": weight()}, "b": jnp.ones(2)}, rank=2))
    sj.checkpoint.save(tmp_path / "lora", adapters.extract(tree))
    found = sj.checkpoint.load(tmp_path / "lora")
    assert found.keys() == {"a/kernel"}
    np.testing.assert_array_equal(found["a/kernel"]["lora_b"], tree["a"]["kernel"].lora_b)


def test_linen_models_run_them():
    model = nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(6)])
    variables = sj.linen.convert(model.init(jax.random.key(0), X), "6:8", model, X)
    tree = adapters.add(variables, rank=2, adapted=".*layers_2/kernel")
    assert isinstance(tree["params"]["layers_0"]["kernel"], sj.SlideWeight)
    np.testing.assert_array_equal(
        sj.linen.apply(model, tree, X), sj.linen.apply(model, variables, X)
    )
    tree = moved(tree)
    hidden = nn.relu(sj.linen.apply(nn.Dense(24), {"params": variables["params"]["layers_0"]}, X))
    w = tree["params"]["layers_2"]["kernel"]
    expected = sj.linen.apply(model, variables, X) + hidden @ w.lora_a @ w.lora_b
    np.testing.assert_allclose(sj.linen.apply(model, tree, X), expected, rtol=1e-4, atol=1e-5)


def test_hugging_face_models_run_them(tiny_llama):
    sparse = sj.huggingface.convert(tiny_llama, "6:8")
    ids = np.arange(10)[None]
    params = moved(adapters.add(sparse.params, rank=2, masked=True), 0.2)
    adapted = sj.huggingface.with_params(sparse, params)
    merged = sj.huggingface.with_params(sparse, adapters.merge(params))
    same, far = (np.abs(adapted(ids).logits - m(ids).logits).mean() for m in (merged, sparse))
    assert 0 < same < 0.5 * far


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(40, 24, rngs=rngs), nnx.Linear(24, 40, rngs=rngs)
        self.again = self.up

    def __call__(self, x):
        return self.again(self.down(self.up(x)))


@pytest.mark.parametrize("qdtype", ["int8", None])
def test_nnx_layers_run_them(qdtype):
    model = sj.nnx.convert(Block(nnx.Rngs(0)), sj.Rule("6:8", qdtype))
    adapted = sj.nnx.map_weights(model, functools.partial(adapters.add, rank=2, masked=True))
    np.testing.assert_array_equal(adapted(X), model(X))
    assert adapted.up is adapted.again
    graph, factors, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    assert len(jax.tree.leaves(factors)) == 4  # the shared layer once
    loss = lambda f: (nnx.merge(graph, f, rest)(X) ** 2).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(factors)
    assert all(
        bool(jnp.abs(leaf).max() > 0)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if "lora_b" in str(path)
    )
    step = jax.tree.map(
        lambda p, g: p - 1e-3 * g / jnp.abs(g).max() if jnp.abs(g).max() > 0 else p,
        factors,
        gradient,
    )
    trained = nnx.merge(graph, step, rest)
    merged = sj.nnx.map_weights(trained, adapters.merge)
    assert isinstance(merged.up.kernel, sj.SlideWeight)
    np.testing.assert_allclose(merged(X), trained(X), atol=2e-4 if qdtype is None else 0.1)


def test_nnx_masters():
    model = sj.nnx.convert(Block(nnx.Rngs(0)), "6:8")
    masters = sj.nnx.map_weights(model, sj.trainable.masters)
    # the codes are the same; how XLA contracts the scales and the bias may differ by a bit
    np.testing.assert_allclose(masters(X), model(X), rtol=1e-5, atol=1e-5)
    assert len(jax.tree.leaves(nnx.state(masters, nnx.Param))) == 4
    gradient = nnx.grad(lambda m: (m(X) ** 2).sum())(masters)
    shared = gradient["again"]  # the first of its two paths
    masters.up.values.set_value(masters.up.values.get_value() - 1e-3 * shared["values"].get_value())
    np.testing.assert_allclose(
        sj.nnx.map_weights(masters, sj.trainable.deploy)(X), masters(X), rtol=1e-5, atol=1e-5
    )


def test_bad_input():
    with pytest.raises(ValueError, match="rank must be from 1"):
        adapters.add({"kernel": weight()}, rank=0)
    with pytest.raises(ValueError, match="selects no packed weight"):
        adapters.add({"kernel": weight()}, adapted="other")
    broken = dataclasses.replace(
        adapters.add({"kernel": weight()}, rank=2)["kernel"], lora_b=jnp.zeros((3, 6))
    )
    with pytest.raises(ValueError, match="factors"):
        sj.linear(X, broken)

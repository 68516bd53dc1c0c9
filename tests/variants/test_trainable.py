import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import slidejax as sj
from slidejax.ops.lift_quantize import quantize_rows
from slidejax.variants import trainable
from slidejax.weights.layout import kept_values, to_groups


def params(dtype=None, pattern="6:8"):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((40, 6)), jnp.float32)
    return {
        "a": {"kernel": sj.pack(kernel, pattern, dtype=dtype), "bias": jnp.zeros(6)},
        "step": jnp.int32(0),
        "name": None,
    }


@pytest.mark.parametrize(("dtype", "trained"), [(None, 2), ("int8", 1), ("float8_e4m3fn", 1)])
def test_partition_round_trips(dtype, trained):
    tree = params(dtype)
    train, rest = sj.partition(tree)
    assert len(jax.tree.leaves(train)) == trained
    assert len(jax.tree.leaves(train)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(tree))
    again = sj.combine(train, rest)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_training_with_optax_keeps_the_mask():
    tree = params()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((64, 40)), jnp.float32)
    target = x @ jnp.asarray(np.random.default_rng(2).standard_normal((40, 6)), jnp.float32)
    train, rest = sj.partition(tree)
    optimiser = optax.adam(0.05)

    @jax.jit
    def step(train, state):
        def loss(train):
            p = sj.combine(train, rest)["a"]
            return ((sj.linear(x, p["kernel"], p["bias"]) - target) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(train)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(train, updates), state, value

    state, losses = optimiser.init(train), []
    for _ in range(60):
        train, state, value = step(train, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    before, after = (
        sj.unpack(tree["a"]["kernel"]),
        sj.unpack(sj.combine(train, rest)["a"]["kernel"]),
    )
    assert not np.asarray(after)[np.asarray(before) == 0].any(), "what was pruned stays pruned"
    assert (np.asarray(after) != np.asarray(before)).any()


def test_combining_what_does_not_belong_together():
    train, rest = sj.partition(params())
    with pytest.raises(ValueError, match="both hold a leaf"):
        sj.combine(train, train)
    with pytest.raises(ValueError, match=r"structure|keys|Mismatch"):
        sj.combine(train, {"b": rest})


def test_only_what_is_selected_is_trained():
    tree = params()
    train, rest = sj.partition(tree, r"a/kernel/values")
    assert train["a"]["bias"] is None and train["a"]["kernel"].values is not None
    assert sj.partition(tree, lambda path: path.endswith("bias"))[0]["a"]["kernel"].values is None
    jax.tree.map(np.testing.assert_array_equal, sj.combine(train, rest), tree)
    with pytest.raises(ValueError, match=r"selects none.*a/bias"):
        sj.partition(tree, "b/.*")
    with pytest.raises(ValueError, match="regular expression"):
        sj.partition(tree, "(")


# --- master weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "qdtype"), [("6:8", "int8"), ("6:8", "float8_e4m3fn"), ("dense", "int8")]
)
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_a_master_computes_what_its_deployed_form_computes(pattern, qdtype, x_dtype):
    w = params(qdtype, pattern)["a"]["kernel"]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 40)), x_dtype)
    master = trainable.masters(w)
    deployed = trainable.deploy(master)
    # The codes are those at the start, on the same mask.
    np.testing.assert_array_equal(deployed.values, w.values)
    np.testing.assert_array_equal(deployed.zeros, w.zeros)
    run = jax.jit(sj.linear)
    np.testing.assert_array_equal(run(x, master, jnp.ones(6)), run(x, deployed, jnp.ones(6)))
    unquantised = params(pattern=pattern)
    moved = trainable.masters(unquantised)["a"]["kernel"]
    assert isinstance(moved, sj.SlideWeight)  # without a dtype it stays unquantised
    moved = trainable.masters(unquantised, qdtype)["a"]["kernel"]
    np.testing.assert_array_equal(
        run(x, moved), run(x, sj.quantize(unquantised["a"]["kernel"], qdtype))
    )


@pytest.mark.parametrize(
    ("pattern", "qdtype"), [("6:8", "int8"), ("6:8", "float8_e4m3fn"), ("dense", "int8")]
)
def test_the_gradient_of_a_master_is_straight_through(pattern, qdtype):
    master = trainable.masters(params(pattern=pattern), qdtype)["a"]["kernel"]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((7, 40)), jnp.float32)
    bias = jnp.ones(6)
    train, rest = sj.partition(master)

    def gradients(loss, *of):
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*of)

    got = gradients(
        lambda t, x, b: (sj.linear(x, sj.combine(t, rest), b) ** 2).sum(), train, x, bias
    )
    codes, scale = quantize_rows(x, np.dtype(qdtype))
    kernel = sj.unpack(trainable.deploy(master))
    expected = gradients(
        lambda k, x, b: ((x @ k + b) ** 2).sum(), kernel, codes.astype(jnp.float32) * scale, bias
    )
    kept = kept_values(to_groups(expected[0], master.pattern), master.zeros)
    np.testing.assert_allclose(got[0].values, kept, rtol=1e-5, atol=1e-5 * np.abs(kept).max())
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-5, atol=1e-4)


def test_masters_refuse():
    with pytest.raises(ValueError, match="int8 already, not to float8"):
        trainable.masters(params("int8"), "float8_e4m3fn")
    with pytest.raises(ValueError, match="qdtype must be int8 or"):
        trainable.masters(params(), "float32")
    with pytest.raises(NotImplementedError, match="whole of K"):
        sj.linear(
            jnp.ones((1, 40)), trainable.masters(params("int8")["a"]["kernel"]), reduce_axis="k"
        )


def test_training_8_bit_weights_is_not_silent():
    tree = {"a": params("int8")["a"]}
    with pytest.warns(UserWarning, match=r"1 weights of int8 values, such as 'a/kernel'.*masters"):
        sj.partition(tree)
    x = jnp.ones((2, 8))
    layer = sj.linen.SlideDense(4)
    variables = layer.init(jax.random.key(0), x)

    def loss(bias, variables):
        inner = {**variables["params"], "bias": bias}
        return layer.apply({"params": inner}, x).sum()

    with pytest.warns(UserWarning, match=r"int8 values have no gradient.*masters"):
        jax.grad(loss)(variables["params"]["bias"], variables)
    model = sj.nnx.SlideLinear(8, 4, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match=r"int8 values have no gradient.*masters"):
        nnx.grad(lambda model: model(x).sum())(model)
    with warnings.catch_warnings():  # these are meant
        warnings.simplefilter("error")
        sj.partition(tree, ".*bias")
        sj.partition(trainable.masters(tree))
        sj.partition(sj.adapters.add(tree, rank=2))
        jax.grad(lambda x: layer.apply(variables, x).sum())(x)

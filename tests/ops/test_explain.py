import jax
import jax.numpy as jnp
import pytest

import slidejax as sj


def test_explain_sees_through_transformations():
    x, w = jnp.ones((16, 128), jnp.bfloat16), sj.pack(jnp.ones((128, 64)), "6:8", dtype="int8")

    def model(x, w):
        x = jax.jit(sj.linear)(x, w)[:, : 128 // 2]
        return jax.lax.scan(
            lambda c, _: (c + sj.linear(jnp.pad(c, ((0, 0), (0, 64))), w), None), x, None, length=2
        )[0]

    found = sj.explain(jax.checkpoint(model), x, w, platform="cpu")
    assert len(found) == 2 and all(choice.implementation == "dense" for _, choice in found)
    assert found[0][0].rows == 16 and "plain JAX" in str(found[0][1])
    grad = sj.explain(
        jax.grad(lambda x: sj.linear(x, w).astype(jnp.float32).sum()), x, platform="cpu"
    )
    assert len(grad) == 1
    with pytest.raises(ValueError, match="platform"):
        sj.explain(model, x, w, platform="tpu")


def test_settings_are_given_to_the_function_as_they_are():
    x, w = jnp.ones((4, 64)), sj.pack(jnp.ones((64, 32)), "6:8", dtype="int8")
    ((problem, choice),) = sj.explain(sj.linear, x, w, implementation="reference")
    assert choice.implementation == "reference" and problem.rows == 4
    jitted = jax.jit(sj.linear, static_argnames=("implementation", "out_dtype"))
    ((problem, _),) = sj.explain(
        jitted, x, w, None, "reference", out_dtype=jnp.bfloat16, prologue=sj.Activation("relu")
    )
    assert problem.out_dtype == jnp.bfloat16
    stages = [sj.Stage(w), sj.Stage(sj.pack(jnp.ones((32, 64)), "6:8", dtype="int8"))]
    assert [p.out_features for p, _ in sj.explain(sj.linear_chain, x, stages)] == [32, 64]


def test_a_layer_has_its_name_and_no_name_of_a_transformation():
    x, w = jnp.ones((4, 64)), sj.pack(jnp.ones((64, 32)), "6:8", dtype="int8")

    def layer(x):
        with jax.named_scope("up"):
            return sj.linear(x, w).sum()

    for fn in (
        layer,
        jax.grad(layer),
        jax.vmap(layer),
        jax.grad(lambda x: jax.vmap(layer)(x).sum()),
    ):
        for problem, _ in sj.explain(fn, x):
            assert problem.layer == "up"
    ((problem, _),) = sj.explain(jax.grad(lambda x: sj.linear(x, w).sum()), x)
    assert str(problem).startswith("linear: ")

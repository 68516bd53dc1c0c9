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

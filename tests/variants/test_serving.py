import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import pairs

import slidejax as sj
from slidejax.contraction import promote_packed
from slidejax.variants.serving import ServingWeight, serving

on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU serves")


def weight(dtype="int8", shape=(50, 6), pattern="6:8"):
    return sj.pack(
        jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32),
        pattern,
        dtype=dtype,
    )


@on_a_cpu
@pytest.mark.parametrize(
    ("pattern", "dtype", "x_dtype"),
    pairs(
        ["14:16", "6:8", "2:4", "dense"],
        ["int8", "float8_e4m3fn", "bfloat16", "float32"],
        ["float32", "bfloat16"],
    ),
)
def test_what_serves_is_the_dense_implementation_bit_for_bit(pattern, dtype, x_dtype):
    # These are more columns than one exact float32 sum of int8 products takes.
    w = weight(dtype, (1100, 6), pattern)
    served = serving({"kernel": w, "other": jnp.ones(3)})["kernel"]
    assert isinstance(served, ServingWeight) and served.shape == w.shape and served.dtype == w.dtype
    x = (
        jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 1100)), x_dtype)
        .at[0, 0, 7]
        .set(jnp.nan)
        .at[1, 0]
        .set(0)
    )
    bias = jnp.arange(6.0)
    for b in (None, bias):
        got = jax.jit(sj.linear)(x, served, b)
        want = jax.jit(lambda x, w, b: sj.linear(x, w, b, "dense"))(x, w, b)
        np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))
        assert got.dtype == x.dtype and got.shape == (2, 3, 6)
        if dtype == "int8":
            np.testing.assert_array_equal(
                got.astype(jnp.float32), sj.linear(x, w, b, "reference").astype(jnp.float32)
            )
    np.testing.assert_array_equal(
        sj.linear(x, served, out_dtype="float32"),
        sj.linear(x, w, implementation="dense", out_dtype="float32"),
    )


@on_a_cpu
def test_patterns_share_a_program():
    traced = []

    @jax.jit
    def run(x, w):
        traced.append(w.dtype)
        return sj.linear(x, w)

    for pattern in ("14:16", "6:8", "4:6", "dense", "10:12"):
        for dtype in ("int8", "float32"):
            run(jnp.ones((2, 50)), serving(weight(dtype, pattern=pattern)))
    assert sorted(map(str, traced)) == ["float32", "int8"]


@on_a_cpu
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_gradients_of_what_serves(dtype):
    w, x, bias = (
        weight(dtype),
        jnp.asarray(np.random.default_rng(1).standard_normal((4, 50)), jnp.float32),
        jnp.ones(6),
    )

    def loss(x, bias, w):
        return jnp.sum(jnp.sin(sj.linear(x, w, bias)))

    got, want = (jax.grad(loss, (0, 1))(x, bias, kernel) for kernel in (serving(w), w))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@on_a_cpu
def test_what_serves_under_vmap_and_scan():
    w, x = (
        weight(shape=(3, 50, 6)),
        jnp.asarray(np.random.default_rng(1).standard_normal((3, 2, 50)), jnp.float32),
    )
    want = jax.vmap(sj.linear)(x, w)
    np.testing.assert_array_equal(jax.vmap(sj.linear)(x, serving(w)), want)
    np.testing.assert_array_equal(
        jax.lax.scan(lambda c, xw: (c, sj.linear(*xw)), 0, (x, serving(w)))[1], want
    )


@on_a_cpu
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_dtypes_are_promoted_as_for_the_packed_weight(dtype):
    w, x = weight(dtype), jnp.ones((2, 50), jnp.bfloat16)
    for target in (None, jnp.bfloat16):

        def promote(*arrays, target=target):
            return [
                a
                if a is None
                else a.astype(target or jnp.result_type(*[b for b in arrays if b is not None]))
                for a in arrays
            ]

        (x1, w1, _), (x2, w2, _) = (
            promote_packed(promote, x, w, None),
            promote_packed(promote, x, serving(w), None),
        )
        assert x1.dtype == x2.dtype and w1.dtype == w2.dtype
        np.testing.assert_array_equal(sj.linear(x1, w1, implementation="dense"), sj.linear(x2, w2))


@on_a_cpu
def test_what_serves_says_what_it_cannot():
    served, x = serving(weight()), jnp.ones((2, 50))
    assert not any(jax.tree.leaves(served.trained())) and not served.is_k_shard
    with pytest.raises(ValueError, match="holds no packed form"):
        served.weight  # noqa: B018
    with pytest.raises(ValueError, match=r"x must be \[..., 50\]"):
        sj.linear(jnp.ones((2, 49)), served)
    with pytest.raises(ValueError, match="bias must have shape"):
        sj.linear(x, served, jnp.ones(5))
    with pytest.raises(ValueError, match="out_dtype"):
        sj.linear(x, served, out_dtype="int8")
    with pytest.raises(ValueError, match=r"scale bfloat16.*ruins packed weights"):
        sj.linear(x, jax.tree.map(lambda a: a.astype(jnp.bfloat16), served))
    for options in ({"implementation": "reference"}, {"reduce_axis": "k"}):
        with pytest.raises(NotImplementedError, match="made to serve"):
            sj.linear(x, served, **options)

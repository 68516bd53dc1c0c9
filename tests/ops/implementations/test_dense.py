"""The implementation "dense": its codes, and when the Hopper kernel multiplies them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.ops.implementations.dense import dense_codes

cpu_only = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="tests what a machine without a GPU does"
)


def dense_linear(x, w, bias=None):
    return sj.linear(x, w, bias, implementation="dense")


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("pattern", "padded"), [("6:8", 128), ("dense", 96)])
def test_the_codes_are_the_unpacked_kernel(pattern, padded, prepared):
    w = sj.pack(jax.random.normal(jax.random.key(0), (70, 5)), pattern, dtype="int8")
    w = sj.prepare(w, "dense") if prepared else w
    codes = dense_codes(w)
    assert codes.dtype == jnp.int8
    kernel = codes.T.astype(jnp.float32) * w.scale
    np.testing.assert_array_equal(kernel, sj.unpack(sj.drop_prepared(w)))
    longer = dense_codes(w, padded=True)
    assert longer.shape == (5, padded) and not longer[:, 70:].any()
    np.testing.assert_array_equal(longer[:, :70], codes)


@cpu_only
def test_dense_on_cuda_quantises_and_multiplies_in_one_call():
    x = jnp.ones((16, 128), jnp.bfloat16)
    w = sj.pack(jnp.ones((128, 64)), "6:8", dtype="int8")
    text = jax.jit(dense_linear).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "slidejax_linear_hopper" in text and "dot_general" not in text


@pytest.mark.parametrize(
    ("columns", "dtype", "fused"),
    [(608, "int8", True), (608, "float8_e4m3fn", True), (600, "int8", False), (608, None, False)],
)
def test_dense_products_of_8_bit_codes_are_lowered_to_the_kernel(columns, dtype, fused):
    """Its rows of K bytes must be whole 16 bytes; everything else is XLA's product."""
    w = jax.eval_shape(
        lambda k: sj.pack(k, "6:8", dtype=dtype), jax.ShapeDtypeStruct((columns, 24), jnp.float32)
    )
    x = jax.ShapeDtypeStruct((5, columns), jnp.bfloat16)
    text = jax.jit(dense_linear).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert ("slidejax_linear_hopper" in text) == fused
    assert (
        "slidejax_linear_hopper"
        not in jax.jit(dense_linear).trace(x, w).lower(lowering_platforms=("cpu",)).as_text()
    )


@pytest.mark.parametrize(
    ("rows", "columns", "fused"), [(1, 2048, False), (2, 2048, True), (1, 8192, True)]
)
def test_one_row_times_a_small_dense_kernel_is_left_to_xla(rows, columns, fused):
    w = jax.eval_shape(
        lambda k: sj.pack(k, "6:8", dtype="int8"),
        jax.ShapeDtypeStruct((columns, 1024), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)
    text = jax.jit(dense_linear).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert ("slidejax_linear_hopper" in text) == fused != ("dot_general" in text)

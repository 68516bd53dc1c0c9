"""The specification itself, against numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slidejax as sj
from slidejax.ops.implementations import reference
from slidejax.ops.implementations.reference import REFERENCE


# A few rows are summed as integers, and more rows by float32 products.
@pytest.mark.parametrize("rows", [0, 1, 4, 5])
@pytest.mark.parametrize("columns", [0, 1, 1040, 1041, 2500, 8221])
def test_sums_of_int8_products_are_exact(rows, columns):
    codes = np.full((rows, columns), 127, np.int8)
    kernel = np.stack([np.full(columns, 127), np.full(columns, -127)]).astype(np.int8)
    got = jax.jit(reference.exact_int8_dot)(codes, kernel)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, codes.astype(np.int64) @ kernel.T.astype(np.int64))


@given(st.integers(0, 40_000))
def test_columns_are_cut_into_short_axes(columns):
    end = 0
    for start, shape in reference._cut(columns):
        assert start == end and all(1 <= size <= 32 for size in shape)
        end += math.prod(shape)
    assert end == columns


@given(st.sampled_from([1, 3, 5]), st.sampled_from([7, 90, 296, 1100]), st.integers(0, 999))
def test_random_int8_products_are_exact(rows, columns, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    kernel = rng.integers(-127, 128, (6, columns)).astype(np.int8)
    got = jax.jit(reference.exact_int8_dot)(codes, kernel)
    np.testing.assert_array_equal(got, codes.astype(np.int64) @ kernel.T.astype(np.int64))


@given(
    st.integers(0, 40), st.integers(1, 150), st.integers(1, 40), st.booleans(), st.integers(0, 99)
)
def test_int8_products_on_a_gpu_are_exact(rows, columns, outputs, extreme, seed):
    rng = np.random.default_rng(seed)
    draw = rng.choice if extreme else lambda _, size: rng.integers(-127, 128, size)
    codes = draw([-127, 127], (rows, columns)).astype(np.int8)
    kernel = draw([-128, 127], (outputs, columns)).astype(np.int8)
    got = jax.jit(reference.accumulate, static_argnums=2)(codes, kernel, "cuda")
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, codes.astype(np.int64) @ kernel.T.astype(np.int64))


@pytest.mark.parametrize(("columns", "taken"), [(1, False), (33, False), (128, False), (129, True)])
def test_xla_multiplies_no_int8_of_few_columns_on_a_gpu(columns, taken):
    codes, kernel = jnp.zeros((5, columns), jnp.int8), jnp.zeros((3, columns), jnp.int8)
    program = str(jax.make_jaxpr(lambda a, b: reference.accumulate(a, b, "cuda"))(codes, kernel))
    assert ("preferred_element_type=int32" in program) == taken


@pytest.mark.parametrize(
    ("flags", "taken"),
    [
        ("--xla_gpu_autotune_level=0", False),
        ("--xla_gpu_autotune_level=4 --xla_gpu_autotune_level=0", False),
        ("--xla_gpu_autotune_level=4", True),
        ("--xla_dump_to=0", True),
    ],
)
def test_xla_multiplies_no_int8_on_a_gpu_where_it_tries_no_kernels(monkeypatch, flags, taken):
    monkeypatch.setenv("XLA_FLAGS", flags)
    rng = np.random.default_rng(0)
    codes = rng.choice([-127, 127], (3, 2500)).astype(np.int8)
    kernel = np.stack([codes[0], -codes[1], rng.integers(-128, 128, 2500)]).astype(np.int8)
    run = functools.partial(reference.accumulate, platform="cuda")
    program = str(jax.make_jaxpr(run)(codes, kernel))
    assert ("preferred_element_type=int32" in program) == taken
    got = run(jnp.asarray(codes), jnp.asarray(kernel))
    np.testing.assert_array_equal(got, codes.astype(np.int64) @ kernel.T.astype(np.int64))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "columns", [1, 2, 3, 7, 9, 15, 17, 33, 34, 50, 63, 64, 127, 128, 130, 1001]
)
@pytest.mark.parametrize(("rows", "outputs"), [(8, 80), (100, 77)])
def test_int8_products_of_any_width_are_exact(rows, columns, outputs):
    rng = np.random.default_rng(columns)
    x = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    kernel = rng.integers(-127, 128, (outputs, columns)).astype(np.int8)
    got = jax.jit(reference.accumulate, static_argnums=2)(x, kernel, "cuda")
    np.testing.assert_array_equal(got, x.astype(np.int64) @ kernel.T.astype(np.int64))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("first", [0, 1, 127, 128, 200, 255])
def test_a_kernel_that_waits_for_the_codes_keeps_every_bit(dtype, first):
    every = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).reshape(2, 128)
    codes = np.full((5, 128), first, np.uint8).view(jnp.dtype(dtype))
    got = jax.jit(reference._converted_here)(codes, every)
    for array, before in zip(got, (codes, every), strict=True):
        np.testing.assert_array_equal(np.asarray(array).view(np.uint8), before.view(np.uint8))


@pytest.mark.parametrize("pattern", ["2:4", "6:8", "14:16", "dense"])
def test_the_product_is_that_of_numpy(pattern):
    rng = np.random.default_rng(0)
    w = sj.pack(jnp.asarray(rng.standard_normal((70, 5)), jnp.float32), pattern, dtype="int8")
    lifted, scale = sj.lift_quantize(
        jnp.asarray(rng.standard_normal((3, 70)), jnp.float32), pattern
    )
    expanded = jax.jit(reference.expand_lifted)(w)
    acc = np.asarray(lifted, np.int64) @ np.asarray(expanded, np.int64).T
    matmul = jax.jit(REFERENCE.matmul, static_argnums=4)
    np.testing.assert_array_equal(matmul(lifted, scale, w, None, None), acc)
    bias = rng.standard_normal(5).astype(np.float32)
    got = matmul(lifted, scale, w, bias, jnp.float32)
    want = acc.astype(np.float32) * np.asarray(scale) * np.asarray(w.scale) + bias
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)

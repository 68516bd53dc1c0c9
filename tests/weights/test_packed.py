import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from patterns import PATTERNS, SPARSE

import slidejax as sj
from slidejax.ops.implementations.reference import expand_lifted
from slidejax.variants.serving import ServingWeight
from slidejax.weights.packed import LinearWeight

patterns = st.sampled_from(PATTERNS)
seeds = st.integers(0, 2**32 - 1)
row_counts = st.sampled_from([1, 3, 10, 64, 70])  # few shapes: each one compiles


def random_kernel(seed, shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def bits(array):
    array = np.asarray(array)
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@examples(6)
@given(patterns, row_counts, seeds, st.sampled_from(["float32", "bfloat16", "float16"]))
def test_lossless(pattern, rows, seed, dtype):
    kernel = random_kernel(seed, (rows, 3), dtype)
    kernel = kernel.at[0].set(-0.0)
    mask = sj.prune.magnitude(kernel, pattern)
    w = sj.pack(kernel, pattern, mask=mask)
    expected = jnp.where(mask & (kernel != 0), kernel, jnp.zeros((), kernel.dtype))
    np.testing.assert_array_equal(bits(sj.unpack(w)), bits(expected))
    np.testing.assert_array_equal(bits(sj.unpack(sj.pack(kernel, pattern))), bits(expected))
    assert w.check() is w and w.shape == (rows, 3) and w.dtype == dtype


@examples(6)
@given(patterns, row_counts, seeds, st.floats(0, 1))
def test_lossless_for_any_mask_that_fits(pattern, rows, seed, density):
    kernel = random_kernel(seed, (rows, 3))
    mask = sj.prune.magnitude(kernel, pattern) & (
        jnp.asarray(np.random.default_rng(seed).random((rows, 3))) < density
    )
    np.testing.assert_array_equal(
        bits(sj.unpack(sj.pack(kernel, pattern, mask=mask))), bits(jnp.where(mask, kernel, 0))
    )


@pytest.mark.parametrize("pattern", SPARSE)
def test_packed_layout(pattern):
    """Values are in column order and zeros are z1 | z2 << 4, wherever the two zeros are."""
    p = sj.Pattern.parse(pattern)
    pairs = list(itertools.combinations(range(p.group), 2))
    kernel = np.tile(np.arange(1.0, p.group + 1, dtype=np.float32), (len(pairs), 1))
    for row, pair in enumerate(pairs):
        kernel[row, list(pair)] = 0
    w = sj.pack(kernel.T, pattern)
    zeros, values = np.asarray(w.zeros), np.asarray(w.values)
    for row, (z1, z2) in enumerate(pairs):
        assert zeros[row, 0] == z1 | z2 << 4
        np.testing.assert_array_equal(values[row, 0], kernel[row][kernel[row] != 0])
    # padding groups hold nothing
    assert not values[:, 1:].any()
    # the lifted form holds kept values 2w and 2w + 1 in window w, each at the lane of its column
    lifted = np.asarray(expand_lifted(w)).reshape(len(pairs), p.groups(p.group), p.windows, 4)[:, 0]
    assert ((lifted != 0).sum(-1) == 2).all()
    for row, col in itertools.product(range(len(pairs)), range(p.group)):
        where = [(i, col - 2 * i) for i in range(p.windows) if 0 <= col - 2 * i < 4]
        assert sum(lifted[row, i, lane] for i, lane in where) == kernel[row, col]


def test_dense_holds_the_codes_in_rows():
    """Values are the kernel's rows, zero-padded. There are no zeros, and no group is too full."""
    kernel = random_kernel(0, (50, 3))
    w = sj.pack(kernel, "dense", mask=jnp.ones((50, 3), bool))
    assert w.values.shape == (3, 16, 4) and w.zeros.shape == (3, 0) and w.zeros.dtype == jnp.uint8
    rows = np.asarray(w.values).reshape(3, -1)
    np.testing.assert_array_equal(rows, np.pad(kernel.T, ((0, 0), (0, 14))))
    np.testing.assert_array_equal(expand_lifted(w), rows)
    w8 = sj.quantize(w, "int8")
    assert w8.nbytes == 3 * 64 + 3 * 4
    with pytest.raises(ValueError, match=r"must have shapes \(3, 0\)"):
        w8.replace(zeros=jnp.zeros((3, 16), jnp.uint8)).check()


def test_missing_columns_count_as_zeros_first():
    w = sj.pack(jnp.array([[0.0], [2.0], [3.0]]), "2:4")  # column 3 is missing, column 0 is zero
    assert int(w.zeros[0, 0]) == 0 | 3 << 4
    np.testing.assert_array_equal(w.values[0, 0], [2, 3])


@examples(6)
@given(patterns, seeds, st.sampled_from(["int8", "float8_e4m3fn"]))
def test_quantised_per_output(pattern, seed, dtype):
    kernel = random_kernel(seed, (70, 6)) * jnp.exp(jnp.arange(6.0) * 3 - 9)
    w = sj.pack(kernel, pattern, dtype=dtype)
    kept = sj.unpack(sj.pack(kernel, pattern))
    qmax = {"int8": 127, "float8_e4m3fn": 448}[dtype]
    np.testing.assert_array_equal(w.scale, np.abs(kept).max(0) * np.float32(1 / qmax))
    error = np.abs(np.asarray(sj.unpack(w) - kept))
    step = np.asarray(w.scale) * (0.5 if dtype == "int8" else 0) + np.abs(kept) * (
        0 if dtype == "int8" else 2**-4
    )
    assert (error <= step * 1.0001 + np.asarray(w.scale) * 2**-9).all()
    later = sj.quantize(sj.pack(kernel, pattern), dtype)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), later, w)


def test_integer_kernels_keep_their_codes():
    codes = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (16, 4)), jnp.int8)
    w = sj.pack(codes, "6:8")
    mask = sj.prune.magnitude(codes, "6:8")
    assert w.dtype == jnp.int8 and (w.scale == 1).all()
    np.testing.assert_array_equal(sj.unpack(w), jnp.where(mask, codes, 0).astype(jnp.float32))


def test_too_full_mask_names_row_and_group():
    mask = sj.prune.magnitude(jnp.ones((32, 5)), "6:8").at[8:16, 3].set(True)
    with pytest.raises(ValueError, match=re.escape("output 3, group 1 (inputs 8 to 15)")):
        sj.pack(jnp.ones((32, 5)), "6:8", mask=mask)
    # zeros of the kernel itself do not count
    sj.pack(jnp.ones((32, 5)).at[8:10].set(0), "6:8", mask=mask)


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
def test_too_full_rows_are_nan_under_tracing(dtype):
    mask = sj.prune.magnitude(jnp.ones((32, 5)), "6:8").at[8:16, 3].set(True)
    dense = sj.unpack(
        jax.jit(lambda k: sj.pack(k, "6:8", dtype=dtype, mask=mask))(jnp.ones((32, 5)))
    )
    assert (
        np.isnan(np.asarray(dense, np.float32)[:, 3]).any()
        and not np.isnan(np.asarray(dense, np.float32)[:, :3]).any()
    )
    y = sj.linear(
        jnp.ones((1, 32)),
        jax.jit(lambda k: sj.pack(k, "6:8", dtype=dtype, mask=mask))(jnp.ones((32, 5))),
    )
    assert np.isnan(y[0, 3]) and not np.isnan(np.delete(np.asarray(y), 3, axis=1)).any()


def test_nan_row_of_a_kernel_stays_visible():
    kernel = jnp.ones((16, 3)).at[4, 1].set(jnp.nan)
    for dtype in ("float32", "int8", "float8_e4m3fn"):
        y = sj.linear(jnp.ones((2, 16)), sj.pack(kernel, "6:8", dtype=dtype))
        assert np.isnan(y[:, 1]).all() and not np.isnan(y[:, [0, 2]]).any()


@pytest.mark.parametrize(("pattern", "groups"), [("4:6", 8), ("dense", 16)])
def test_batch_axes(pattern, groups):
    kernel = random_kernel(1, (2, 3, 40, 6))
    w = sj.pack(kernel, pattern, dtype="int8")
    assert w.values.shape == (2, 3, 6, groups, 4) and w.shape == (2, 3, 40, 6)
    one = jax.vmap(jax.vmap(lambda k: sj.pack(k, pattern, dtype="int8")))(kernel)
    jax.tree.map(np.testing.assert_array_equal, w, one)
    np.testing.assert_array_equal(
        sj.unpack(w)[1, 2], sj.unpack(sj.pack(kernel[1, 2], pattern, dtype="int8"))
    )
    doubled = jax.lax.scan(
        lambda c, w: (c, sj.unpack(w)), 0, jax.tree.map(lambda leaf: leaf[0], w)
    )[1]
    np.testing.assert_array_equal(doubled, sj.unpack(w)[0])


def test_bad_arguments():
    kernel = jnp.ones((16, 4))
    with pytest.raises(ValueError, match=r"\[\.\.\., in, out\]"):
        sj.pack(jnp.ones(16), "6:8")
    with pytest.raises(ValueError, match="mask must be bool"):
        sj.pack(kernel, "6:8", mask=jnp.ones((4, 16), bool))
    with pytest.raises(ValueError, match="mask must be bool"):
        sj.pack(kernel, "6:8", mask=jnp.ones((16, 4)))
    with pytest.raises(ValueError, match="dtype must be one of"):
        sj.pack(kernel, "6:8", dtype="int4")
    with pytest.raises(TypeError, match="packed already"):
        sj.pack(sj.pack(kernel, "6:8"), "6:8")
    with pytest.raises(TypeError, match="SlideWeight"):
        sj.unpack(kernel)
    with pytest.raises(ValueError, match="int8 or float8_e4m3fn"):
        sj.quantize(sj.pack(kernel, "6:8"), "bfloat16")
    with pytest.raises(ValueError, match="quantised already"):
        sj.quantize(sj.pack(kernel, "6:8", dtype="int8"), "int8")


def test_a_cast_of_the_tree_is_noticed():
    w = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), sj.pack(jnp.ones((16, 4)), "6:8", dtype="int8")
    )
    for use in (lambda: sj.linear(jnp.ones((1, 16)), w), lambda: sj.unpack(w), w.check):
        with pytest.raises(ValueError, match="astype"):
            use()


@pytest.mark.parametrize(
    ("dtype", "change", "leaf"),
    [
        ("int8", lambda a: a * 2, r"w\.zeros\["),
        ("int8", jnp.ones_like, r"w\.zeros\["),
        ("float32", lambda a: a * 2, r"w\.zeros\["),
        ("bfloat16", lambda a: a / 2 if jnp.issubdtype(a.dtype, jnp.floating) else a, "w.scale"),
    ],
)
def test_arithmetic_on_a_tree_is_noticed_by_unpack(dtype, change, leaf):
    w = jax.tree.map(change, sj.pack(random_kernel(0, (32, 4)), "6:8", dtype=dtype))
    with pytest.raises(ValueError, match=leaf):
        sj.unpack(w)
    assert np.isnan(np.asarray(jax.jit(sj.unpack)(w), np.float32)).any()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float32"])
def test_a_weight_is_scaled_by_its_scale_or_its_values(dtype):
    w, x = sj.pack(random_kernel(0, (32, 4)), "6:8", dtype=dtype), random_kernel(1, (2, 32))
    name = "values" if dtype == "float32" else "scale"
    half = w.replace(**{name: getattr(w, name) / 2})
    np.testing.assert_array_equal(sj.unpack(half), sj.unpack(w) / 2)
    np.testing.assert_array_equal(sj.linear(x, half), sj.linear(x, w) / 2)


def test_partition_spec():
    w = sj.pack(jnp.ones((128, 4)), "6:8")
    spec = w.partition_spec(out="o", k=("a", "b"), batch=(None,))
    assert (
        spec.values == P(None, "o", ("a", "b"), None)
        and spec.zeros == P(None, "o", ("a", "b"))
        and spec.scale == P(None, "o")
    )
    with pytest.raises(ValueError, match="whole number of blocks"):
        sj.pack(jnp.ones((100, 4)), "6:8").partition_spec(k="k")
    spec = sj.pack(jnp.ones((64, 4)), "dense").partition_spec(out="o", k="k")
    assert spec.values == P("o", "k", None)
    assert spec.zeros == P("o", None)  # there are no groups to cut


def test_reported_bytes_are_those_of_the_leaves():
    w = sj.pack(jnp.ones((64, 10)), "6:8", dtype="int8")
    assert w.nbytes == 10 * 8 * 6 + 10 * 8 + 10 * 4
    assert sj.prepare(w, "dense").nbytes == w.nbytes + 64 * 10


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_codes_chosen_elsewhere_are_stored_as_they_are(dtype):
    rng = np.random.default_rng(0)
    scale = jnp.asarray(np.exp(rng.standard_normal(5)), jnp.float32)
    codes = jnp.asarray(np.clip(rng.standard_normal((16, 5)) * 40, -127, 127), dtype).astype(
        jnp.float32
    )
    mask = sj.prune.magnitude(codes, "6:8")
    w = sj.pack(jnp.where(mask, codes * scale, 0), "6:8", dtype, mask=mask, scale=scale)
    np.testing.assert_array_equal(
        sj.unpack(w.replace(scale=jnp.ones(5))), jnp.where(mask, codes, 0)
    )
    np.testing.assert_array_equal(w.scale, scale)


def test_a_scale_that_does_not_fit():
    with pytest.raises(ValueError, match="scale is for an 8-bit dtype"):
        sj.pack(jnp.ones((8, 4)), "6:8", scale=jnp.ones(4))
    with pytest.raises(ValueError, match=r"shape of the outputs, \(4,\)"):
        sj.pack(jnp.ones((8, 4)), "6:8", "int8", scale=jnp.ones(8))


# --- what may stand where a kernel stands ---------------------------------------------------------


def every_weight():
    w = sj.pack(random_kernel(0, (64, 4)), "6:8", dtype="int8")
    return {
        "packed": w,
        "float": sj.pack(random_kernel(0, (64, 4)), "6:8"),
        "master": sj.trainable.masters(w),
        "adapted": sj.adapters.add({"kernel": w}, rank=2)["kernel"],
        "serving": ServingWeight(sj.prepare(w, "dense").prepared["dense"], w.scale),
    }


@pytest.mark.parametrize("name", every_weight())
def test_every_linear_weight_does_what_the_interface_says(name):
    w = every_weight()[name]
    assert isinstance(w, LinearWeight)
    assert w.shape == (64, 4) and w.out_features == 4 and not w.is_k_shard and w.check() is w
    trained = w.trained()
    assert jax.tree.structure(trained) == jax.tree.structure(w)
    assert all(isinstance(leaf, bool) for leaf in jax.tree.leaves(trained))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 64)), jnp.float32)
    y = jax.jit(sj.linear)(x, w, jnp.ones(4))
    assert y.shape == (3, 4)
    np.testing.assert_allclose(y, sj.linear(x, every_weight()["float"], jnp.ones(4)), atol=0.2)
    if w.packed is None:
        with pytest.raises(ValueError, match="holds no packed form"):
            w.weight  # noqa: B018
    else:
        assert isinstance(w.packed, sj.SlideWeight) and w.weight.shape == w.shape
    assert (w.promoted is None) == (name != "float")
    if w.promoted is not None:
        half = w.with_promoted(w.promoted.astype(jnp.bfloat16))
        assert (
            type(half) is type(w) and half.promoted.dtype == jnp.bfloat16 and half.check() is half
        )


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", None])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_values_show_in_large_kernels(dtype, bad):
    """In the outputs that hold them, and in no others; also with given scales."""
    kernel = np.random.default_rng(0).normal(size=(1024, 32)).astype(np.float32)
    kernel[7, 3] = bad
    kernel[:, 4] = bad
    scales = [None] if dtype is None else [None, np.full(32, 0.1, np.float32)]
    for scale in scales:
        w = sj.pack(kernel, "6:8", dtype=dtype, scale=scale)
        y = np.asarray(sj.linear(jnp.ones((16, 1024)), w))
        assert not np.isfinite(y[:, 3:5]).any()
        assert np.isfinite(np.delete(y, [3, 4], axis=1)).all()


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (np.full((8, 2), 300), "int8"),
        (np.full((8, 2), 200, np.uint8), "int8"),
        (np.full((8, 2), 1000), "float8_e4m3fn"),
        (np.full((8, 2), 10**9), "float16"),
        (np.full((8, 2), 1 + 5j), "float32"),
        (np.full((8, 2), True), "int8"),
        (np.full((8, 2), 5, np.int8), "float8_e4m3fn"),
        (np.full((8, 2), 1e5, np.float32), "float16"),
        (np.full((8, 2), -3.4e38, np.float32), "bfloat16"),
    ],
)
def test_kernels_whose_values_would_change_are_refused(kernel, dtype):
    with pytest.raises(ValueError, match="kernel"):
        sj.pack(kernel, "dense", dtype=dtype)


def test_an_overflow_is_nan_under_tracing():
    kernel = jnp.ones((8, 2)).at[3, 1].set(1e5)
    w = jax.jit(lambda k: sj.pack(k, "dense", dtype="float16"))(kernel)
    y = np.asarray(sj.linear(jnp.ones((1, 8)), w))
    assert y[0, 0] == 8 and np.isnan(y[0, 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_subnormal_values_are_kept(dtype):
    tiny = jnp.finfo(dtype).smallest_subnormal
    kernel = np.full((8, 2), tiny, jnp.dtype(dtype))
    np.testing.assert_array_equal(bits(sj.unpack(sj.pack(kernel, "dense"))), bits(kernel))


def test_sums_of_int8_products_fit_into_int32():
    """133,144 columns of 127 * 127 do; one more does not, in any way to make such a weight."""
    right = 133_144
    for pattern, columns in (("dense", right), ("6:8", right // 6 * 8 + right % 6)):
        w = sj.pack(jnp.ones((columns, 1)), pattern, dtype="int8")
        y = sj.linear(jnp.ones((1, columns)), w)
        np.testing.assert_allclose(y, columns * w.pattern.density, rtol=1e-4)
        more = jnp.ones((columns + 12, 1))
        for make in (
            lambda more=more, pattern=pattern: sj.pack(more, pattern, dtype="int8"),
            lambda more=more, pattern=pattern: jax.eval_shape(
                lambda k: sj.pack(k, pattern, dtype="int8"), more
            ),
            lambda more=more, pattern=pattern: sj.quantize(sj.pack(more, pattern), "int8"),
            lambda w=w, columns=columns: sj.linear(
                jnp.ones((1, columns)), dataclasses.replace(w, in_features=columns + 12)
            ),
        ):
            with pytest.raises(ValueError, match="133144 columns may not fit"):
                make()
    with pytest.raises(ValueError, match="132104 columns"):
        sj.pack(jnp.full((right, 1), -128, jnp.int8), "dense")
    assert sj.pack(more, "6:8", dtype="float8_e4m3fn").dtype == jnp.float8_e4m3fn


def test_other_values_have_no_old_forms():
    w = sj.prepare(sj.pack(jnp.ones((16, 4)), "6:8", dtype="int8"), implementation="dense")
    changed = w.replace(values=w.values // 2)
    y = sj.linear(jnp.ones((1, 16)), changed, implementation="dense")
    np.testing.assert_array_equal(
        y, sj.linear(jnp.ones((1, 16)), sj.drop_prepared(changed), implementation="reference")
    )
    assert float(y[0, 0]) < 7


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf])
def test_scales_that_are_no_scales_are_refused(scale):
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        sj.pack(jnp.ones((8, 2)), "6:8", dtype="int8", scale=jnp.array([1.0, scale]))
    w = jax.jit(lambda s: sj.pack(jnp.ones((8, 2)), "6:8", dtype="int8", scale=s))
    assert np.isnan(w(jnp.array([1.0, scale])).scale[1])


@pytest.mark.parametrize("large", [1e300, -3.5e38, 2.0**128])
def test_float64_that_float32_makes_infinite_is_refused(large):
    kernel = np.ones((8, 2))
    kernel[3, 1] = large
    said = "kernel has finite values that become infinite in float32"
    for array in (kernel, kernel.tolist()):
        with pytest.raises(ValueError, match=said):
            sj.pack(array, "6:8", dtype="int8")
    w = sj.pack(np.ones((8, 2)), "6:8", dtype="int8")
    with pytest.raises(ValueError, match="x has finite values"):
        sj.linear(kernel[:, 1:].T, w)
    kernel[3, 1] = 3.4028235e38  # float32's largest number
    assert np.isfinite(sj.unpack(sj.pack(kernel, "dense"))).all()
    kernel[3, 1] = np.inf  # what is infinite already shows as nan
    assert np.isnan(sj.pack(kernel, "6:8", dtype="int8").scale).any()

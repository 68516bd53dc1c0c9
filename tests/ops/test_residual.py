"""`residual=` of the products, with the formula of docs/contract.md: rounded once, added once."""

import cuda_formulas as formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples, pairs
from hypothesis import given
from hypothesis import strategies as st
from linear_problem import close, exact_problem, problem, residual_of
from patterns import PATTERNS

import slidejax as sj
from slidejax.ops.implementations.reference import REFERENCE

FLOATS = ["bfloat16", "float16", "float32"]


def equal(got, want):
    np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))


@examples(6)
@given(
    pattern=st.sampled_from(PATTERNS),
    shape=st.sampled_from([(1, 1, 1), (3, 100, 24), (5, 129, 7), (9, 320, 33)]),
    x_dtype=st.sampled_from(FLOATS),
    residual_dtype=st.sampled_from(FLOATS),
    out_dtype=st.sampled_from(FLOATS),
    has_bias=st.booleans(),
    implementation=st.sampled_from(["dense", "reference", None]),
    seed=st.integers(0, 999),
)
def test_equals_the_formula_bit_for_bit(
    pattern, shape, x_dtype, residual_dtype, out_dtype, has_bias, implementation, seed
):
    x, w, bias = exact_problem(seed, *shape, pattern, x_dtype)
    assert np.all(np.frexp(np.asarray(w.scale))[0] == 0.5)  # powers of two, as the test wants them
    bias = bias if has_bias else None
    residual = residual_of(seed, (x.shape[0], w.out_features), residual_dtype)
    want = formulas.linear(x, w, bias, jnp.dtype(out_dtype), residual)
    options = {"implementation": implementation, "out_dtype": out_dtype}

    @jax.jit
    def both(x, w, bias, residual):
        given = {**options, "residual": residual}
        lifted = sj.lift_quantize(x, pattern)
        return sj.linear(x, w, bias, **given), sj.sparse_matmul(*lifted, w, bias, **given)

    for got in both(x, w, bias, residual):
        equal(got, want)


@pytest.mark.parametrize("prologue", ["relu", "glu", "norm"])
@pytest.mark.parametrize("implementation", ["dense", "reference"])
def test_after_a_prologue(prologue, implementation):
    x, w, bias = exact_problem(0, 6, 100, 24, "6:8")
    residual = residual_of(0, (6, 24), "bfloat16")
    up = jnp.broadcast_to(jnp.exp2(jnp.arange(6.0) - 3)[:, None], x.shape)
    made = {
        "relu": sj.Activation("relu"),
        "glu": sj.GLU(up, "relu"),
        "norm": sj.RMSNorm(jnp.linspace(0.5, 1.5, 100)),
    }[prologue]
    y = sj.linear(
        x, w, bias, implementation, out_dtype="bfloat16", prologue=made, residual=residual
    )
    want = formulas.linear(made.apply(x), w, bias, jnp.dtype("bfloat16"), residual)
    if prologue == "norm":  # XLA may compute it in another order of operations
        close(y, want, 0.01)
    else:
        equal(y, want)


def test_the_sum_is_rounded_once():
    x, w = jnp.ones((1, 257), jnp.bfloat16), sj.pack(jnp.ones((257, 2)), "dense")
    residual = jnp.full((1, 2), -256, jnp.bfloat16)
    rounded_before = sj.linear(x, w) + residual
    assert rounded_before.tolist() == [[0, 0]]  # 257 is no bfloat16
    assert sj.linear(x, w, residual=residual).tolist() == [[1, 1]]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32"])
def test_other_weights(dtype):
    x, w, bias = problem(0, 5, 100, 12, "6:8", dtype)
    residual = residual_of(0, (5, 12), "float16")
    want = sj.linear(x, w, bias) + residual.astype(jnp.float32)
    close(sj.linear(x, w, bias, residual=residual), want, 1e-6)
    parts = sj.sparse_matmul(
        *sj.lift_quantize(x, "6:8", dtype), w, bias, out_dtype="float32", residual=residual
    )
    close(parts, want, 1e-6)


@pytest.mark.parametrize("shape", [(40,), (0, 40), (1, 40), (2, 3, 40), (2, 0, 40)])
def test_leading_axes(shape):
    rows = int(np.prod(shape[:-1]))
    x, w, bias = exact_problem(0, rows, 40, 8, "6:8")
    residual = residual_of(0, (rows, 8), "bfloat16")
    y = sj.linear(x.reshape(shape), w, bias, residual=residual.reshape(*shape[:-1], 8))
    assert y.shape == (*shape[:-1], 8)
    equal(y.reshape(rows, 8), formulas.linear(x, w, bias, np.float32, residual))
    lifted, scale = sj.lift_quantize(x.reshape(shape), "6:8")
    y = sj.sparse_matmul(lifted, scale, w, residual=residual.reshape(*shape[:-1], 8))
    want = formulas.linear(x, w, None, jnp.dtype("bfloat16"), residual)
    equal(y.reshape(rows, 8), want)


# --- transformations ------------------------------------------------------------------------------


def lifted_product(x, w, bias, residual):
    lifted, scale = sj.lift_quantize(x, w.pattern)
    return sj.sparse_matmul(lifted, scale, w, bias, out_dtype="float32", residual=residual)


def whole(x, w, bias, residual):
    return sj.linear(x, w, bias, residual=residual)


@pytest.mark.parametrize("run", [whole, lifted_product])
@pytest.mark.parametrize("in_axes", [(0, None, None, 0), (None, None, None, 0), (0, None, None, None),
                                     (1, None, None, 1), (0, 0, 0, 0), (None, 0, None, None)], ids=str)  # fmt: skip
def test_vmap(run, in_axes):
    problems = [exact_problem(seed, 4, 40, 8, "6:8") for seed in range(2)]
    residuals = [residual_of(seed, (4, 8), "bfloat16") for seed in range(2)]
    each = [[*p, r] for p, r in zip(problems, residuals, strict=True)]

    def argument(index, axis):
        if axis is None:
            return each[0][index]
        return jax.tree.map(lambda *a: jnp.stack(a, axis), *(one[index] for one in each))

    y = jax.jit(jax.vmap(run, in_axes))(*map(argument, range(4), in_axes))
    for i in range(2):
        x, w, bias, residual = (
            each[0 if axis is None else i][index] for index, axis in enumerate(in_axes)
        )
        equal(y[i], formulas.linear(x, w, bias, np.float32, residual))


def test_a_batch_that_is_empty_or_has_no_rows():
    _, w, bias = exact_problem(0, 0, 40, 8, "6:8")
    run = jax.vmap(lambda x, r: sj.linear(x, w, bias, residual=r))
    assert run(jnp.ones((3, 0, 40)), jnp.ones((3, 0, 8))).shape == (3, 0, 8)
    assert run(jnp.ones((1, 2, 40)), jnp.ones((1, 2, 8))).shape == (1, 2, 8)


def test_a_residual_stream_in_a_scan():
    x, _, _ = exact_problem(0, 3, 64, 64, "6:8")
    layers = [exact_problem(seed, 3, 64, 64, "6:8")[1] for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def step(stream, w):
        return sj.linear(stream, w, residual=stream), None

    got = jax.jit(lambda x: jax.lax.scan(step, x, stacked)[0], donate_argnums=0)(x + 0)
    want = x
    for w in layers:
        want = jax.jit(lambda x, w: step(x, w)[0])(want, w)
    close(got, want, 1e-6)
    assert not np.array_equal(want, x)


# --- derivative -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "residual_dtype", "dtype"), pairs([whole, lifted_product], FLOATS, ["int8", "float32"])
)
def test_the_gradient_passes_through(run, dtype, residual_dtype):
    if dtype == "float32" and run is lifted_product:
        run = lambda x, w, bias, residual: sj.sparse_matmul(  # noqa: E731
            *sj.lift_quantize(x, w.pattern, w.dtype), w, bias, residual=residual
        )
    x, w, bias = problem(0, 5, 50, 6, "6:8", dtype)
    residual = residual_of(0, (5, 6), residual_dtype)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((5, 6)), jnp.float32)

    def loss(x, bias, residual, inside):
        if inside:
            y = run(x, w, bias, residual)
        else:
            y = run(x, w, bias, None) + residual.astype(jnp.float32)
        return (y * weights).sum()

    arguments = (0, 1, 2) if run is whole or dtype == "float32" else (1, 2)
    for wrap in (lambda f: f, jax.checkpoint):
        inside = jax.grad(wrap(lambda *a: loss(*a, True)), arguments)(x, bias, residual)
        outside = jax.grad(lambda *a: loss(*a, False), arguments)(x, bias, residual)
        assert inside[-1].dtype == residual.dtype
        equal(inside[-1], weights.astype(residual.dtype))
        for a, b in zip(inside, outside, strict=True):
            close(a, b, 1e-6)


@pytest.mark.parametrize("run", [whole, lifted_product])
def test_the_derivative_keeps_nothing_of_the_residual(run):
    x, w, bias = problem(0, 5, 50, 6, "6:8", "int8")
    residual = residual_of(0, (5, 6), "float32")
    _, pull = jax.vjp(lambda b, r: run(x, w, b, r), bias, residual)
    assert (5, 6) not in [jnp.shape(leaf) for leaf in jax.tree.leaves(pull)]


def test_the_gradient_under_vmap():
    x, w, bias = problem(0, 4, 50, 6, "6:8", "int8")
    residual = residual_of(0, (4, 6), "bfloat16")
    loss = lambda x, r: (sj.linear(x[None], w, bias, residual=r[None]) ** 2).sum()  # noqa: E731
    got = jax.vmap(jax.grad(loss, 1))(x, residual)
    y = sj.linear(x, w, bias, residual=residual)
    assert got.dtype == jnp.bfloat16
    close(got, 2 * y, 0.01)


# --- what it is to implementations ----------------------------------------------------------------


def test_explain_says_that_there_is_one():
    x, w, bias = problem(0, 4, 50, 6, "6:8", "int8")
    residual = residual_of(0, (4, 6), "bfloat16")
    for run in (whole, lifted_product):
        for given_residual in (None, residual):
            [(found, choice)] = sj.explain(run, x, w, bias, given_residual, platform="cuda")
            assert found.has_residual == (given_residual is not None)
            assert found.out_features == 6 and found.dtype == jnp.int8 and choice.implementation


def results_of_product(implementation, rows):
    """The results of the custom call that multiplies, and the number of additions beside it."""
    x, w, bias = problem(0, rows, 128, 64, "6:8", "int8", "bfloat16")
    residual = residual_of(0, (rows, 64), "bfloat16")
    traced = jax.jit(
        lambda x, r: sj.linear(x, w, bias, implementation=implementation, residual=r)
    ).trace(x, residual)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @slidejax" in line]
    assert traced.out_info.dtype == jnp.bfloat16
    return calls[-1].rsplit("->", 1)[1], text.count("stablehlo.add")


@pytest.mark.parametrize(("implementation", "rows"), [("hopper", 257), ("dense", 4), ("dense", 99)])
def test_kernels_that_add_no_residual_hand_out_float32_sums(implementation, rows):
    results, additions = results_of_product(implementation, rows)
    assert f"tensor<{rows}x64xf32>" in results and f"tensor<{rows}x64xbf16>" not in results
    assert additions == 1


@pytest.mark.parametrize("rows", [4, 99, 256])
def test_the_hopper_kernel_adds_the_residual_of_some_rows(rows):
    results, additions = results_of_product("hopper", rows)
    assert f"tensor<{rows}x64xbf16>" in results and f"tensor<{rows}x64xf32>" not in results
    assert additions == 0


# --- errors ---------------------------------------------------------------------------------------


def test_bad_residuals():
    x, w, bias = problem(0, 3, 40, 8, "6:8", "int8")
    for run in (whole, lifted_product):
        for shape in [(8,), (3, 1), (1, 3, 8), (3, 40)]:
            with pytest.raises(ValueError, match=r"residual must have the shape .* \(3, 8\), got"):
                run(x, w, bias, jnp.ones(shape))
        for dtype in ("int32", "float8_e4m3fn"):
            with pytest.raises(ValueError, match=f"residual must be bfloat16.*got {dtype}"):
                run(x, w, bias, jnp.ones((3, 8), dtype))


def test_raw_accumulators_take_no_residual():
    x, w, _ = problem(0, 3, 40, 8, "6:8", "int8")
    lifted, scale = sj.lift_quantize(x, "6:8")
    with pytest.raises(ValueError, match="residual must be None where out_dtype is None"):
        REFERENCE.run_sparse_matmul(lifted, scale, w, None, jnp.ones((3, 8)), None)


# --- what is no array; without jit ----------------------------------------------------------------


@pytest.mark.parametrize("bad", ["x", {}, [[1], [1, 2]], object(), np.array(["a"])])
@pytest.mark.parametrize("name", ["residual", "bias"])
def test_what_is_no_array_is_named(name, bad):
    x, w, _ = problem(0, 4, 24, 8, "6:8", "int8")
    with pytest.raises(TypeError, match=f"{name} must be an array of numbers, got"):
        sj.linear(x, w, **{name: bad})
    with pytest.raises(TypeError, match=f"{name} must be an array of numbers, got"):
        sj.sparse_matmul(*sj.lift_quantize(x, "6:8"), w, **{name: bad})
    with pytest.raises(TypeError, match="x must be an array of numbers, got"):
        sj.linear(bad, w)


@pytest.mark.parametrize("bad", ["x", 5, object(), "int32", "float64", []])
def test_another_out_dtype_is_refused_with_its_name(bad):
    x, w, _ = problem(0, 4, 24, 8, "6:8", "int8")
    with pytest.raises(ValueError, match="out_dtype must be bfloat16, float16 or float32, got"):
        sj.linear(x, w, out_dtype=bad, residual=residual_of(0, (4, 8), "float32"))


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_without_jit_the_result_is_the_same(dtype):
    x, w, bias = problem(0, 4, 24, 8, "6:8", dtype)
    residual = residual_of(0, (4, 8), "float32")
    want = sj.linear(x, w, bias, residual=residual)
    with jax.disable_jit():
        equal(sj.linear(x, w, bias, residual=residual), want)

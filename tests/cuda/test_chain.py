"""`linear_chain` in one custom call on a GPU, against its layers one by one."""

import dataclasses

import cuda_formulas as formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from patterns import PATTERNS

import slidejax as sj
from slidejax.ops.choice import Choice
from slidejax.ops.implementations.decode import DECODE

pytestmark = pytest.mark.gpu
ROWS = [1, 2, 3, 4, 5, 8, 16]
SIZES = [(4096, 14336), (3584, 18944)]


def packed(pattern, dtype, columns, out, seed):
    kernel = np.random.default_rng(seed).standard_normal((columns, out), np.float32)
    return sj.pack(jnp.asarray(kernel / columns**0.5), pattern, dtype=dtype)


def tail(pattern, dtype, rows, hidden, inner, x_dtype="bfloat16", norm=True, gate="silu"):
    """x, and the stages from a layer's attention to the next one's."""
    x, stream = (
        jnp.asarray(formulas.values(rows, hidden, np.float32, seed)).astype(x_dtype)
        for seed in (1, 2)
    )
    norms = [
        sj.RMSNorm(jnp.asarray(np.random.default_rng(i).uniform(0.5, 1.5, hidden), "float32"))
        if norm
        else None
        for i in range(2)
    ]
    return x, [
        sj.Stage(packed(pattern, dtype, hidden, hidden, 0), residual=stream),
        sj.Stage(packed(pattern, dtype, hidden, 2 * inner, 1), prologue=norms[0]),
        sj.Stage(
            packed(pattern, dtype, inner, hidden, 2), prologue=sj.GLU(activation=gate), residual=0
        ),
        sj.Stage(packed(pattern, dtype, hidden, 72, 3), jnp.linspace(-1, 1, 72), prologue=norms[1]),
    ]


def run(x, stages, outputs=(0, 2, 3), implementation="decode"):
    fn = jax.jit(lambda x, stages: sj.linear_chain(x, unflat(stages), outputs, implementation))
    text = fn.lower(x, flat(stages)).as_text()
    assert text.count(f"slidejax_chain_{implementation}") == 1 and "slidejax_linear" not in text
    return fn(x, flat(stages))


def flat(stages):
    """The arrays of stages as a pytree; what is no array is kept beside them."""
    arrays = [
        (s.weight, s.bias, s.prologue, None if isinstance(s.residual, int) else s.residual)
        for s in stages
    ]
    flat.adds = [s.residual if isinstance(s.residual, int) else None for s in stages]
    return arrays


def unflat(arrays):
    return [
        sj.Stage(w, bias, prologue, residual if adds is None else adds)
        for (w, bias, prologue, residual), adds in zip(arrays, flat.adds, strict=True)
    ]


def one_by_one(x, stages, ys, implementation="decode"):
    """Each layer in a call of its own, of the results that the chain gave."""
    o, gate_up, down, qkv = stages
    first, second, _ = ys
    linear = jax.jit(sj.linear, static_argnames=("implementation",))
    want_first = linear(x, o.weight, implementation=implementation, residual=o.residual)
    both = linear(first, gate_up.weight, implementation=implementation, prologue=gate_up.prologue)
    gate, up = jnp.split(both, 2, axis=-1)
    glu = sj.GLU(up, down.prologue.activation)
    want_second = linear(
        gate, down.weight, implementation=implementation, prologue=glu, residual=first
    )
    want_last = linear(second, qkv.weight, qkv.bias, implementation, prologue=qkv.prologue)
    return want_first, want_second, want_last


def near(got, want):
    """Codes that differ here and there, after a norm or an activation that rounds otherwise."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    spread = np.abs(want).max(1, keepdims=True)
    assert (np.abs(got - want) <= 0.02 * spread).all()
    assert np.abs(got - want).mean() <= 0.002 * spread.mean()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("sizes", "pattern", "dtype", "rows"),
    [
        (SIZES[0], "6:8", "int8", 1),
        (SIZES[1], "dense", "int8", 2),
        (SIZES[1], "2:4", "float8_e4m3fn", 1),
    ],
)
def test_rows_without_tensor_cores(sizes, pattern, dtype, rows, norm):
    """The layers of a large model, with the bits of the calls one by one, again and again."""
    x, stages = tail(pattern, dtype, rows, *sizes, norm=norm)
    ys = run(x, stages)
    for again in range(3):
        for got, same in zip(ys, run(x, stages), strict=True):
            assert (formulas.bits(got) == formulas.bits(same)).all(), again
    if norm:  # XLA's norm may round otherwise
        return
    for got, want in zip(ys, one_by_one(x, stages, ys), strict=True):
        np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_layer_in_one_call(pattern, dtype, rows):
    x, stages = tail(pattern, dtype, rows, 512, 1032)
    if dtype == "float8_e4m3fn" and (reason := refused(x, stages[0])):
        pytest.skip(reason)
    ys = run(x, stages)
    for got, want in zip(ys, one_by_one(x, stages, ys), strict=True):
        near(got, want)
    np.testing.assert_array_equal(formulas.bits(ys[0]), formulas.bits(one_by_one(x, stages, ys)[0]))


def refused(x, stage):
    run = lambda x: sj.linear(x, stage.weight)  # noqa: E731
    [(problem, _)] = sj.explain(run, x, platform="cuda")
    return DECODE.refuses(problem)


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rows", ROWS)
def test_int8_without_norms_has_equal_bits(rows, x_dtype):
    x, stages = tail("6:8", "int8", rows, 1024, 2056, x_dtype, norm=False, gate="relu")
    ys = run(x, stages)
    for got, want in zip(ys, one_by_one(x, stages, ys), strict=True):
        np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))


def same_bits_every_time(x, stages, implementation):
    """Kernels that read too early would give others."""
    arrays = flat(stages)

    @jax.jit
    def many(x, stages):
        def step(carry, _):
            x, _ = carry
            _, second, last = sj.linear_chain(x, unflat(stages), (0, 2, 3), implementation)
            return (second / jnp.maximum(jnp.abs(second).max(), 1), last), last

        first = (x, jnp.zeros((x.shape[0], 72), x.dtype))
        return jax.lax.scan(step, first, length=20)[1]

    want = many(x, arrays)
    assert bool(jnp.isfinite(want.astype(jnp.float32)).all())
    for _ in range(20):
        np.testing.assert_array_equal(formulas.bits(many(x, arrays)), formulas.bits(want))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_the_same_bits_every_time(rows, sizes):
    same_bits_every_time(*tail("6:8", "int8", rows, *sizes), "decode")


# --- in the Hopper kernel -------------------------------------------------------------------------


def hopper_equals_one_by_one(x, stages):
    """The kernels of both are the same, and so are their plans: bits are equal."""
    ys = run(x, stages, implementation="hopper")
    for got, want in zip(ys, one_by_one(x, stages, ys, "hopper"), strict=True):
        np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))


@pytest.mark.parametrize("rows", [1, 9, 33, 65, 256])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("pattern", ["2:4", "6:8", "14:16"])
def test_a_layer_in_one_call_of_the_hopper_kernel(on_hopper, pattern, dtype, rows):
    hopper_equals_one_by_one(*tail(pattern, dtype, rows, 512, 1032))


@pytest.mark.parametrize("rows", [5, 16, 33, 64])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("mixed", [False, True])
def test_weights_that_prune_nothing_in_one_call(on_hopper, monkeypatch, dtype, rows, mixed):
    """In the order and with the plans of the dense products one by one: bits are equal."""
    monkeypatch.setattr("slidejax.ops.implementations.decode.is_small", lambda *_: False)
    choice = lambda p: Choice("hopper" if p.pattern.prunes else "dense", "")  # noqa: E731
    monkeypatch.setattr("slidejax.ops.chain.choose", choice)
    x, stages = tail("dense", dtype, rows, 512, 1032)
    if mixed:
        stages[1] = tail("6:8", dtype, rows, 512, 1032)[1][1]
    fn = jax.jit(lambda x, stages: sj.linear_chain(x, unflat(stages), (0, 2, 3)))
    assert fn.lower(x, flat(stages)).as_text().count("slidejax_chain_hopper") == 1
    ys = fn(x, flat(stages))
    for got, want in zip(ys, dense_one_by_one(x, stages, ys), strict=True):
        if dtype == "int8":
            np.testing.assert_array_equal(formulas.bits(got), formulas.bits(want))
        else:
            near(got, want)


def dense_one_by_one(x, stages, ys):
    """Each layer alone: the kernel lifts with its prologue, XLA adds the residual to float32."""
    names = ["hopper" if stage.weight.pattern.prunes else "dense" for stage in stages]
    wanted, read = [], [x, ys[0], None, ys[1]]
    linear = jax.jit(sj.linear, static_argnames=("implementation",))
    for stage, name, given in zip(stages, names, read, strict=True):
        prologue = stage.prologue
        if given is None:  # the gate and up
            given, up = jnp.split(wanted[-1], 2, axis=-1)
            prologue = sj.GLU(up, stage.prologue.activation)
        residual = ys[0] if isinstance(stage.residual, int) else stage.residual
        wanted.append(
            linear(given, stage.weight, stage.bias, name, prologue=prologue, residual=residual)
        )
    return wanted[0], wanted[2], wanted[3]


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_layers_of_two_dtypes_in_one_call(on_hopper, rows):
    x, stages = tail("6:8", "int8", rows, 512, 1032)
    down = packed("6:8", "float8_e4m3fn", 1032, 512, 2)
    hopper_equals_one_by_one(
        x, [*stages[:2], dataclasses.replace(stages[2], weight=down), stages[3]]
    )


@pytest.mark.parametrize("x_dtype", ["float16", "float32"])
def test_other_dtypes_of_x_in_the_hopper_kernel(on_hopper, x_dtype):
    hopper_equals_one_by_one(*tail("6:8", "int8", 20, 1000, 2056, x_dtype))


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rows", [16, 64, 200])
def test_the_hopper_kernel_gives_the_same_bits_every_time(on_hopper, rows, sizes, prepared):
    x, stages = tail("6:8", "int8", rows, *sizes)
    if prepared:
        stages = [
            dataclasses.replace(s, weight=sj.prepare(s.weight, "hopper", tune=False))
            for s in stages
        ]
    hopper_equals_one_by_one(x, stages)
    same_bits_every_time(x, stages, "hopper")


def test_rows_with_nan_stay_apart():
    x, stages = tail("6:8", "int8", 4, 512, 1032)
    broken = x.at[1, 3].set(jnp.nan)
    for got, want in zip(run(broken, stages), run(x, stages), strict=True):
        assert bool(jnp.isnan(got[1].astype(jnp.float32)).all())
        keep = np.array([0, 2, 3])
        np.testing.assert_array_equal(formulas.bits(got)[keep], formulas.bits(want)[keep])

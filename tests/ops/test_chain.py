"""`linear_chain` is a sequence of `linear`; on one GPU it is lowered to one call."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from linear_problem import close
from patterns import PATTERNS

import slidejax as sj
from slidejax.ops.choice import Choice

HIDDEN, INNER, WIDTH = 64, 48, 40


def packed(pattern="6:8", dtype="int8", columns=HIDDEN, out=HIDDEN, seed=0):
    kernel = np.random.default_rng(seed).standard_normal((columns, out), np.float32)
    return sj.pack(jnp.asarray(kernel / columns**0.5), pattern, dtype=dtype)


def rows_of(*shape, dtype="bfloat16", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def tail(pattern="6:8", dtype="int8", rows=(2,), x_dtype="bfloat16", bias=True):
    """x, and the stages from a layer's attention to the next one's."""
    stages = [
        sj.Stage(packed(pattern, dtype), residual=rows_of(*rows, HIDDEN, dtype=x_dtype, seed=9)),
        sj.Stage(
            packed(pattern, dtype, out=2 * INNER, seed=1),
            prologue=sj.RMSNorm(jnp.linspace(0.5, 1.5, HIDDEN), eps=1e-5),
        ),
        sj.Stage(
            packed(pattern, dtype, columns=INNER, seed=2),
            prologue=sj.GLU(activation="silu"),
            residual=0,
        ),
        sj.Stage(
            packed(pattern, dtype, out=WIDTH, seed=3),
            jnp.linspace(-1, 1, WIDTH) if bias else None,
            prologue=sj.RMSNorm(jnp.linspace(1.5, 0.5, HIDDEN)),
        ),
    ]
    return rows_of(*rows, HIDDEN, dtype=x_dtype), stages


def sequence(x, stages, implementation=None):
    """The definition of the op, written out."""
    o, gate_up, down, qkv = stages
    first = sj.linear(x, o.weight, o.bias, implementation, residual=o.residual)
    both = sj.linear(first, gate_up.weight, None, implementation, prologue=gate_up.prologue)
    gate, up = jnp.split(both, 2, axis=-1)
    glu = sj.GLU(up, "silu")
    second = sj.linear(gate, down.weight, None, implementation, prologue=glu, residual=first)
    last = sj.linear(second, qkv.weight, qkv.bias, implementation, prologue=qkv.prologue)
    return first, both, second, last


@examples(5)
@given(
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(["int8", "float8_e4m3fn", "bfloat16", "float32"]),
    x_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    rows=st.sampled_from([(1,), (3,), (2, 4), ()]),
    outputs=st.sampled_from([None, (2, 3), (0, 1, 2, 3), (3, 0)]),
    bias=st.booleans(),
)
def test_equals_the_sequence(pattern, dtype, x_dtype, rows, outputs, bias):
    x, stages = tail(pattern, dtype, rows, x_dtype, bias)
    got = jax.jit(lambda x: sj.linear_chain(x, stages, outputs))(x)
    every = jax.jit(lambda x: sequence(x, stages))(x)
    want = [every[i] for i in ((3,) if outputs is None else outputs)]
    for y, z in zip(got, want, strict=True):
        assert y.dtype == x.dtype and y.shape == z.shape
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(z, np.float32))


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_has_the_derivatives_of_the_sequence(dtype):
    x, stages = tail(dtype=dtype, x_dtype="float32")

    def with_parts(run):
        def loss(x, residual, norm, bias, values):
            o, gate_up, down, qkv = stages
            if dtype == "float32":
                down = sj.Stage(
                    down.weight.replace(values=values),
                    prologue=sj.GLU(activation="silu"),
                    residual=0,
                )
            parts = [
                sj.Stage(o.weight, residual=residual),
                sj.Stage(gate_up.weight, prologue=sj.RMSNorm(norm, eps=1e-5)),
                down,
                sj.Stage(qkv.weight, bias, qkv.prologue),
            ]
            return sum(jnp.sin(y).sum() for y in run(x, parts))

        every = (0, 1, 2, 3, 4) if dtype == "float32" else (0, 1, 2, 3)
        norm, bias = stages[1].prologue.weight, stages[3].bias
        operands = (x, stages[0].residual, norm, bias, stages[2].weight.values)
        return jax.jit(jax.grad(loss, every))(*operands)

    got = with_parts(lambda x, s: sj.linear_chain(x, s, (0, 2, 3)))
    want = with_parts(lambda x, s: [y for i, y in enumerate(sequence(x, s)) if i != 1])
    for g, w in zip(got, want, strict=True):
        assert float(jnp.abs(w).max()) > 0
        close(g, w, 1e-5)


def test_batches_of_rows_and_of_weights():
    x, stages = tail(rows=(5, 2))

    def run(x, residual, scale):
        first = sj.Stage(stages[0].weight.replace(scale=scale), residual=residual)
        return sj.linear_chain(x, [first, *stages[1:]])[0]

    scale = stages[0].weight.scale
    rows = jax.vmap(run, (0, 0, None))(x, stages[0].residual, scale)
    scales = scale * jnp.arange(1.0, 6.0)[:, None]
    weights = jax.vmap(run)(x, stages[0].residual, scales)
    for i in range(5):
        close(rows[i], run(x[i], stages[0].residual[i], scale), 1e-6)
        close(weights[i], run(x[i], stages[0].residual[i], scales[i]), 1e-6)


def test_on_a_mesh_it_is_the_sequence():
    x, stages = tail(rows=(8,))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(x, NamedSharding(mesh, P("d")))
    traced = jax.jit(lambda x: sj.linear_chain(x, stages)).trace(x)
    close(jax.jit(lambda x: sj.linear_chain(x, stages)[0])(x), sequence(x, stages)[3], 1e-6)
    assert "slidejax_chain" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_on_a_mesh_of_explicit_axes_it_is_the_sequence():
    x, stages = tail(rows=(8,))
    stages[0] = sj.Stage(stages[0].weight)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    (want,) = sj.linear_chain(x, stages[:2])
    with jax.set_mesh(mesh):
        cut = jax.device_put(x, NamedSharding(mesh, P("d")))
        (y,) = jax.jit(lambda x: sj.linear_chain(x, stages[:2]))(cut)
        assert jax.typeof(y).sharding.spec == P("d", None)
    close(y, want, 1e-6)


def test_under_shard_map_it_is_the_sequence():
    x, stages = tail(rows=(8,))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    o = stages[0]

    def local(x, residual):
        first = sj.Stage(o.weight, residual=residual)
        return sj.linear_chain(x, [first, *stages[1:]])[0]

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d")))
    close(run(x, o.residual), sequence(x, stages)[3], 1e-6)
    text = run.trace(x, o.residual).lower(lowering_platforms=("cuda",)).as_text()
    assert "slidejax_chain" not in text


def calls(text):
    return [line.split("@")[1].split("(")[0] for line in text.splitlines() if "@slidejax_" in line]


def lowered(x, stages, outputs=None, implementation="decode"):
    run = jax.jit(lambda x: sj.linear_chain(x, stages, outputs, implementation))
    return run.trace(x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("pattern", ["6:8", "dense"])
@pytest.mark.parametrize("outputs", [None, (2, 3), (0, 3)])
def test_one_call_for_cuda(outputs, pattern, dtype):
    x, stages = tail(pattern, dtype)
    text = lowered(x, stages, outputs)
    assert calls(text) == ["slidejax_chain_decode"]
    call = next(line for line in text.splitlines() if "slidejax_chain_decode" in line)
    widths = [64, 96, 64, 40]
    for i in outputs or (3,):
        assert f"tensor<2x{widths[i]}xbf16>" in call.rsplit("->", 1)[1]
    assert "adds = dense<[-1, -1, 0, -1]>" in call
    assert "gates = dense<[-1, 0, -1, -1]>" in call
    # Norm, gate and residual are in the call.
    assert not any(op in text for op in ("rsqrt", "logistic", "stablehlo.add", "exponential"))


@pytest.mark.parametrize(
    "case", ["rows", "asked for", "prologue", "gate wanted", "gate added", "float32"]
)
def test_elsewhere_it_is_the_sequence(case):
    x, stages = tail(rows=(17,) if case == "rows" else (2,))
    implementation, outputs = None, None
    if case == "asked for":
        implementation = "dense"
    if case == "prologue":
        stages[3] = sj.Stage(stages[3].weight, prologue=sj.Activation("relu"))
    if case == "gate wanted":
        implementation, outputs = "decode", (1, 3)
    if case == "gate added":
        wide = packed(columns=HIDDEN, out=2 * INNER, seed=8)
        implementation = "decode"
        stages[3] = sj.Stage(wide, residual=1)
    if case == "float32":
        x, stages = tail(dtype="float32")
    assert "slidejax_chain_decode" not in calls(lowered(x, stages, outputs, implementation))


@pytest.mark.parametrize("rows", [9, 256])
@pytest.mark.parametrize("outputs", [None, (2, 3), (0, 1, 3)])
def test_one_call_of_the_hopper_kernel(rows, outputs):
    x, stages = tail(rows=(rows,))
    text = lowered(x, stages, outputs, "hopper")
    assert calls(text) == ["slidejax_chain_hopper"]
    call = next(line for line in text.splitlines() if "slidejax_chain_hopper" in line)
    widths = [64, 96, 64, 40]
    for i in outputs or (3,):
        assert f"tensor<{rows}x{widths[i]}xbf16>" in call.rsplit("->", 1)[1]
    assert "adds = dense<[-1, -1, 0, -1]>" in call
    assert "gates = dense<[-1, -1, 0, -1]>" in call
    assert not any(op in text for op in ("rsqrt", "logistic", "stablehlo.add", "exponential"))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("rows", "chained"), [(17, True), (64, True), (65, False)])
@pytest.mark.parametrize("all_dense", [True, False])
def test_weights_that_prune_nothing_in_a_chain_of_the_hopper_kernel(
    monkeypatch, dtype, rows, chained, all_dense
):
    """Alone their products are the Hopper kernel's, too, by the implementation "dense"."""
    choice = lambda p: Choice("hopper" if p.pattern.prunes else "dense", "")  # noqa: E731
    monkeypatch.setattr("slidejax.ops.chain.choose", choice)
    x, stages = tail("dense", dtype, rows=(rows,))
    if not all_dense:
        stages[1] = dataclasses.replace(stages[1], weight=tail("6:8", dtype)[1][1].weight)
    found = calls(lowered(x, stages, (2, 3), None))
    assert (found == ["slidejax_chain_hopper"]) == chained
    assert chained or "slidejax_chain_hopper" not in found


def test_other_dense_products_are_in_no_chain(monkeypatch):
    """Of pruned weights, or of dtypes that the kernel does not take."""
    monkeypatch.setattr("slidejax.ops.chain.choose", lambda p: Choice("dense", ""))
    for pattern, dtype in (("6:8", "int8"), ("dense", "bfloat16")):
        x, stages = tail(pattern, dtype, rows=(9,))
        assert "slidejax_chain_hopper" not in calls(lowered(x, stages, None, None))


def test_dense_products_of_other_gpus_are_in_no_chain(monkeypatch):
    """There they are XLA's, and nobody has measured whether the decode kernel is faster."""
    monkeypatch.setattr("slidejax.ops.chain.choose", lambda p: Choice("dense", ""))
    x, stages = tail("dense", rows=(1,))
    assert calls(lowered(x, stages, None, None)) == ["slidejax_chain_decode"]
    monkeypatch.setattr("slidejax.ops.chain.device_kind", lambda platform: "NVIDIA A100-SXM4-80GB")
    assert not any("chain" in call for call in calls(lowered(x, stages, None, None)))


@pytest.mark.parametrize("case", ["rows", "long rows", "prologue"])
def test_where_the_hopper_kernel_runs_them_one_by_one(case):
    x, stages = tail(rows=(257,) if case == "rows" else (9,))
    if case == "long rows":  # of which the lift computes no norm
        long, norm = 8 * (13 << 10), sj.RMSNorm(jnp.ones(8 * (13 << 10)))
        x, stages = rows_of(9, long), [sj.Stage(packed(columns=long, out=8), prologue=norm)]
    if case == "prologue":
        stages[3] = sj.Stage(stages[3].weight, prologue=sj.Activation("relu"))
    found = calls(lowered(x, stages, None, "hopper"))
    assert found and "slidejax_chain_hopper" not in found


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_rows_do_not_ask_for_prepared_forms(monkeypatch, rows):
    """A chain reads the packed form, and is faster than prepared forms one by one."""
    asked = []
    monkeypatch.setattr(
        "slidejax.ops.chain.choose", lambda p: asked.append(p) or Choice("decode", "")
    )
    x, stages = tail(rows=(rows,))
    stages = [
        dataclasses.replace(s, weight=sj.prepare(s.weight, "dense", tune=False)) for s in stages
    ]
    assert calls(lowered(x, stages, None, None)) == ["slidejax_chain_decode"]
    assert {p.prepared for p in asked} == {() if rows <= 2 else ("dense",)}


@pytest.mark.parametrize(
    ("rows", "faster", "kernel"),
    [
        (2, ["hopper"], "decode"),
        (4, ["hopper", "decode"], "hopper"),
        (5, ["hopper", "decode"], "hopper"),
        (5, ["decode"], "decode"),
        (2, ["dense", "decode"], None),
    ],
)
def test_a_chain_of_large_inputs_runs_in_one_kernel(monkeypatch, rows, faster, kernel):
    """Whichever of the two is faster for a single layer."""
    monkeypatch.setattr("slidejax.ops.implementations.decode.is_small", lambda *_: False)
    names = iter(faster * 4)
    monkeypatch.setattr("slidejax.ops.chain.choose", lambda p: Choice(next(names), ""))
    found = calls(lowered(*tail(rows=(rows,)), None, None))
    chains = [name for name in found if name.startswith("slidejax_chain")]
    assert chains == ([] if kernel is None else [f"slidejax_chain_{kernel}"])


@pytest.mark.parametrize("faster", [["decode"], ["hopper"], ["hopper", "decode"]])
@pytest.mark.parametrize(("rows", "kernel"), [(3, "decode"), (16, "decode"), (17, "hopper")])
def test_a_chain_of_small_inputs_runs_in_the_decode_kernel(monkeypatch, rows, kernel, faster):
    names = iter(faster * 4)
    monkeypatch.setattr("slidejax.ops.chain.choose", lambda p: Choice(next(names), ""))
    assert calls(lowered(*tail(rows=(rows,)), None, None)) == [f"slidejax_chain_{kernel}"]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("rows", range(1, 6))
def test_a_chain_of_two_dtypes_runs_in_the_kernel_that_takes_both(monkeypatch, rows, small):
    monkeypatch.setattr("slidejax.ops.implementations.decode.is_small", lambda *_: small)
    x, stages = tail(rows=(rows,))
    stages[2] = dataclasses.replace(
        stages[2], weight=packed(dtype="float8_e4m3fn", columns=INNER, seed=2)
    )
    kernel = "decode" if rows <= 2 or small else "hopper"
    assert calls(lowered(x, stages, None, None)) == [f"slidejax_chain_{kernel}"]


def test_a_gate_of_x_itself_is_computed_ahead():
    x, stages = rows_of(2, 2 * INNER), tail()[1]
    first = sj.Stage(stages[2].weight, prologue=sj.GLU(activation="gelu"))
    text = lowered(x, [first, stages[1]])
    assert calls(text) == ["slidejax_chain_decode"]
    (y,) = sj.linear_chain(x, [first])
    gate, up = jnp.split(x, 2, axis=-1)
    close(y, sj.linear(gate, first.weight, prologue=sj.GLU(up, "gelu")), 1e-6)


def test_other_weights_than_packed_ones():
    x, stages = tail(dtype="float32", x_dtype="float32")
    adapted = sj.adapters.add({"o": {"kernel": stages[0].weight}}, rank=2)["o"]["kernel"]
    o = sj.Stage(adapted, residual=stages[0].residual)
    (y,) = sj.linear_chain(x, [o, *stages[1:]])
    close(y, sequence(x, [o, *stages[1:]])[3], 1e-6)


def test_explain_shows_every_layer():
    x, stages = tail()
    found = sj.explain(lambda x: sj.linear_chain(x, stages), x, platform="cuda")
    assert [(p.in_features, p.out_features) for p, _ in found] == [
        (64, 64),
        (64, 96),
        (48, 64),
        (64, 40),
    ]
    assert [p.has_residual for p, _ in found] == [True, False, True, False]


@pytest.mark.parametrize(("rows", "kernel"), [(1, "decode"), (16, "decode"), (17, "hopper")])
def test_explain_says_in_which_kernel_a_chain_runs(rows, kernel):
    """Whatever its layers would run in alone."""
    x, stages = tail(rows=(rows,))
    assert calls(lowered(x, stages, None, None)) == [f"slidejax_chain_{kernel}"]
    found = sj.explain(lambda x: sj.linear_chain(x, stages), x, platform="cuda")
    assert [choice.implementation for _, choice in found] == [kernel] * 4
    assert "one call with the products around it" in str(found)
    apart = sj.explain(lambda x: sj.linear_chain(x, stages), x, platform="cpu")
    assert [choice.implementation for _, choice in apart] == ["dense"] * 4


W = packed()


@pytest.mark.parametrize(
    ("stages", "outputs", "error", "message"),
    [
        ([], None, ValueError, "at least one Stage"),
        (W, None, TypeError, "stages must be a list of Stage"),
        ([W], None, TypeError, r"list of Stage, got \['SlideWeight'\]"),
        ([sj.Stage(jnp.ones((8, 8)))], None, TypeError, r"stages\[0\].weight must be a Linear"),
        ([sj.Stage(packed(columns=24))], None, ValueError, r"stages\[0\].weight has 24 inputs"),
        (
            [sj.Stage(W), sj.Stage(W, prologue=sj.GLU(activation="silu"))],
            None,
            ValueError,
            "input of 128 columns",
        ),
        ([sj.Stage(W, prologue="silu")], None, TypeError, "must be an RMSNorm"),
        ([sj.Stage(W, residual=0)], None, ValueError, "number of an earlier stage"),
        ([sj.Stage(W), sj.Stage(W, residual=-1)], None, ValueError, "earlier stage .* got -1"),
        ([sj.Stage(W, residual=True)], None, TypeError, "got a bool"),
        ([sj.Stage(W, residual=jnp.ones((1, 64)))], None, ValueError, r"\(2, 64\), got float32"),
        ([sj.Stage(W, jnp.ones(3))], None, ValueError, r"stages\[0\].bias must be floating"),
        ([sj.Stage(W, prologue=sj.RMSNorm(jnp.ones(3)))], None, ValueError, "weight must have"),
        (
            [sj.Stage(W, prologue=sj.GLU(jnp.ones((2, 64), "bfloat16")))],
            None,
            ValueError,
            "must be a GLU without an array",
        ),
        ([sj.Stage(W)], (1,), ValueError, r"outputs must be different numbers"),
        ([sj.Stage(W)], (0, 0), ValueError, r"outputs must be different numbers"),
    ],
)
def test_errors_name_what_is_wrong(stages, outputs, error, message):
    with pytest.raises(error, match=message):
        sj.linear_chain(rows_of(2, HIDDEN), stages, outputs)


def test_any_number_of_rows_is_exported_for_cuda_as_the_sequence():
    w = sj.pack(jnp.ones((64, 64)), "6:8", dtype="int8")
    (rows,) = jax.export.symbolic_shape("rows")
    run = jax.jit(lambda x: sj.linear_chain(x, [sj.Stage(w), sj.Stage(w, residual=0)]))
    exported = jax.export.export(run, platforms=["cpu", "cuda"])(
        jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    )
    (got,) = exported.call(jnp.ones((3, 64)))
    np.testing.assert_array_equal(got, run(jnp.ones((3, 64)))[0])

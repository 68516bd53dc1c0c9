import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_implementation import Toy

import slidejax as sj
from slidejax.bench import run as race
from slidejax.bench import tuning
from slidejax.bench.timing import Clock
from slidejax.commands import info
from slidejax.ops import registry
from slidejax.ops.tuning import Variant

QUICK = Clock(0.001, 0.005)

cpu_only = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="tests what a machine without a GPU does"
)


def problem(dtype="int8", pattern="6:8"):
    return jnp.ones((16, 128), jnp.bfloat16), sj.pack(jnp.ones((128, 64)), pattern, dtype=dtype)


def cuda_text(fn, *args):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_the_order_in_which_implementations_are_asked():
    assert sj.implementations() == ("decode", "hopper", "cusparselt", "dense", "reference")


@cpu_only
@pytest.mark.parametrize(
    ("implementation", "target"),
    [("cusparselt", "slidejax_sparse_matmul_cusparselt"), ("hopper", "slidejax_linear_hopper")],
)
def test_cuda_programs_are_lowered_ahead_of_time(implementation, target):
    x, w = problem()
    text = cuda_text(lambda x, w: sj.linear(x, w, implementation=implementation), x, w)
    assert target in text and ("slidejax_lift_quantize" in text) == (implementation == "cusparselt")


@cpu_only
def test_the_pattern_dense_is_the_dense_product():
    x, w = problem(pattern="dense")
    [(_, choice)] = sj.explain(sj.linear, x, w, platform="cuda")
    assert choice.implementation == "dense" and choice.reason == "nothing is pruned"
    for name in ("hopper", "cusparselt"):
        assert "no zeros to skip" in choice.refused[name]
        with pytest.raises(NotImplementedError, match="the pattern dense prunes nothing"):
            cuda_text(lambda x, w, name=name: sj.linear(x, w, implementation=name), x, w)
    # It is quantised without lifting, in one step and in two.
    for run, call in (
        (sj.linear, "linear"),
        (lambda x, w: sj.sparse_matmul(*sj.lift_quantize(x, "dense"), w), "sparse_matmul"),
    ):
        text = cuda_text(run, x, w)
        assert f"slidejax_{call}_hopper" in text and "dot_general" not in text
        assert "group = 0 : i32" in text and "transpose" not in text and "concatenate" not in text


@cpu_only
@pytest.mark.parametrize("implementation", ["cusparselt", "decode", "hopper"])
def test_cuda_only_implementations_do_not_run_on_a_cpu(implementation):
    x, w = problem()
    for run in (sj.linear, jax.jit(sj.linear, static_argnames="implementation")):
        with pytest.raises(NotImplementedError, match="CUDA only"):
            run(x, w, implementation=implementation)


@cpu_only
def test_every_refusal_has_a_reason():
    x, w = problem("float32")
    with pytest.raises(NotImplementedError, match="float32"):
        cuda_text(lambda x, w: sj.linear(x, w, implementation="hopper"), x, w)
    with pytest.raises(NotImplementedError, match="float32"):
        cuda_text(lambda x, w: sj.linear(x, w, implementation="cusparselt"), x, w)
    [(_, choice)] = sj.explain(sj.linear, x, w, platform="cuda")
    assert set(choice.refused) >= {"decode", "hopper", "cusparselt"}
    assert all(choice.refused.values()) and choice.implementation == "dense"


# --- an implementation of one's own ---------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", list(registry._IMPLEMENTATIONS))
    monkeypatch.setattr(Toy, "searched", [])
    shipped = sj.implementations()
    registry.register(Toy())
    return shipped


def random_problem(rows=4):
    kernel, x, bias = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(100, 48), (rows, 100), (48,)])
    )
    return x, sj.pack(kernel, "6:8", dtype="int8"), bias


@pytest.mark.parametrize("prologue", [None, sj.Activation("silu")])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_registered_implementation_runs(toy, prepared, prologue):
    assert sj.implementations() == ("toy", *toy)  # before those that slidejax ships
    x, w, bias = random_problem()
    if prepared:
        w = sj.prepare(w, "toy")
        assert w.prepared["toy_codes"].shape == (100, 48)

    def run(implementation):
        return jax.jit(lambda x: sj.linear(x, w, bias, implementation, prologue=prologue))(x)

    np.testing.assert_array_equal(run("toy"), run("reference"))
    # It gets no problems that it cannot compute.
    assert sj.linear(x[:0], w, bias, "toy").shape == (0, 48)
    with pytest.raises(NotImplementedError, match="'toy' refuses: at most 64 rows, not 65"):
        sj.linear(jnp.ones((65, 100)), w, bias, "toy")
    with pytest.raises(NotImplementedError, match="whole layers only"):
        sj.sparse_matmul(*sj.lift_quantize(x, "6:8"), w, implementation="toy")


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
def test_one_that_knows_nothing_of_residuals_runs_with_one(toy, out_dtype):
    x, w, bias = random_problem()
    residual = jax.random.normal(jax.random.key(3), (4, 48), jnp.bfloat16)
    options = {"out_dtype": out_dtype, "residual": residual}
    y = sj.linear(x, w, bias, "toy", **options)
    want = sj.linear(x, w, bias, "toy", "float32") + residual.astype(jnp.float32)
    np.testing.assert_array_equal(y, want.astype(out_dtype))
    np.testing.assert_allclose(
        y.astype(jnp.float32),
        sj.linear(x, w, bias, "reference", **options).astype(jnp.float32),
        rtol=1e-2 if out_dtype == "bfloat16" else 1e-6,
        atol=1e-5,
    )
    assert sj.linear(x[:0], w, bias, "toy", residual=residual[:0]).shape == (0, 48)


def test_it_is_asked_whether_it_has_the_float32_results_to_which_a_residual_is_added(toy):
    asked = []

    class Narrow(Toy):
        name, form = "narrow", None

        def refuses(self, problem):
            asked.append((str(problem.out_dtype), problem.has_residual))
            return None if problem.out_dtype == jnp.bfloat16 else "bfloat16 results only"

    class Native(Narrow):
        name, takes_residual = "native", True

        def linear(self, x, prologue, w, bias, out_dtype, platform="default", residual=None):
            assert out_dtype == jnp.bfloat16
            y = super().linear(x, prologue, w, bias, jnp.float32, platform)
            return (y if residual is None else y + residual).astype(out_dtype)

    registry.register(Narrow())
    registry.register(Native())
    x, w, bias = random_problem()
    residual = jnp.ones((4, 48))

    def run(name, residual):
        return sj.linear(x, w, bias, name, "bfloat16", residual=residual)

    assert run("narrow", None).dtype == jnp.bfloat16 and asked.pop() == ("bfloat16", False)
    with pytest.raises(NotImplementedError, match="'narrow' refuses: bfloat16 results only"):
        run("narrow", residual)
    assert asked.pop() == ("float32", False)
    np.testing.assert_array_equal(run("native", residual), run("dense", residual))
    assert asked.pop() == ("bfloat16", True)


@pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 CPU devices")
def test_a_registered_implementation_runs_over_a_mesh(toy):
    x, w, bias = random_problem(rows=8)
    w = sj.prepare(w, "toy")
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:8]), ("m",))
    rows, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)) for spec in (["m"], [])
    )
    y = jax.jit(lambda x, w: sj.linear(x, w, bias, "toy"))(
        jax.device_put(x, rows), jax.device_put(w, whole)
    )
    np.testing.assert_array_equal(y, sj.linear(x, w, bias, "reference"))
    assert y.sharding.is_equivalent_to(rows, 2)


@cpu_only
def test_a_registered_implementation_is_tuned_and_then_chosen(toy, tmp_path):
    _, w, _ = random_problem()

    def choice(rows, w=w):
        [(_, found)] = sj.explain(sj.linear, jax.ShapeDtypeStruct((rows, 100), jnp.float32), w)
        return found

    assert choice(4).implementation == "dense" and "no measurement" in choice(4).reason
    assert choice(65).refused["toy"] == "at most 64 rows, not 65"
    notes = []
    entries, path = tuning.measure(
        [(48, 100)], patterns=["6:8"], dtypes=["int8"], rows=[4, 65], clock=QUICK, note=notes.append
    )
    assert [[str(variant) for variant in e["us"]] for e in entries] == [
        ["toy", "toy+prepared", "dense", "dense+prepared"],
        ["dense", "dense+prepared"],
    ]
    assert Toy.searched == [4] and "toy has nothing to find at 4 rows" in notes
    assert list(sj.tune.entries(jax.devices()[0].device_kind)) == entries
    assert path is not None and path.is_relative_to(tmp_path)
    for e in entries:
        e["us"] |= {Variant("dense"): 9.0, Variant("toy"): 10.0, Variant("toy", "toy_codes"): 8.0}
    sj.tune.record("cpu", entries)
    assert choice(4).implementation == "dense" and choice(65).implementation == "dense"
    assert choice(4, sj.prepare(w, "toy")).implementation == "toy"
    assert "toy 8 us, dense 9 us" in choice(4, sj.prepare(w, "toy")).reason


@cpu_only
def test_a_registered_implementation_is_in_the_race_and_in_the_report(toy):
    results = race.measure(
        [(48, 100)], patterns=["6:8"], dtypes=["int8"], rows=[4, 65], clock=QUICK
    )
    few, many = results["linear"]
    assert few["us"]["toy+prepared"] > 0 and "toy+prepared" not in many["us"]
    assert few["settings"] == {"toy": "toy settings of 4 rows"} and not many["settings"]
    text = race.table(results)
    assert "settings of toy" in text and "not timed: int8 toy: at most 64 rows, not 65" in text
    facts = info.collect()
    assert facts["implementations"]["toy"] == {
        f"{dtype} {rows}": None if dtype == "int8" else f"values must be int8, not {dtype}"
        for dtype in ("int8", "float8_e4m3fn", "bfloat16")
        for rows in (1, 16)
    }
    assert facts["cuda_library"]["toy_version"] == "0.1" and "toy version 0.1" in info.text(facts)


def test_what_cannot_be_registered(toy):
    with pytest.raises(TypeError, match="an object of a subclass of Implementation"):
        registry.register(Toy)
    with pytest.raises(ValueError, match="an implementation called 'toy' already"):
        registry.register(Toy())

    class Other(Toy):
        name = "other"

    with pytest.raises(ValueError, match="a prepared form called 'toy_codes' already"):
        registry.register(Other())
    for name in ("toy+prepared", "class", "None", "", 5, None):
        badly_named = type("BadlyNamed", (Other,), {"name": name})
        with pytest.raises(ValueError, match="must be an identifier"):
            registry.register(badly_named())


def test_one_that_fails_stops_no_call_that_names_another(monkeypatch):
    def fails(self, problem):
        raise RuntimeError("boom")

    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", [*registry._IMPLEMENTATIONS])
    registry.register(
        type("Failing", (Toy,), {"name": "failing", "form": None, "refuses": fails})()
    )
    x, w, *_ = random_problem()
    assert sj.linear(x, w, implementation="dense").shape == (x.shape[0], w.out_features)


def test_names_are_checked(toy):
    with pytest.raises(ValueError, match=f"one of {', '.join(['toy', *toy])}, got 'magic'"):
        sj.linear(jnp.ones((1, 100)), random_problem()[1], implementation="magic")

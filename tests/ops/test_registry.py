import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.ops import tuning
from slidejax.ops.problem import device_kind

cpu_only = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="tests what a machine without a GPU does"
)


def problem(dtype="int8", pattern="6:8"):
    return jnp.ones((16, 128), jnp.bfloat16), sj.pack(jnp.ones((128, 64)), pattern, dtype=dtype)


def cuda_text(fn, *args):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


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
def test_dense_on_cuda_quantises_and_multiplies_in_one_call():
    x, w = problem()
    text = cuda_text(lambda x, w: sj.linear(x, w, implementation="dense"), x, w)
    assert "slidejax_linear_hopper" in text and "dot_general" not in text


@cpu_only
def test_the_pattern_dense_is_the_dense_product():
    x, w = problem(pattern="dense")
    [(_, choice)] = sj.explain(sj.linear, x, w, platform="cuda")
    assert choice.implementation == "dense" and choice.reason == "nothing is pruned"
    assert "no zeros to skip" in choice.refused["hopper"] and choice.refused.keys() == {
        "hopper",
        "cusparselt",
    }
    for name in ("hopper", "cusparselt"):
        with pytest.raises(NotImplementedError, match="the pattern dense prunes nothing"):
            cuda_text(lambda x, w, name=name: sj.linear(x, w, implementation=name), x, w)
    # quantised without lifting, in one step and in two
    for run, call in (
        (sj.linear, "linear"),
        (lambda x, w: sj.sparse_matmul(*sj.lift_quantize(x, "dense"), w), "sparse_matmul"),
    ):
        text = cuda_text(run, x, w)
        assert f"slidejax_{call}_hopper" in text and "dot_general" not in text
        assert "group = 0 : i32" in text and "transpose" not in text and "concatenate" not in text


@cpu_only
@pytest.mark.parametrize("implementation", ["cusparselt", "hopper"])
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
    assert set(choice.refused) == {"hopper", "cusparselt"} and choice.implementation == "dense"


def test_explain_sees_through_transformations():
    x, w = problem()

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


def entry(rows, us, **changes):
    return {
        "in": 128,
        "out": 64,
        "pattern": "6:8",
        "dtype": "int8",
        "rows": rows,
        "us": us,
    } | changes


@cpu_only
def test_the_choice_follows_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    device = device_kind("cuda")
    _x, w = problem()
    tuning.record(
        device,
        [entry(16, {"hopper": 2.0, "dense": 1.0}), entry(4096, {"hopper": 50.0, "dense": 60.0})],
    )

    def choice(rows, w=w):
        [(_, choice)] = sj.explain(
            sj.linear, jnp.ones((rows, 128), jnp.bfloat16), w, platform="cuda"
        )
        return choice

    assert choice(16).implementation == "dense" and choice(4096).implementation == "hopper"
    assert "hopper 50 us, dense 60 us" in choice(4096).reason and "M=4096" in choice(4096).reason
    # what carries a prepared form is judged by the figure with it
    tuning.record(device, [entry(16, {"hopper": 2.0, "dense": 1.0, "hopper+prepared": 0.5})])
    assert choice(16).implementation == "dense"
    prepared = w.replace(prepared={"hopper": jnp.zeros(4, jnp.uint8)})
    assert choice(16, prepared).implementation == "hopper"
    # far from anything measured: dense, and it says so
    far = sj.pack(jnp.ones((4096, 8192), jnp.bfloat16), "6:8", dtype="int8")
    [(_, unknown)] = sj.explain(sj.linear, jnp.ones((16, 4096), jnp.bfloat16), far, platform="cuda")
    assert unknown.implementation in ("dense", "hopper") and unknown.reason


@cpu_only
def test_tables_are_merged_and_damaged_ones_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    path = tuning.record("Test GPU", [entry(1, {"dense": 3.0})])
    tuning.record("Test GPU", [entry(1, {"dense": 2.0}), entry(2, {"dense": 5.0})])
    assert [e["us"]["dense"] for e in tuning.entries("Test GPU")] == [2.0, 5.0]
    assert json.loads(path.read_text())["device"] == "Test GPU"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"test-gpu\.json"):
        tuning.entries("Test GPU")


def test_shipped_tables_are_sound():
    for path in sorted(tuning._SHIPPED.glob("*.json")):
        for e in tuning._read(path):
            sj.Pattern.parse(e["pattern"])
            assert (
                np.dtype(jnp.dtype(e["dtype"]))
                and e["rows"] > 0
                and all(us > 0 for us in e["us"].values())
            )

"""The measured table decides which implementation runs, and which forms a weight carries."""

import json

import jax
import jax.numpy as jnp
import pytest
from tuning_entries import entry

import slidejax as sj
from slidejax.ops import choice, registry, tuning
from slidejax.ops.problem import Problem, device_kind

cpu_only = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="tests what a machine without a GPU does"
)
DEVICE = "A GPU of this test"


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """`measured(*us)`: makes a table with one entry for each, and returns a weight of its shape.

    The entries are for 1, 16, 256, ... rows.
    """
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "device_kind", lambda platform: DEVICE)

    def write(*times):
        entries = [
            {"in": 64, "out": 32, "pattern": "6:8", "dtype": "int8", "rows": 16**i, "us": us}
            for i, us in enumerate(times)
        ]
        path = tuning.table_path(DEVICE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": 1, "device": DEVICE, "jax": "", "entries": entries}))
        return sj.pack(jnp.ones((64, 32)), "6:8", dtype="int8")

    return write


@pytest.mark.parametrize(
    ("times", "forms"),
    [
        ([], ("dense",)),
        ([{"hopper+prepared": 10.0, "dense+prepared": 15.0}], ("hopper",)),
        # Nearly as fast for all rows: one form is enough, and it is slow for none of them.
        (
            [
                {"hopper+prepared": 10.0, "dense+prepared": 15.0},
                {"hopper+prepared": 10.5, "dense+prepared": 10.0},
            ],
            ("hopper",),
        ),
        (
            [
                {"hopper+prepared": 10.0, "dense+prepared": 15.0},
                {"hopper+prepared": 13.0, "dense+prepared": 10.0},
            ],
            ("hopper", "dense"),
        ),
        ([{"hopper": 10.2, "hopper+prepared": 10.0, "dense+prepared": 15.0}], ()),
        (
            [
                {"cusparselt+prepared": 7.0, "dense+prepared": 10.0},
                {"cusparselt+prepared": 20.0, "dense+prepared": 10.0},
            ],
            ("cusparselt", "dense"),
        ),
        # One form is enough, and the large one has to be more than 5 % faster.
        ([{"hopper+prepared": 10.4, "dense+prepared": 10.0}], ("hopper",)),
        ([{"hopper+prepared": 10.8, "dense+prepared": 10.0}], ("dense",)),
        ([{"cusparselt+prepared": 11.0, "hopper+prepared": 10.0}], ("hopper",)),
    ],
    ids=[
        "nothing measured",
        "one",
        "nearly",
        "both",
        "none needed",
        "far apart",
        "large for little",
        "large for more",
        "the faster",
    ],
)
def test_a_weight_carries_few_prepared_forms(measured, times, forms):
    assert set(choice.forms(measured(*times))) == set(forms)


def test_what_ships_wants_one_form(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "device_kind", lambda platform: "NVIDIA H200")
    for inputs, out in ((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)):
        kernel = jax.ShapeDtypeStruct((inputs, out), jnp.float32)

        def weight(pattern, dtype, kernel=kernel):
            return jax.eval_shape(lambda k: sj.pack(k, pattern, dtype=dtype), kernel)

        assert choice.forms(weight("6:8", "int8")) == ("hopper",)
        # This pattern was measured with int8 only.
        assert choice.forms(weight("4:6", "float8_e4m3fn")) == ("hopper",)
        # Sparse products gain nothing here.
        assert choice.forms(weight("8:10", "int8")) == ("dense",)


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_a_shape_that_was_not_measured_runs_as_it_lies_on_hopper(monkeypatch, tmp_path, device):
    """Dense codes would keep small models out of the kernels, and their chains."""
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "device_kind", lambda platform: device)
    kernel = jax.ShapeDtypeStruct((576, 960), jnp.float32)  # SmolLM2's q, k and v
    for dtype, form in (("int8", ()), ("float8_e4m3fn", ()), ("bfloat16", ("dense",))):
        w = jax.eval_shape(lambda k, dtype=dtype: sj.pack(k, "6:8", dtype=dtype), kernel)
        assert choice.forms(w) == form
        x = jnp.dtype("bfloat16")
        for rows in (1, 16, 4096):
            product = Problem("linear", "cuda", device, rows, 576, 960, w.pattern, x, w.dtype, x)
            found = choice.choose(product)
            assert found.implementation in ("decode", "hopper") or dtype == "bfloat16"


def test_a_dtype_that_was_not_measured_is_taken_for_its_twin(measured):
    measured({"hopper+prepared": 10.0, "dense+prepared": 15.0})
    assert choice.forms(sj.pack(jnp.ones((64, 32)), "6:8", dtype="float8_e4m3fn")) == ("hopper",)
    assert choice.forms(sj.pack(jnp.ones((64, 32)), "6:8")) == ("dense",)
    assert choice.forms(sj.pack(jnp.ones((64, 32)), "4:6", dtype="int8")) == ("dense",)


@cpu_only
def test_the_choice_follows_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    device = device_kind("cuda")
    w = sj.pack(jnp.ones((128, 64)), "6:8", dtype="int8")
    tuning.record(
        device,
        [entry(16, {"hopper": 2.0, "dense": 1.0}), entry(4096, {"hopper": 50.0, "dense": 60.0})],
    )

    def chosen(rows, w=w):
        [(_, found)] = sj.explain(
            sj.linear, jnp.ones((rows, 128), jnp.bfloat16), w, platform="cuda"
        )
        return found

    assert chosen(16).implementation == "dense" and chosen(4096).implementation == "hopper"
    assert "hopper 50 us, dense 60 us" in chosen(4096).reason and "M=4096" in chosen(4096).reason
    # A weight with a prepared form is judged by its time with this form.
    tuning.record(device, [entry(16, {"hopper": 2.0, "dense": 1.0, "hopper+prepared": 0.5})])
    assert chosen(16).implementation == "dense"
    size = registry.form_of("hopper").shape(w)
    prepared = w.replace(prepared={"hopper": jnp.zeros(size, jnp.uint8)})
    assert chosen(16, prepared).implementation == "hopper"
    # Nothing near was measured: what reads the packed form runs, and says so.
    far = sj.pack(jnp.ones((128, 16384), jnp.bfloat16), "6:8", dtype="int8")
    [(_, unknown)] = sj.explain(sj.linear, jnp.ones((17, 128), jnp.bfloat16), far, platform="cuda")
    assert unknown.implementation == "hopper" and "reads the weight as it is" in unknown.reason
    [(_, unknown)] = sj.explain(sj.linear, jnp.ones((1, 128), jnp.bfloat16), far, platform="cuda")
    assert unknown.implementation == "decode"


@cpu_only
def test_the_nearest_entry_may_lack_what_can_run(measured):
    """Tables of two ages: the nearest entry has only a form that the weight does not carry."""
    w = measured({"hopper+prepared": 1.0}, {"hopper": 2.0, "dense": 3.0})

    def found(names):
        problem = Problem(
            "linear", "cuda", DEVICE, 3, 64, 32, w.pattern, jnp.bfloat16, w.dtype, jnp.bfloat16
        )
        return choice.lookup(problem, names)

    name, reason = found(["hopper", "dense"])
    assert name == "hopper" and "M=16" in reason
    assert found(["dense"])[0] == "dense"
    assert found(["decode"]) is None


def test_a_measurement_that_lacks_a_candidate_does_not_decide_against_it(measured):
    """The nearest entry is older than an implementation, which a farther one compares."""
    w = measured(
        {"hopper+prepared": 2.0, "dense": 5.0},
        {"hopper+prepared": 9.0, "decode": 7.0},
        {"hopper+prepared": 9.0, "decode": 12.0, "cusparselt": 1.0},
    )

    def found(rows, *names):
        sizes = rows, 64, 32, w.pattern, jnp.bfloat16, w.dtype, jnp.bfloat16, ("hopper",)
        return choice.lookup(Problem("linear", "cuda", DEVICE, *sizes), names)

    name, reason = found(2, "hopper", "dense", "decode")
    assert name == "decode"
    assert reason == (
        "measured at M=1 K=64 N=32: hopper 2 us, dense 5 us; "
        "measured at M=16 K=64 N=32: decode 7 us, hopper 9 us"
    )
    assert found(200, "hopper", "dense", "decode")[0] == "hopper"
    assert found(2, "dense", "decode")[0] == "dense"  # nothing compares the two
    # Measurements that are too far away do not count.
    assert found(2, "hopper", "cusparselt")[0] == "hopper"

"""The measured table as `prepare` reads it; the choice by it is tested with the registry."""

import json

import jax
import jax.numpy as jnp
import pytest

import slidejax as sj
from slidejax.ops import tuning

DEVICE = "A GPU of this test"


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """`measured(*us)`: makes a table of one entry for each, at rows 1, 16, 256, ... of one shape; returns a weight of that shape."""
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "device_kind", lambda platform: DEVICE)

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
        # nearly as fast everywhere: one form is enough, and it is the one that leaves nobody slow
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
        # one is enough, and the large one has to be more than 5 % faster
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
    assert set(tuning.forms(measured(*times))) == set(forms)


def test_what_ships_wants_one_form(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "device_kind", lambda platform: "NVIDIA H200")
    for inputs, out in ((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)):
        kernel = jax.ShapeDtypeStruct((inputs, out), jnp.float32)

        def weight(pattern, dtype, kernel=kernel):
            return jax.eval_shape(lambda k: sj.pack(k, pattern, dtype=dtype), kernel)

        assert tuning.forms(weight("6:8", "int8")) == ("hopper",)
        assert tuning.forms(weight("4:6", "float8_e4m3fn")) == (
            "hopper",
        )  # measured with int8 only
        assert tuning.forms(weight("8:10", "int8")) == (
            "dense",
        )  # nothing to be gained by sparse products


def test_a_dtype_that_was_not_measured_is_taken_for_its_twin(measured):
    measured({"hopper+prepared": 10.0, "dense+prepared": 15.0})
    assert tuning.forms(sj.pack(jnp.ones((64, 32)), "6:8", dtype="float8_e4m3fn")) == ("hopper",)
    assert tuning.forms(sj.pack(jnp.ones((64, 32)), "6:8")) == ("dense",)
    assert tuning.forms(sj.pack(jnp.ones((64, 32)), "4:6", dtype="int8")) == ("dense",)

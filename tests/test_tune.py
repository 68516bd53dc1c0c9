"""The measured table as `prepare` reads it; the choice by it is tested with the registry."""

import json

import jax
import jax.numpy as jnp
import pytest

import slidejax as sj
from slidejax import tune
from slidejax.ops import registry

DEVICE = "A GPU of this test"


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """`measured(*us)`: makes a table of one entry for each, at rows 1, 16, 256, ... of one shape; returns a weight of that shape."""
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(registry, "device_kind", lambda platform: DEVICE)

    def write(*times):
        entries = [{"in": 64, "out": 32, "pattern": "6:8", "dtype": "int8", "rows": 16**i, "us": us} for i, us in enumerate(times)]
        path = tune.table_path(DEVICE)
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
        ([{"hopper+prepared": 10.0, "dense+prepared": 15.0}, {"hopper+prepared": 10.5, "dense+prepared": 10.0}], ("hopper",)),
        ([{"hopper+prepared": 10.0, "dense+prepared": 15.0}, {"hopper+prepared": 13.0, "dense+prepared": 10.0}], ("hopper", "dense")),
        ([{"hopper": 10.2, "hopper+prepared": 10.0, "dense+prepared": 15.0}], ()),
        ([{"cusparselt+prepared": 7.0, "dense+prepared": 10.0}, {"cusparselt+prepared": 20.0, "dense+prepared": 10.0}], ("cusparselt", "dense")),
    ],
    ids=["nothing measured", "one", "nearly", "both", "none needed", "far apart"],
)
def test_a_weight_carries_few_prepared_forms(measured, times, forms):
    assert set(tune.forms(measured(*times))) == set(forms)


def test_what_ships_wants_one_form_for_6_8_int8(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(registry, "device_kind", lambda platform: "NVIDIA H200")
    for inputs, out in ((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)):
        kernel = jax.ShapeDtypeStruct((inputs, out), jnp.float32)
        assert tune.forms(jax.eval_shape(lambda k: sj.pack(k, "6:8", dtype="int8"), kernel)) == ("hopper",)

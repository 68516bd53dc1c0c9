"""The parameters that serve on a GPU. tests/lm/decoder/test_writing.py has those of a CPU."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_formulas import bits

import slidejax as sj
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.decoder.fuse import fuse, serving
from slidejax.variants.prepared import weights_of
from slidejax.weights.pattern import UNPRUNED

MODULE = importlib.import_module(
    "slidejax.lm.decoder.fuse"
)  # its package has a function of that name


@pytest.fixture
def device(monkeypatch):
    """`device(name)`: serves on a GPU of this name."""

    def present(name):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr("slidejax.ops.cuda.library.on_gpu", lambda: False)
        monkeypatch.setattr(MODULE, "device_kind", lambda platform: name)

    return present


@pytest.fixture(scope="module")
def small():
    """With e4m3 in the down projections."""
    return sj.lm.convert(tiny(), sj.lm.eight_bit("6:8"), "magnitude").params


def test_small_models_serve_with_their_zeros_on_a_hopper_gpu(device, small):
    packed = weights_of(fuse(small))
    device("NVIDIA H100 80GB HBM3")
    whole = weights_of(serving(small))
    assert {w.dtype.name for w in whole} == {"int8", "float8_e4m3fn"}
    for w, other in zip(whole, packed, strict=True):
        assert w.pattern == UNPRUNED and w.dtype == other.dtype
        w.check()
        np.testing.assert_array_equal(sj.unpack(w), sj.unpack(other))
        x = np.random.default_rng(0).standard_normal((3, w.in_features), np.float32)
        results = [sj.linear(jnp.asarray(x, "bfloat16"), each) for each in (w, other)]
        np.testing.assert_array_equal(*map(bits, results))
    assert all(w.pattern.prunes for w in weights_of(small))  # the model itself stays as it is


@pytest.mark.parametrize("case", ["another GPU", "large", "no chains", "a layer left out"])
def test_others_serve_as_they_are_packed(device, monkeypatch, small, case):
    device("NVIDIA L4" if case == "another GPU" else "NVIDIA H100 80GB HBM3")
    if case == "large":
        monkeypatch.setattr(MODULE, "is_small", lambda *_: False)
    if case == "no chains":
        norms = {"post_feedforward_layernorm": {"weight": jnp.ones(1)}}
        small = of_layers(small, lambda layer: {**layer, **norms})
    if case == "a layer left out":
        mlp = {"down_proj": {"kernel": jnp.ones((48, 32))}}
        small = of_layers(small, lambda layer: {**layer, "mlp": {**layer["mlp"], **mlp}})
    assert all(w.pattern.prunes for w in weights_of(serving(small)))


def of_layers(params, change):
    layers = {name: change(layer) for name, layer in params["model"]["layers"].items()}
    return {**params, "model": {**params["model"], "layers": layers}}


def test_a_small_model_has_few_inputs(device, small):
    """5,120 of any layer, times the 16 rows that the kernel takes."""
    device("NVIDIA H100 80GB HBM3")
    for columns, dtype, pruned in (
        *((5120, "int8", False), (5121, "int8", True)),
        *((5120, "float8_e4m3fn", False), (64, "bfloat16", True)),
    ):
        kernel = sj.pack(jnp.ones((columns, 8)), "6:8", dtype=dtype)
        down = {"down_proj": {"kernel": kernel}}
        params = of_layers(small, lambda layer, d=down: {**layer, "mlp": {**layer["mlp"], **d}})
        served = serving(params)
        assert {w.pattern.prunes for w in weights_of(served)} == {pruned}

"""Estimates choose where nothing was measured, on GPUs whose rates are known."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slidejax as sj
from slidejax.ops import choice, rates, registry, tuning
from slidejax.ops import problem as problems
from slidejax.ops.implementations import cusparselt
from slidejax.ops.problem import Problem

A100, L4 = "NVIDIA A100-SXM4-80GB", "NVIDIA L4"
DEVICES = (A100, L4, "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 5080", "NVIDIA B200")
cpu_only = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="tests what a machine without a GPU does"
)
pytestmark = cpu_only


@pytest.fixture
def device(monkeypatch, tmp_path):
    """`device(name)`: programs are lowered for this kind of device, without measurements."""
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))

    def use(name):
        for module in (problems, choice):
            monkeypatch.setattr(module, "device_kind", lambda platform: name)

    return use


def weight(columns=3584, out=4608, pattern="6:8", dtype="int8"):
    kernel = jax.ShapeDtypeStruct((columns, out), jnp.bfloat16)
    return jax.eval_shape(lambda kernel: sj.pack(kernel, pattern, dtype=dtype), kernel)


def chosen(rows, w):
    x = jax.ShapeDtypeStruct((rows, w.in_features), jnp.bfloat16)
    [(_, found)] = sj.explain(sj.linear, x, w, platform="cuda")
    return found


def with_form(w, name):
    return w.replace(prepared={name: jax.ShapeDtypeStruct((4,), jnp.uint8)})


problem_of = st.builds(
    lambda device, rows, columns, out, pattern, dtype, form, op: Problem(
        op,
        "cuda",
        device,
        rows,
        columns,
        out,
        sj.Pattern.parse(pattern),
        np.dtype(jnp.bfloat16),
        np.dtype(getattr(jnp, dtype)),
        np.dtype(jnp.bfloat16),
        form,
    ),
    st.sampled_from(DEVICES),
    st.integers(1, 1 << 15),
    st.integers(64, 1 << 15),
    st.integers(64, 1 << 16),
    st.sampled_from(["2:4", "6:8", "14:16"]),
    st.sampled_from(["int8", "float8_e4m3fn", "bfloat16"]),
    st.sampled_from([(), ("cusparselt",), ("dense",), ("cusparselt", "dense")]),
    st.sampled_from(["linear", "sparse_matmul"]),
)


@given(problem_of, st.integers(1, 1 << 12))
def test_more_rows_never_take_less_time(problem, more):
    for implementation in registry.competing():
        larger = dataclasses.replace(problem, rows=problem.rows + more)
        if implementation.refuses(problem) or implementation.refuses(larger):
            continue
        few, many = implementation.estimate(problem), implementation.estimate(larger)
        assert 0 < few <= many < 1e3


@given(problem_of)
def test_a_weight_is_never_unpacked_while_a_kernel_reads_it_as_it_is(problem):
    unprepared = dataclasses.replace(
        problem, prepared=tuple(name for name in problem.prepared if name != "dense")
    )
    found = choice.choose(unprepared)
    running = {i.name for i in registry.competing()} - set(found.refused)
    assert found.implementation in running
    reading = {name for name in running if registry.get(name).reads_packed}
    # A weight that carries cuSPARSELt's form needs no unpacking either.
    if "cusparselt" in running and "cusparselt" in unprepared.prepared:
        reading.add("cusparselt")
    assert found.implementation != "dense" or not reading


@given(problem_of, st.integers(1, 1 << 12))
def test_more_rows_never_lead_back_to_the_decode_kernel(problem, more):
    few = choice.choose(problem)
    many = choice.choose(dataclasses.replace(problem, rows=problem.rows + more))
    assert many.implementation != "decode" or few.implementation == "decode"


@given(problem_of)
def test_a_prepared_form_never_makes_it_slower(problem):
    for implementation in registry.competing():
        if implementation.refuses(problem) or implementation.form is None:
            continue
        prepared = dataclasses.replace(problem, prepared=(implementation.form.name,))
        plain = dataclasses.replace(problem, prepared=())
        assert implementation.estimate(prepared) < implementation.estimate(plain)


@pytest.mark.parametrize("name", DEVICES)
def test_few_rows_decode_and_many_run_in_cusparselt(device, name):
    device(name)
    w = weight()
    for rows in (1, 8):
        assert chosen(rows, w).implementation == "decode"
    prepared = with_form(w, "cusparselt")
    for rows in (16, 256, 4096, 16384):
        found = chosen(rows, prepared)
        assert found.implementation == "cusparselt"
        assert found.reason.startswith(f"estimated for {name}: cusparselt ")
        assert "dense" in found.reason and "default algorithm" in found.note
    assert choice.forms(w) == ("cusparselt",)


def test_what_the_library_would_compress_for_long_is_unpacked(device, monkeypatch):
    """On a GPU on which the order of the library's form could not be learned."""
    device(A100)
    assert chosen(4096, weight()).implementation == "cusparselt"
    assert "its form is made in each call" in chosen(4096, weight()).note
    monkeypatch.setattr(cusparselt.library, "on_gpu", lambda: True)
    monkeypatch.setattr(cusparselt.cusparselt, "missing", lambda: None)
    monkeypatch.setattr(cusparselt.cusparselt, "nearest", lambda *_: None)
    monkeypatch.setattr(cusparselt.cusparselt, "layout", lambda *_: ())
    monkeypatch.setattr(cusparselt.library, "unusable", lambda: None)
    slow = chosen(4096, weight())
    assert slow.implementation == "dense" and "estimated" in slow.reason
    assert "unpacked in each call: sj.prepare" in slow.note
    assert chosen(256, with_form(weight(), "cusparselt")).implementation == "cusparselt"


def test_a_measurement_wins_over_an_estimate(device):
    device(A100)
    w = with_form(weight(), "cusparselt")
    assert chosen(256, w).implementation == "cusparselt"
    entry = {"in": 3584, "out": 4608, "pattern": "6:8", "dtype": "int8", "rows": 256}
    tuning.record(A100, [entry | {"us": {"cusparselt+prepared": 20.0, "dense": 10.0}}])
    found = chosen(256, w)
    assert found.implementation == "dense" and found.reason.startswith("measured at M=256")


def test_unknown_devices_keep_the_rule_without_estimates(device):
    device("A card of tomorrow")
    assert chosen(1, weight()).implementation == "decode"
    assert chosen(16, weight()).implementation == "dense"
    assert "no measurement" in chosen(16, weight()).reason
    assert choice.forms(weight()) == ("dense",)


def test_hopper_kernels_are_not_estimated(device):
    device("NVIDIA H20")
    assert chosen(256, weight()).implementation == "hopper"


# --- rates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        (A100, 2039),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA A100 80GB PCIe", 1935),
        (L4, 300),
        ("NVIDIA L40", 864),
        ("NVIDIA RTX 6000 Ada Generation", 960),
        ("NVIDIA H100 80GB HBM3", 3352),
        ("NVIDIA H100 PCIe", 2039),
        ("NVIDIA H200", 4800),
        ("NVIDIA GB200", 8000),
    ],
)
def test_published_rates_are_found_by_name(name, memory):
    assert rates.rates_of(name).memory == memory


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L400", "cpu", ""])
def test_other_names_have_no_published_rates(name):
    assert rates.rates_of(name) is None


def test_rates_of_an_unknown_gpu_come_from_the_runtime(monkeypatch):
    gpu = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA Mystery", compute_capability="8.9", core_count=20
    )
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    found = rates.rates_of("NVIDIA Mystery")
    assert found.memory == 100 and found.int8 > found.float8 > found.bfloat16 > 0
    assert rates.rates_of("NVIDIA Another") is None


@pytest.mark.parametrize("name", DEVICES)
def test_rates_by_capability_are_no_higher_than_published_ones(name):
    """The card's capability and multiprocessors, as its data sheet has them."""
    capability, multiprocessors = {
        A100: ("8.0", 108),
        L4: ("8.9", 58),
        "NVIDIA GeForce RTX 4090": ("8.9", 128),
        "NVIDIA GeForce RTX 5080": ("12.0", 84),
        "NVIDIA B200": ("10.0", 148),
    }[name]
    guessed = rates._of_capability(capability, multiprocessors)
    for guess, published in zip(guessed, rates.rates_of(name), strict=True):
        assert published / 3 <= guess <= 1.1 * published

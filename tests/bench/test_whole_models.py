"""`slidejax bench --model` on a machine without a GPU: what is measured and reported."""

import jax
import pytest

from slidejax.bench import model_layers, report, timing, whole_models
from slidejax.bench.shapes import MODELS, PRESETS

QUICK = timing.Clock(warmup=0.0001, seconds=0.0001, rounds=2)
TINY = MODELS["tiny"]


def measure(**options):
    sizes = {"batches": [1, 3], "prefills": [(2, 4)], "context": 8, "steps": 2, "layers": 1}
    return whole_models.measure("tiny", **{**sizes, "clock": QUICK, **options})


@pytest.fixture(scope="module")
def notes():
    return []


@pytest.fixture(scope="module")
def results(notes):
    return measure(note=notes.append)


def rows(results, workload):
    return {r["contender"]: r for r in results["times"] if r["workload"] == workload}


def test_every_contender_is_timed_in_every_workload_and_round(results, notes):
    names = {kind.name for kind in model_layers.kinds([], [])} | {
        "6:8 int8 raw",
        "6:8 int8 prepared",
    }
    for workload in ("decode 1", "decode 3", "prefill 2x4"):
        assert rows(results, workload).keys() == names
    for row in results["times"]:
        assert len(row["rounds"]) == 2 and min(row["rounds"]) <= row["us"] <= max(row["rounds"])
    assert results["not_run"] == []
    assert any("say nothing about a GPU" in text for text in notes)
    for row in results["times"]:  # said at once: a run that is cut off has not been in vain
        assert f"{row['workload']} {row['contender']}: {report.microseconds(row['us'])} us" in notes


def test_programs_are_compiled_at_once_after_short_ones_one_by_one(monkeypatch):
    built = []

    def build_all(builders, at_once):
        built.append(
            (at_once, {name: build.func.__self__.layers for name, build in builders.items()})
        )
        return timing.build_all(builders, at_once)

    two = model_layers.kinds([], [])[:2]  # to compile fewer programs
    monkeypatch.setattr(whole_models, "kinds", lambda patterns, dtypes: two)
    monkeypatch.setattr(whole_models, "build_all", build_all)
    found = measure(batches=[1], prefills=[], layers=3, at_once=4)
    assert [(at_once, {*layers.values()}) for at_once, layers in built] == [(1, {2}), (4, {3})]
    assert built[0][1].keys() == built[1][1].keys() == rows(found, "decode 1").keys()
    built.clear()
    measure(batches=[1], prefills=[], layers=1, at_once=4)  # as short as the first ones would be
    assert [at_once for at_once, _ in built] == [4]


def test_the_bytes_are_those_that_must_be_read(results):
    out_in = sum(out * inputs for out, inputs in TINY.linears.values())
    outs = sum(out for out, _ in TINY.linears.values())
    head, cache = 2 * TINY.vocabulary * TINY.hidden, 2 * 2 * 8 * TINY.kv_heads * TINY.head
    groups = sum(out * inputs // 8 for out, inputs in TINY.linears.values())
    # K of every layer but one is whole blocks of 64; down has 96 columns, which take 128.
    padded = TINY.linears["down"][0] * (128 - 96) // 8
    packed = {
        "jax bf16": 2 * out_in,
        "jax int8": out_in + 4 * outs,
        "dense int8": out_in + 4 * outs,
        "6:8 int8 raw": 7 * (groups + padded) + 4 * outs,
        "6:8 int8 prepared": 7 * (groups + padded) + 4 * outs,
        "no linear layers": 2 * outs,
    }
    for name, size in packed.items():
        assert results["contenders"][name]["packed"] == size
        assert rows(results, "decode 1")[name]["read_bytes"] == size + head + cache
        assert rows(results, "decode 3")[name]["read_bytes"] == size + head + 3 * cache
        assert rows(results, "prefill 2x4")[name]["read_bytes"] == size
    for name, size in results["contenders"].items():
        assert (size["in_memory"] > size["packed"]) == ("prepared" in name)


def test_rates_shares_and_ratios_follow_from_the_times(results):
    copy = results["copy"]
    assert copy["gb_per_s"] == pytest.approx(2e-3 * copy["bytes"] / copy["us"])
    for workload, tokens in (("decode 1", 1), ("decode 3", 3), ("prefill 2x4", 8)):
        found = rows(results, workload)
        best = min(found[name]["us"] for name in ("jax int8", "jax fp8", "jax int8 weights"))
        for name, row in found.items():
            assert row["tokens_per_s"] == pytest.approx(1e6 * tokens / row["us"])
            assert row["gb_per_s"] == pytest.approx(row["read_bytes"] / row["us"] / 1e3)
            assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / copy["gb_per_s"])
            if name == "no linear layers":
                assert set(row["over"].values()) == {None}
            else:
                assert row["over"] == {
                    "jax bf16": pytest.approx(found["jax bf16"]["us"] / row["us"]),
                    "best JAX 8 bit": pytest.approx(best / row["us"]),
                    "dense int8": pytest.approx(found["dense int8"]["us"] / row["us"]),
                }
            ours = "6:8" in name or name == "dense int8"
            assert row["implementations"] == (["dense"] if ours else [])


def test_the_table_shows_every_figure(results):
    text = whole_models.table(results)
    lines = text.splitlines()
    assert lines[0] == report.machine_line(results)
    for word in (
        "jax " + jax.__version__,
        results["date"],
        "1 layer(s)",
        "say nothing about a GPU",
    ):
        assert word in text
    for row in results["times"]:
        start = next(i for i, line in enumerate(lines) if line.startswith(row["workload"] + ":"))
        [line] = [
            line
            for line in lines[start + 2 : start + 12]
            if line.strip().startswith(row["contender"] + "  ")
        ]
        assert report.microseconds(row["us"]) in line
        assert f"{row['share_of_copy']:.1%}" in line
        for value in row["over"].values():
            assert report.times_as(value) in line
    assert "did not run" not in text


def test_what_does_not_run_is_said_and_the_rest_goes_on(monkeypatch):
    bf16, *_ = model_layers.kinds([], [])

    def too_large(w):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")

    def one_row_only(x, w):
        if x.shape[0] * x.shape[1] > 1:
            raise NotImplementedError("it takes one row")
        return bf16.multiply(x, w)

    racing = [
        bf16,
        model_layers.Kind("too large", too_large, bf16.multiply),
        model_layers.Kind("one row", bf16.make, one_row_only),
    ]
    monkeypatch.setattr(whole_models, "kinds", lambda patterns, dtypes: racing)
    said = []
    found = measure(prefills=[], note=said.append)
    assert rows(found, "decode 1").keys() == {"jax bf16", "one row"}
    assert rows(found, "decode 3").keys() == {"jax bf16"}
    assert found["not_run"] == [
        {"contender": "too large", "workload": None, "why": "RESOURCE_EXHAUSTED: no memory"},
        {"contender": "one row", "workload": "decode 3", "why": "it takes one row"},
    ]
    assert rows(found, "decode 1")["one row"]["over"]["dense int8"] is None
    text = whole_models.table(found)
    assert "did not run: too large: RESOURCE_EXHAUSTED: no memory" in text
    assert "did not run: one row, decode 3: it takes one row" in text
    assert "one row did not run: it takes one row" in said


@pytest.mark.parametrize(("options", "said"), [
    ({"layers": 0}, "layers must be a whole number of 1 or more, got 0"),
    ({"batches": [1, -2]}, "batches must be a whole number of 1 or more, got -2"),
    ({"prefills": [(8, 0)]}, "prefills must be a whole number of 1 or more, got 0"),
    ({"batches": [], "prefills": []}, "nothing to time"),
    ({"at_once": 0}, "at_once must be a whole number of 1 or more, got 0"),
    ({"steps": 9}, "steps must be at most context, 8, got 9"),
    ({"patterns": ["5:8"]}, "5:8"),
    ({"dtypes": ["int4"]}, "int4"),
])  # fmt: skip
def test_bad_values_are_refused_before_any_work(monkeypatch, options, said):
    monkeypatch.setattr(whole_models, "time_all", lambda *args: pytest.fail("it was measured"))
    with pytest.raises(ValueError, match=said):
        measure(**options)
    with pytest.raises(ValueError, match=r"model must be one of llama-3-8b.*got 'gpt'"):
        whole_models.measure("gpt")


def test_models_have_the_layers_of_the_presets():
    for model, preset in (("llama-3-8b",) * 2, ("qwen2.5-7b",) * 2, ("smollm2-135m", "smollm2")):
        assert tuple(MODELS[model].linears.values()) == PRESETS[preset]
    assert MODELS["qwen2.5-0.5b"].linears == {
        "qkv": (1152, 896),
        "o": (896, 896),
        "gate_up": (9728, 896),
        "down": (896, 4864),
    }
    for sizes in MODELS.values():
        assert sizes.heads % sizes.kv_heads == 0 and sizes.head % 2 == 0


def test_a_gpu_gets_more_rounds_unless_told_otherwise(monkeypatch):
    assert whole_models.usual_clock(seconds=2.0) == timing.Clock(0.02, 2.0, 3)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert whole_models.usual_clock() == timing.Clock(0.1, 0.2, 5)
    assert whole_models.usual_clock(1.0, None, 2) == timing.Clock(1.0, 0.2, 2)


def test_room_for_the_caches_is_taken_while_weights_are_made_on_a_gpu(monkeypatch):
    size = 123_457

    def rooms():
        return sum(array.nbytes == size for array in jax.live_arrays())

    assert whole_models._with_room(size, rooms) == 0  # a CPU swaps, or has none to give
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert whole_models._with_room(size, rooms) == 1
    assert rooms() == 0

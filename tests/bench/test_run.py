"""`slidejax bench` on a machine without a GPU: what is measured and reported."""

import pytest

from slidejax.bench import contenders, report, run, timing

QUICK = timing.Clock(warmup=0.001, seconds=0.005)


@pytest.fixture(scope="module")
def results():
    return run.measure([(64, 96), (32, 96)], rows=[4], dtypes=["int8"], clock=QUICK)


def test_the_best_dense_product_is_taken_layer_by_layer(results):
    unscaled = ("dense int8 unscaled", "dense fp8 unscaled")
    for row in results["linear"]:
        assert row["us"]["best dense 8 bit"] == min(row["us"][name] for name in unscaled)
    [total] = results["sums"]
    assert total["us"]["best dense 8 bit"] == pytest.approx(
        sum(row["us"]["best dense 8 bit"] for row in results["linear"])
    )
    assert total["us"]["best dense 8 bit"] <= min(total["us"][name] for name in unscaled) + 1e-9
    [ours] = [name for name in total["us"] if name not in contenders.BASELINES]
    assert total["ratios"][ours]["best dense 8 bit"] == pytest.approx(
        total["us"]["best dense 8 bit"] / total["us"][ours]
    )
    assert contenders.best_dense({"dense int8 unscaled": None, "dense fp8 unscaled": 2.0}) == 2.0
    assert contenders.best_dense({}) is None


def test_lifting_is_compared_with_quantising_alone(results):
    [row] = results["lift"]
    assert row["over_quantise"] == pytest.approx(row["us"] / row["quantise_us"])
    assert row["quantise_gb_per_s"] == pytest.approx(
        (3 * 4 * 96 + 4 * 4) / row["quantise_us"] / 1e3
    )


def test_layers_are_also_timed_behind_a_norm(results):
    for alone, behind in zip(results["linear"], results["normed"], strict=True):
        assert {*behind["us"]} == {"jax int8", "jax fp8", "slidejax"}
        ours = {name: us for name, us in alone["us"].items() if name not in contenders.BASELINES}
        assert behind["variant"] == min(ours, key=ours.__getitem__)
        assert (behind["out"], behind["in"]) == (alone["out"], alone["in"])
    [total] = results["normed_sums"]
    assert total["us"]["slidejax"] == pytest.approx(
        sum(row["us"]["slidejax"] for row in results["normed"])
    )
    assert total["ratios"]["slidejax"]["jax int8"] == pytest.approx(
        total["us"]["jax int8"] / total["us"]["slidejax"]
    )


def test_int8_weights_alone_race_up_to_64_rows():
    found = run.measure([(32, 64)], rows=[64, 65], dtypes=["int8"], clock=QUICK)
    few, many = (row["us"][contenders.WEIGHTS_ALONE] for row in found["linear"])
    assert few > 0 and many is None
    assert found["sums"][1]["us"][contenders.WEIGHTS_ALONE] is None
    assert contenders.WEIGHTS_ALONE in run.table(found)


def test_the_table_shows_every_column(results):
    text = run.table(results)
    words = ("over quantise", "64x96, 32x96", "not timed: int8 hopper", "behind an RMS norm")
    for word in (*contenders.BASELINES, *words):
        assert word in text
    assert text.splitlines()[0] == report.machine_line(results) and results["date"] in text
    assert "settings of" not in text  # no implementation with settings runs here
    row = dict(
        results["linear"][0],
        settings={"cusparselt": "3, the fastest of a search at M=4 (1.0 us for the product alone)"},
    )
    assert "6:8 int8 M=4 64x96: 3, the fastest" in run.table({**results, "linear": [row]})

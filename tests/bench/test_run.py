"""`slidejax bench` on a machine without a GPU: what is measured and reported."""

import pytest

from slidejax.bench import contenders, run, timing

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


def test_the_table_shows_every_column(results):
    text = run.table(results)
    for word in (*contenders.BASELINES, "over quantise", "64x96, 32x96", "not timed: int8 hopper"):
        assert word in text
    assert "settings of" not in text  # no implementation with settings runs here
    row = dict(
        results["linear"][0],
        settings={"cusparselt": "3, the fastest of a search at M=4 (1.0 us for the product alone)"},
    )
    assert "6:8 int8 M=4 64x96: 3, the fastest" in run.table({**results, "linear": [row]})

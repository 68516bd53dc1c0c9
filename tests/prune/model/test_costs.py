"""The cost of a layer with a pattern."""

import pytest

import slidejax as sj
from slidejax.prune.model.costs import Times, measured_times


def test_time_as_a_cost(monkeypatch, tmp_path):
    """The nearest entry of the pattern counts, in proportion.

    Dense products count with whatever pattern they were measured.
    """
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    measured = {
        ("6:8", 16): {"hopper+prepared": 10.0, "dense+prepared": 12.0},
        ("14:16", 16): {"hopper+prepared": 15.0, "dense": 13.0},
        ("6:8", 4096): {"hopper": 99.0},
    }
    sj.tune.record(
        "A GPU",
        [
            {"in": 64, "out": 32, "pattern": p, "dtype": "int8", "rows": rows, "us": us}
            for (p, rows), us in measured.items()
        ],
    )
    time = measured_times(16, device="A GPU")
    assert [time((64, 32), sj.Pattern.parse(p)) for p in ("6:8", "14:16", "dense")] == [
        10.0,
        13.0,
        12.0,
    ]
    assert (
        time((64, 64), sj.Pattern(6, 8)) == 20.0
        and measured_times(32, device="A GPU")((64, 32), sj.Pattern(6, 8)) == 20.0
    )
    for what, far in ((sj.Pattern(2, 4), (64, 32)), (sj.Pattern(6, 8), (64, 1 << 20))):
        with pytest.raises(ValueError, match="nothing was measured near 16 rows"):
            time(far, what)
    with pytest.raises(ValueError, match="float8_e4m3fn on A GPU"):
        measured_times(16, "float8_e4m3fn", "A GPU")((64, 32), sj.Pattern(6, 8))


PATTERNS = [sj.Pattern.parse(p) for p in ("dense", "6:8", "2:4")]


def test_times_of_a_shape_come_from_one_source(monkeypatch, tmp_path):
    """Near measurements, else those of other shapes with as many rows, else estimates."""
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    device = "NVIDIA A100-SXM4-80GB"

    def of(rows, shape):
        times = Times(rows, PATTERNS, device=device)
        return [times(shape, p) for p in PATTERNS], times.sources

    estimated, sources = of(4096, (1024, 4096))
    assert sources == {"estimated"} and estimated == sorted(estimated, reverse=True)
    entry = {"in": 1024, "out": 4096, "dtype": "int8", "rows": 4096}
    rows = [("6:8", {"hopper+prepared": 9.0, "dense+prepared": 10.0})]
    sj.tune.record(device, [entry | {"pattern": p, "us": us} for p, us in rows])
    # 2:4 was not measured, and its estimate does not compare with measurements
    assert of(4096, (1024, 4096)) == (estimated, {"estimated"})
    rows = [("2:4", {"hopper+prepared": 6.0})]
    sj.tune.record(device, [entry | {"pattern": p, "us": us} for p, us in rows])
    assert of(4096, (1024, 4096)) == ([10.0, 9.0, 6.0], {"measured"})
    assert of(8192, (64, 256)) == (
        pytest.approx([10 / 128, 9 / 128, 6 / 128]),
        {"measured at other shapes"},
    )
    assert of(1, (1024, 4096))[1] == {"estimated"}


def test_times_of_an_unknown_device():
    with pytest.raises(ValueError, match="no time is known of int8 products on 'A toaster'"):
        Times(16, PATTERNS, device="A toaster")((64, 64), PATTERNS[0])

"""The cost of a layer with a pattern."""

import pytest

import slidejax as sj
from slidejax.prune.model.costs import measured_times


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

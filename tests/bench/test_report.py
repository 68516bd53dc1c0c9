"""The output that the races share."""

import datetime
import os

import jax

from slidejax.bench import report
from slidejax.bench.timing import Clock


def test_the_machine_line_names_what_a_table_needs(monkeypatch):
    monkeypatch.setitem(os.environ, "XLA_FLAGS", "--a_flag=1")
    found = report.machine(Clock(0.1, 0.2, 3))
    assert found["xla_flags"] == "--a_flag=1"
    line = report.machine_line(found)
    for word in (
        jax.devices()[0].device_kind,
        f"jax {jax.__version__}",
        datetime.date.today().isoformat(),
        "0.2 s after 0.1 s, 3 round(s)",
    ):
        assert word in line


def test_missing_figures_are_dashes():
    assert report.ratio(None, 2.0) is None and report.ratio(2.0, None) is None
    assert report.ratio(3.0, 2.0) == 1.5
    assert report.times_as(1.005) == "1.00" and report.times_as(None) == "-"
    assert report.grid(["a"], []) == ["a"]

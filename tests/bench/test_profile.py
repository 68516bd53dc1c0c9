"""Profiles of compiled programs: the counted kernels, and the table."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidejax.bench import profile
from slidejax.bench.profile import Event


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.sampled_from("abc")), min_size=1)
)
def test_kernels_and_gaps_add_up(parts):
    """Kernels one after the other: each begins a while after the one before has ended."""
    now, found = 0, []
    for gap, length, name in parts:
        start = now + (gap if found else 0)
        now = start + length
        found.append(Event(name, 1000.0 * start, 1000.0 * now))
    both = profile.summary(found, 2)
    assert both["launches"] == len(parts) / 2
    assert both["us"] == pytest.approx(now / 2)
    assert both["busy_us"] == pytest.approx(sum(length for _, length, _ in parts) / 2)
    assert both["gaps_us"] == pytest.approx(sum(gap for gap, _, _ in parts[1:]) / 2)
    in_all = [kernel["us_in_all"] for kernel in both["kernels"]]
    assert in_all == sorted(in_all, reverse=True) and sum(in_all) == pytest.approx(both["busy_us"])


def test_kernels_at_the_same_time_are_busy_once():
    found = [Event("a", 0, 4000), Event("b", 1000, 2000), Event("c", 3000, 6000)]
    both = profile.summary(found, 1)
    assert (both["us"], both["busy_us"], both["gaps_us"]) == (6.0, 6.0, 0.0)


def test_the_table_shows_the_longest_kernels_and_the_rest_in_one_line():
    found = [Event(f"kernel {i}", 10000.0 * i, 10000.0 * i + 1000 * (9 - i)) for i in range(9)]
    lines = profile.table(profile.summary(found, 1), most=4)
    assert "9.0 launches" in lines[0] and len(lines) == 2 + 4 + 1
    assert "kernel 0" in lines[2] and "9.00" in lines[2]
    assert "5 more" in lines[-1] and "15.0" in lines[-1]


@dataclasses.dataclass
class Program:
    applications: int = 3
    calls: int = 0

    def room(self) -> Any:
        return jnp.zeros(3)

    def __call__(self, room: Any) -> Any:
        self.calls += 1
        return room + 1


def test_a_program_is_run_once_before_it_is_profiled():
    program = Program()
    found = profile.profile(program)
    assert program.calls == 2
    if found is not None:  # a GPU
        assert found["launches"] >= 1 / 3


@pytest.mark.gpu
def test_a_gpu_says_what_it_ran():
    found = profile.profile(Program())
    assert found is not None and found["us"] > 0 and found["kernels"]

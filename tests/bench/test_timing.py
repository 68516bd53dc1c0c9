import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slidejax.bench import timing


@pytest.mark.parametrize("inputs", [1, 4])
@pytest.mark.parametrize("loops", [1, pytest.param(3, marks=pytest.mark.gpu)])
def test_every_application_that_is_counted_runs(inputs, loops):
    """XLA drops results that nobody reads, and computes equal products only once."""
    ran = []

    def apply(x, weights):
        def count(product):
            ran.append(1)
            return product

        product = x @ weights
        return jax.pure_callback(count, product, product)

    xs = [jnp.full((2, 3), float(i)) for i in range(inputs)]
    program = timing._program(timing.Contender("counted", apply, jnp.ones((3, 5))), xs, loops)
    copies = 16 if jax.default_backend() == "gpu" else 1  # copies of small weights
    results = program.room()
    for _ in range(2):  # the second call writes into the results of the first
        ran.clear()
        results = jax.block_until_ready(program(results))
        assert len(ran) == program.applications == loops * max(2, inputs, copies)
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result, xs[i % inputs] @ jnp.ones((3, 5)))


class Program:
    """A program that does nothing; `journal` lists its calls."""

    applications = 1

    def __init__(self, name, journal, fails_at=None):
        self.name, self.journal, self.fails_at = name, journal, fails_at

    def room(self):
        return 0

    def __call__(self, room):
        self.journal.append(self.name)
        if self.journal.count(self.name) == self.fails_at:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
        return room + 1


def test_programs_are_timed_in_turns():
    journal = []
    programs = {name: Program(name, journal) for name in "abc"}
    found, reasons = timing.in_turns(programs, timing.Clock(1e-9, 1e-9, rounds=3))
    turns = [name for i, name in enumerate(journal) if i == 0 or journal[i - 1] != name]
    assert turns == list("abc" * 3) and reasons == {}
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys("abc", 3)
    assert all(us > 0 for times in found.values() for us in times)


def test_a_program_that_fails_leaves_the_others_in_the_race():
    journal = []
    late, early = Program("late", journal, fails_at=7), Program("early", journal, fails_at=1)
    good = Program("good", journal)
    programs, reasons = timing.build_all(
        {"late": lambda: late, "early": lambda: early, "good": lambda: good}
    )
    assert programs == {"late": late, "good": good}
    assert reasons == {"early": "RESOURCE_EXHAUSTED: out of memory"}
    found, reasons = timing.in_turns(programs, timing.Clock(1e-9, 1e-9, rounds=3))
    assert {name: len(times) for name, times in found.items()} == {"good": 3}
    assert reasons == {"late": "RESOURCE_EXHAUSTED: out of memory"}


def test_a_contender_that_cannot_run_is_named_and_has_no_time():
    def refuse(x, weights):
        raise NotImplementedError("it needs a GPU")

    said = []
    us = timing.time_all(
        [timing.Contender("good", lambda x, _: -x), timing.Contender("bad", refuse)],
        [jnp.ones(3)],
        timing.Clock(1e-9, 1e-9),
        said.append,
    )
    assert us["good"] > 0 and us["bad"] is None
    assert said == ["bad does not run: it needs a GPU"]


def test_the_time_of_a_contender_is_that_of_its_fastest_settings(monkeypatch):
    flag, told = "xla_cpu_enable_fast_math", []
    compiled = timing._program

    def program(contender, xs, loops, settings):
        told.append((contender.name, settings))
        return compiled(contender, xs, loops, settings)

    def in_turns(programs, clock):
        times = {"a": [5.0], f"b {flag}=True": [4.0], f"b {flag}=False": [3.0, 1.0, 2.0]}
        return {name: times[name] for name in programs}, {}

    monkeypatch.setattr(timing, "_program", program)
    monkeypatch.setattr(timing, "in_turns", in_turns)
    both = {flag: True}, {flag: False}
    racing = [
        timing.Contender("a", lambda x, _: -x),
        timing.Contender("b", lambda x, _: x + 1, None, both),
    ]
    assert timing.time_all(racing, [jnp.ones(3)], timing.Clock()) == {"a": 5.0, "b": 2.0}
    assert sorted(told, key=str) == sorted([("a", {}), ("b", both[0]), ("b", both[1])], key=str)


def test_programs_are_compiled_one_after_the_other_where_asked():
    running, most = [], []

    def build(name):
        running.append(name)
        time.sleep(0.01)
        most.append(len(running))
        running.remove(name)
        return Program(name, [])

    builders = {name: functools.partial(build, name) for name in "abcd"}
    programs, reasons = timing.build_all(builders, at_once=1)
    assert list(programs) == list("abcd") and reasons == {} and most == [1, 1, 1, 1]

"""Cases of a test of which a plain run takes some, and --every-case all."""

import itertools

import hypothesis
import pytest

every_case = False  # conftest.py sets it


def examples(plain):
    """Settings of a property whose examples compile programs of their own.

    Args:
      plain: how many examples a plain run has; with --every-case they are as many as of others.
    """
    return hypothesis.settings() if every_case else hypothesis.settings(max_examples=plain)


def some(plain, *choices):
    """Cases for `pytest.mark.parametrize`.

    Args:
      plain: those of a plain run: tuples, one value for each of `choices`. Everything in `choices`
        should be in one of them.
      choices: the values of each argument. Their other combinations are marked `every_case`.
    """
    cases = list(itertools.product(*choices))
    missing = [case for case in plain if case not in cases]
    for i, values in enumerate(choices):
        missing += [v for v in values if v not in [case[i] for case in plain]]
    assert not missing, f"not among the cases, or in none of a plain run: {missing}"
    return [
        pytest.param(*case, marks=() if case in plain else pytest.mark.every_case) for case in cases
    ]


def each(*choices):
    """Cases of which a plain run takes as few as have each value once."""
    longest = max(map(len, choices))
    return some([tuple(c[i % len(c)] for c in choices) for i in range(longest)], *choices)


def pairs(*choices):
    """Cases of which a plain run takes as many as have any two values of two arguments together."""
    cases = list(itertools.product(*choices))

    def of(case):
        return set(itertools.combinations([(i, repr(value)) for i, value in enumerate(case)], 2))

    left, plain = set().union(*map(of, cases)), []
    while left:
        plain.append(max(cases, key=lambda case: len(of(case) & left)))
        left -= of(plain[-1])
    return some(plain, *choices)

"""Cases of a test of which a plain run takes some, and --every-case all."""

import itertools

import pytest


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

"""Every number that a command takes, found in its parser: bad ones are refused by name."""

import argparse

import pytest
from command_line import usage_error
from hypothesis import given
from hypothesis import strategies as st

from slidejax.bounds import Bound
from slidejax.commands import arguments
from slidejax.commands.main import COMMANDS

# How a flag may want its numbers. A flag is tested with each of these that it takes with a 1.
FORMS = ("{}", "1,{}", "{},1", "1x{}", "{}x1", "prefill={}", "decode={}")
# No flag takes any of these.
BAD = ("-1", "-0.5", "-1e5", "nan", "-nan", "inf", "-inf", "1e999", "x", "0x1", "1/2", "9" * 5000)
BAD_WHOLE = ("1.5", "1e3", str(10**20))  # 2**32 - 1 is the largest of all
BAD_FLOAT = ("1e39",)  # more than a float32 holds


def parser_of(command):
    parser = argparse.ArgumentParser()
    COMMANDS[command].add_arguments(parser)
    return parser


def is_number(value):
    if isinstance(value, (list, tuple)):
        return any(map(is_number, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def takes(action, text):
    """Whether a flag takes a text, and makes numbers of it."""
    if action.type is None:
        return False
    try:
        return is_number(action.type(text))
    except argparse.ArgumentTypeError:
        return False


def numeric_flags():
    for command in COMMANDS:
        for action in parser_of(command)._actions:
            forms = [form for form in FORMS if takes(action, form.format(1))]
            if forms:
                yield pytest.param(command, action, forms, id=f"{command} {flag_of(action)}")


def flag_of(action):
    return action.option_strings[0]


def required(command):
    """Words for the arguments that a command cannot do without."""
    positional = [a for a in parser_of(command)._actions if not a.option_strings]
    return ["word" for action in positional if action.nargs not in ("?", "*")]


def check_refused(capsys, command, action, form, number):
    value = form.format(number)
    said = usage_error(capsys, command, *required(command), flag_of(action), value)
    name, _, why = said.partition(f"slidejax {command}: error: argument ")[2].partition(": ")
    assert flag_of(action) in name.split("/"), said
    assert "must be" in why and "got '" in why, said
    got = why.partition("got '")[2]
    assert (number if len(number) < 60 else number[:50]) in got and len(said) < 300, said


def test_numbers_are_found_in_the_parsers():
    found = {param.id for param in numeric_flags()}
    assert found >= {
        "generate --top-p",
        "recover --minutes",
        "bench --rows",
        "bench --shape",
        "bench --prefill",
        "bench --rounds",
        "convert --budget",
        "eval --samples",
        "tune --seconds",
        "demo --tokens",
    }
    assert not any(
        param.id.endswith(("--pattern", "--text", "--dtype")) for param in numeric_flags()
    )


@pytest.mark.parametrize(("command", "action", "forms"), list(numeric_flags()))
def test_bad_numbers_are_refused_by_name_before_anything_is_read(capsys, command, action, forms):
    for form in forms:
        for number in BAD:
            check_refused(capsys, command, action, form, number)
    for number in ("", " "):
        check_refused(capsys, command, action, "{}", number)
    whole = not takes(action, forms[0].format(0.5))
    for number in BAD_WHOLE if whole else BAD_FLOAT:
        check_refused(capsys, command, action, forms[0], number)


@pytest.mark.parametrize(("command", "action", "forms"), list(numeric_flags()))
def test_numbers_at_the_ends_of_a_range_are_taken(command, action, forms):
    """A flag that takes a single number says its range; others are made of such checks."""
    if isinstance(action.type, arguments.Number):
        bound = action.type.bound
        for value in (bound.least, bound.end):
            outside = bound.above and value == bound.least
            assert outside or action.type(str(value)) == value
    else:
        assert not takes(action, "0")  # of lists and pairs: counts alone


BOUNDS = st.builds(
    Bound,
    least=st.integers(0, 5),
    most=st.none() | st.integers(6, 2**32),
    whole=st.booleans(),
    above=st.booleans(),
)


@given(BOUNDS, st.integers(-9, 2**33) | st.floats(-9, 1e39))
def test_a_flag_takes_what_its_bound_says(bound, value):
    check, text = arguments.Number(bound), repr(value)
    fits = value in bound and (isinstance(value, int) or not bound.whole)
    if fits:
        assert check(text) == value
        return
    with pytest.raises(argparse.ArgumentTypeError) as error:
        check(text)
    assert str(bound) in str(error.value) and str(error.value).endswith(f"got '{text}'")


@given(BOUNDS)
def test_the_ends_of_a_bound(bound):
    assert (bound.least in bound) == (not bound.above) and bound.end in bound
    assert bound.end * 1.5 not in bound and bound.least - 1 not in bound
    assert float("nan") not in bound and float("inf") not in bound and -float("inf") not in bound

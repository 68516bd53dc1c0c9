"""Directories that appear complete or not at all."""

import os

import pytest

import slidejax as sj
import slidejax.checkpoint


def test_replacing_without_an_atomic_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr("slidejax.checkpoint.staging._exchange", lambda a, b: False)
    sj.checkpoint.save(tmp_path / "out", 1)
    sj.checkpoint.save(tmp_path / "out", 2)
    assert sj.checkpoint.load(tmp_path / "out") == 2 and os.listdir(tmp_path) == ["out"]


def test_other_peoples_directories_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="other things in it"):
        sj.checkpoint.save(tmp_path / "mine", {})
    with pytest.raises(ValueError, match="is a file"):
        sj.checkpoint.save(tmp_path / "mine" / "thesis.txt", {})
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"

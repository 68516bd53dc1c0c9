"""Directories that appear complete or not at all."""

import os

import pytest

import slidejax as sj
import slidejax.checkpoint
from slidejax.checkpoint.staging import check_target, staged


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


def test_a_block_that_fails_changes_nothing(tmp_path):
    with staged(tmp_path / "out", "marker") as folder:
        (folder / "marker").write_text("first")

    def fail_half_way():
        with staged(tmp_path / "out", "marker") as folder:
            (folder / "marker").write_text("second")
            assert (tmp_path / "out" / "marker").read_text() == "first"
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert (tmp_path / "out" / "marker").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("atomic", [True, False])
def test_an_earlier_directory_goes_as_a_whole(tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr("slidejax.checkpoint.staging._exchange", lambda a, b: False)
    for files in (["marker", "old"], ["marker", "new"]):
        with staged(tmp_path / "deep" / "out", "marker") as folder:
            for file in files:
                (folder / file).write_text(file)
    assert sorted(os.listdir(tmp_path / "deep" / "out")) == ["marker", "new"]
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_the_directory_is_as_readable_as_any_other(tmp_path):
    with staged(tmp_path / "out", "marker"):
        pass
    (tmp_path / "other").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_where_a_directory_may_be_written(tmp_path):
    assert check_target(tmp_path / "new", "marker") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert check_target(tmp_path / "empty", "marker") == tmp_path / "empty"
    with pytest.raises(ValueError, match="no marker"):
        check_target(tmp_path, "marker")
    (tmp_path / "marker").touch()
    assert check_target(tmp_path, "marker") == tmp_path

"""Files that a half-written one never replaces."""

import json
import os

import pytest

from slidejax.files import replacing, write_json


def test_missing_folders_are_made(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": [1, None]})
    text = (tmp_path / "a" / "b.json").read_text()
    assert json.loads(text) == {"x": [1, None]} and text.endswith("\n")
    assert os.listdir(tmp_path / "a") == ["b.json"]


def test_an_earlier_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"first")

    def fail_half_way():
        with replacing(path) as file:
            file.write(b"sec")
            file.flush()
            assert path.read_bytes() == b"first"
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]
    with replacing(path) as file:
        file.write(b"second")
    assert path.read_bytes() == b"second" and os.listdir(tmp_path) == ["file"]


def test_a_value_that_is_no_json_leaves_the_file_alone(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == 1 and os.listdir(tmp_path) == ["file.json"]

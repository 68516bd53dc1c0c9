"""The checks of values, and flags that several commands share."""

import argparse

import pytest
from command_line import usage_error
from hypothesis import given
from hypothesis import strategies as st

from slidejax.commands import arguments


def refusal(check, text):
    """The message for a value that `check` refuses."""
    with pytest.raises(argparse.ArgumentTypeError) as error:
        check(text)
    return str(error.value)


@given(st.lists(st.text("abc", min_size=1), min_size=1), st.sampled_from([",", " , ", ",,"]))
def test_names_stand_between_commas(parts, comma):
    assert arguments.names(comma.join(parts)) == parts


def test_lists_check_each_value():
    check = arguments.list_of(arguments.pattern)
    assert check("6:8,4:4, dense") == ["6:8", "dense", "dense"]
    assert "pattern must be" in refusal(check, "6:8,5:8")
    assert "must be names" in refusal(check, ",")


def test_dtypes():
    assert arguments.dtype(none=True)("None") is None
    assert arguments.dtype(none=False)("int8") == "int8"
    assert "none keeps the model's" in refusal(arguments.dtype(none=True), "int3")
    assert "none keeps" not in refusal(arguments.dtype(none=False), "none")
    eight_bit = arguments.dtype(none=False, floats=False)
    assert "must be int8 or float8_e4m3fn" in refusal(eight_bit, "bfloat16")
    assert eight_bit("int8") == "int8"
    assert arguments.float_dtype("float16") == "float16"
    assert "must be bfloat16" in refusal(arguments.float_dtype, "int8")


def test_regular_expressions():
    assert arguments.regex(r".*_proj") == r".*_proj"
    assert "must be a regular expression, got '('" in refusal(arguments.regex, "(")


def test_text_files(tmp_path):
    (tmp_path / "good").write_text("Grüße", encoding="utf-8")
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    assert arguments.text_file(str(tmp_path / "good")) == str(tmp_path / "good")
    assert "UTF-8" in refusal(arguments.text_file, str(tmp_path / "bad"))
    for path in (tmp_path, tmp_path / "nowhere"):
        assert str(path) in refusal(arguments.text_file, str(path))


def test_an_old_spelling_works_and_is_hidden():
    parser = argparse.ArgumentParser()
    arguments.add_renamed(parser, "--new", "--old", type=int, default=3, help="a number")
    assert [parser.parse_args(a).new for a in ([], ["--old", "4"], ["--new", "5"])] == [3, 4, 5]
    assert "--new" in parser.format_help() and "--old" not in parser.format_help()


def test_a_plot_is_looked_at_before_any_work(capsys, tmp_path, monkeypatch):
    for name, message in (
        ("losses.png", None),
        ("losses.doc", "must end in one of .eps,"),
        ("losses", "must end in one of"),
        ("file/losses.png", "not a folder that one may write"),
    ):
        (tmp_path / "file").touch()
        if message is None:
            assert arguments.plot_file(str(tmp_path / name)) == str(tmp_path / name)
            continue
        assert message in usage_error(capsys, "eval", "smollm2", "--plot", tmp_path / name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = usage_error(capsys, "eval", "smollm2", "--plot", tmp_path / "losses.png")
    assert "argument --plot: needs matplotlib" in said

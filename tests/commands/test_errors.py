"""Errors of the commands: one line each, and before a model is read where that is possible."""

import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import error, usage_error

from slidejax.commands import main as cli


def test_errors_are_one_line(capsys, tmp_path, model, out, text):
    assert "not one of smollm2" in error(capsys, "eval", str(tmp_path / "nowhere"))
    assert "converted already" in error(
        capsys, "convert", out, str(tmp_path / "x"), "--pattern", "6:8"
    )
    assert "is a file" in error(capsys, "convert", model, text, "--pattern", "6:8")
    (tmp_path / "empty").write_text("")
    assert "at least two" in error(capsys, "eval", model, "--text", str(tmp_path / "empty"))
    assert "chat template" in error(capsys, "generate", model, "--chat")
    assert not (tmp_path / "x").exists()


def test_wrong_values_are_named_before_a_model_is_read(capsys, tmp_path):
    convert = ("convert", str(tmp_path / "nowhere"), str(tmp_path / "x"), "--pattern")
    for pattern in ("5:8", "6:9"):
        said = usage_error(capsys, *convert, pattern)
        assert "--pattern: pattern must be" in said and pattern in said
    for dtype in ("int3", "int4", "i4,i4", "6:8,2:4"):
        said = usage_error(capsys, *convert, "6:8", "--dtype", dtype)
        assert "--dtype: dtype must be" in said and dtype in said and "float8_e4m3fn" in said
    said = usage_error(capsys, *convert, "6:8", "--method", "guess")
    assert "--method: invalid choice: 'guess'" in said and "sparsegpt" in said
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for flag, value, expected in [
        ("--skip", "(", "must be a regular expression"),
        ("--mixed", "6:8,1:2", "--mixed: pattern must be"),
        ("--mixed", ",", "must be names"),
        ("--sequences", "0", "must be from 1 to"),
        ("--sequences", "many", "must be a whole number"),
        ("--compute", "int8", "must be bfloat16"),
        ("--calibration", str(tmp_path / "nothing"), "must be a text file"),
        ("--calibration", str(tmp_path), "must be a text file"),
        ("--calibration", str(tmp_path / "binary"), "UTF-8"),
    ]:
        said = usage_error(capsys, *convert, "6:8", flag, value)
        assert f"argument {flag}: " in said and expected in said
        assert value.split(",")[-1] in said
    assert "must be a text file" in usage_error(capsys, "eval", "m", "--text", "nothing")
    for flag, value, expected in [
        ("--temperature", "-1", "must be from 0 to 1e+38"),
        ("--temperature", "1e39", "must be from 0 to 1e+38"),
        ("--temperature", "nan", "must be from 0 to 1e+38"),
        ("--top-k", str(2**31), f"must be from 0 to {2**31 - 1}"),
        ("--top-p", "0", "must be above 0 and at most 1"),
        ("--top-p", "1.5", "must be above 0 and at most 1"),
        ("--seed", str(2**32), f"must be from 0 to {2**32 - 1}"),
        ("--prompt", "\udcff", "must be Unicode text"),
        ("--stop", "\udcff", "must be Unicode text"),
    ]:
        said = usage_error(capsys, "generate", "m", flag, value)
        assert f"argument {flag}: {expected}" in said
    assert "must be from 0 to 1" in usage_error(capsys, "recover", "m", "x", "--docstrings", "2")
    assert "must be N,K" in usage_error(capsys, "bench", "--shape", "64")
    assert "must be above 0" in usage_error(capsys, "bench", "--seconds", "0")
    assert not (tmp_path / "x").exists()


def test_files_that_cannot_be_written_are_named_before_the_work(capsys, tmp_path, monkeypatch):
    long, loop, kept = (tmp_path / name for name in ("x" * 300, "loop", "kept"))
    loop.symlink_to(loop)
    kept.touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(kept) and access(path, mode))
    for file, reason in (
        (long, "File name too long"),
        (loop, "Too many levels of symbolic links"),
        (kept, "Permission denied"),
    ):
        said = usage_error(capsys, "convert", "m", "x", "--json", str(file))
        assert "argument --json: must be a file that can be written" in said and reason in said


def test_flags_that_contradict_each_other(capsys, tmp_path):
    said = usage_error(capsys, "recover", "m", "x", "--minutes", "6", "--steps", "1")
    assert "--steps: not allowed with argument --minutes" in said
    for command in ("tune", "bench"):
        said = usage_error(capsys, command, "--shape", "8,8", "--preset", "smollm2")
        assert "--preset: not allowed with argument --shape" in said
    said = error(capsys, "tune", "nowhere", "--shape", "8,8")
    assert "--shape does not go with MODEL, 'nowhere'" in said


def test_files_to_read_are_named_with_their_flags(capsys, tmp_path, model):
    task = ("eval", model, "--task", "humaneval", "--run-generated-code", "--problems")
    for file in ("", str(tmp_path / "nothing"), str(tmp_path)):
        assert f"--problems must be a file, and there is none at {file!r}" in error(
            capsys, *task, file
        )
    (tmp_path / "empty").touch()
    text = ("--calibration", str(tmp_path / "empty"))
    said = error(capsys, "convert", model, str(tmp_path / "x"), *text)
    assert f"--calibration {tmp_path / 'empty'}: the text has 0 tokens" in said


@pytest.mark.parametrize("args", [[], ["fly"], ["convert", "a"], ["eval", "m", "--tokens", "0"]])
def test_bad_usage(capsys, args):
    with pytest.raises(SystemExit) as e:
        cli.main(args)
    assert e.value.code == 2 and "usage:" in capsys.readouterr().err

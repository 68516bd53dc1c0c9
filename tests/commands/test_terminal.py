"""Text files and JSON of the commands."""

import argparse
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from command_line import write_decoder
from hypothesis import given
from hypothesis import strategies as st

from slidejax.commands import terminal
from slidejax.lm import load

numbers = st.floats() | st.integers() | st.none() | st.text(max_size=3) | st.booleans()
values = st.recursive(
    numbers,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=2), v, max_size=3),
    max_leaves=8,
)


def finite(value):
    """The value with None for infinities and nan."""
    if isinstance(value, dict):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(values)
def test_any_value_is_written_as_json(tmp_path_factory, value):
    file = tmp_path_factory.mktemp("json") / "out.json"
    terminal.emit(argparse.Namespace(json=str(file)), value)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(file.read_text(), parse_constant=refuse) == finite(value)


def test_json_goes_where_the_flag_says(capsys, tmp_path):
    terminal.emit(argparse.Namespace(json=None), {"x": 1})
    assert capsys.readouterr().out == ""
    terminal.emit(argparse.Namespace(json="-"), {"x": (1, math.inf)})
    assert json.loads(capsys.readouterr().out) == {"x": [1, None]}
    terminal.emit(argparse.Namespace(json=str(tmp_path / "out.json")), 1)
    assert capsys.readouterr().out == "" and (tmp_path / "out.json").read_text() == "1\n"


def test_a_text_must_be_utf_8(tmp_path):
    (tmp_path / "good").write_text("Grüße", encoding="utf-8")
    assert terminal.read_text(str(tmp_path / "good")) == "Grüße"
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bad.*UTF-8"):
        terminal.read_text(str(tmp_path / "bad"))


def test_written_text_is_shown_as_it_is(capsys):
    pytest.importorskip("rich")
    out = terminal.console()
    terminal.show_written(out, "6:8 int8", "The [bold]moon[/bold]", " is [red]round\n")
    assert capsys.readouterr().out.split("\n")[1:3] == [
        "6:8 int8: The [bold]moon[/bold]",
        "is [red]round",
    ]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_characters_loses_no_result(tmp_path, encoding):
    """A model may write any character, and its text comes after all the work."""
    model = write_decoder(tmp_path)
    command = [sys.executable, "-m", "slidejax", "generate", model, "--max-new-tokens", "20"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [*command, "--prompt", "☃ and"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert r"\u2603 and" in done.stdout and "the first after" in done.stderr


@pytest.mark.parametrize("platforms", ["bogus", "cuda"])
def test_a_platform_that_is_not_there_is_one_line(platforms):
    if platforms == "cuda" and any(map(find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        pytest.skip("its plug-in is installed")
    environment = {**os.environ, "JAX_PLATFORMS": platforms}
    command = [sys.executable, "-m", "slidejax", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: JAX has no device (JAX_PLATFORMS='{platforms}'): " in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_are_as_if_they_were_dev_null(tmp_path, closed):
    """A file that is written must not get the number of standard output, which libraries use."""
    model = write_decoder(tmp_path)
    command = f"{sys.executable} -m slidejax convert {model} {tmp_path}/out --data-free {closed}"
    assert subprocess.run(command, shell=True, timeout=300).returncode == 0
    assert load(tmp_path / "out").config.vocab_size == 260


def test_a_text_has_an_end_and_no_mark_of_byte_order(tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfmoon")
    assert terminal.read_text(str(tmp_path / "text")) == "moon"
    monkeypatch.setattr(terminal, "_LONGEST", 4)
    assert terminal.read_text(str(tmp_path / "text")) == "moon"
    for endless in ("/dev/zero", __file__):
        with pytest.raises(ValueError, match="must be a text of at most 4 characters"):
            terminal.read_text(endless)

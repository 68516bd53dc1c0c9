"""Whole commands that are killed (SIGKILL) at random moments: OUT is the old or the new one.

`SLIDEJAX_TEST_KILLS=50` kills each command that often; a normal run kills each once.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import SENTENCES, write_decoder

# Loads what the commands load, and starts no JAX, so that each command is a fork of this process.
_KILLER = """
import json, os, random, signal, sys, time, traceback
import transformers  # noqa: F401
import slidejax.checkpoint, slidejax.huggingface, slidejax.lm, slidejax.train  # noqa: F401
import slidejax.commands.convert, slidejax.commands.recover, slidejax.commands.tune
from slidejax.bench import tuning  # noqa: F401
from slidejax.commands.main import main

setup, command, check, kills = json.loads(sys.argv[1])

def start(call):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            status = call() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child

def whole(args):
    begin = time.monotonic()
    _, status = os.waitpid(start(lambda: main(args)), 0)
    assert status == 0, (args, status)
    return time.monotonic() - begin

def checked():
    _, status = os.waitpid(start(lambda: exec(check, {})), 0)
    assert status == 0, "what is in OUT is neither the old nor the new one"

for args in setup:
    whole(args)
checked()
long, rng = whole(command), random.Random(kills)
whole(setup[-1])  # the old one again
for _ in range(kills):
    child = start(lambda: main(command))
    time.sleep(rng.uniform(0.3, 1.0) * long)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    checked()
whole(command)
checked()
"""


def killed(setup, command, check, **environment):
    kills = int(os.environ.get("SLIDEJAX_TEST_KILLS", "1"))
    arguments = json.dumps(
        [[[str(a) for a in args] for args in setup], [str(a) for a in command], check, kills]
    )
    ran = subprocess.run(
        [sys.executable, "-c", _KILLER, arguments],
        capture_output=True,
        text=True,
        timeout=120 + 30 * kills,
        env={**os.environ, **environment},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


def loads(out, patterns):
    """A program that fails unless OUT is a whole model of one of these patterns."""
    return (
        "import json, pathlib\n"
        "from slidejax.lm import load\n"
        f"out = pathlib.Path({str(out)!r})\n"
        "load(out)\n"
        f"assert any(p in (out / 'slidejax.json').read_text() for p in {patterns!r})\n"
    )


def test_convert(tmp_path):
    model, out = write_decoder(tmp_path), tmp_path / "made" / "out"
    out.parent.mkdir()
    convert = ("convert", model, out, "--data-free", "--force")
    setup = [(*convert, "--pattern", "2:4")]
    killed(setup, (*convert, "--pattern", "6:8"), loads(out, ["2:4", "6:8"]))
    assert '"6:8"' in (out / "slidejax.json").read_text().replace("'", '"')
    assert os.listdir(out.parent) == ["out"]  # nothing is left of the killed ones


def test_recover(tmp_path):
    model, sparse, out = write_decoder(tmp_path), tmp_path / "sparse", tmp_path / "made" / "out"
    out.parent.mkdir()
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES * 8)
    recover = ("recover", sparse, out, "--against", model, "--text", text, "--force")
    settings = ("--window", 16, "--batch", 2, "--steps", 3, "--every", 1)
    kept = ("--checkpoint", tmp_path / "made" / "state")
    setup = [
        ("convert", model, sparse, "--data-free"),
        ("convert", model, out, "--data-free", "--force", "--pattern", "2:4"),
    ]
    killed(setup, (*recover, *settings, *kept), loads(out, ["2:4", "6:8"]))
    assert "recovery" in (out / "slidejax.json").read_text()
    assert sorted(os.listdir(out.parent)) == ["out", "state"]


def test_tune(tmp_path):
    tune = ("tune", "--seconds", 0.002, "--warmup", 0.001, "--dtype", "int8", "--rows", 2)
    check = (
        "import json, pathlib\n"
        f"for table in pathlib.Path({str(tmp_path)!r}).rglob('*.json'):\n"
        "    assert json.loads(table.read_text())['entries']\n"
    )
    killed(
        [(*tune, "--shape", "32,64")],
        (*tune, "--shape", "64,32"),
        check,
        SLIDEJAX_CACHE=str(tmp_path),
    )
    [table] = tmp_path.rglob("*.json")
    assert {entry["out"] for entry in json.loads(table.read_text())["entries"]} == {32, 64}
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert not [name for name in files if "tmp" in name or name.startswith(".")], files

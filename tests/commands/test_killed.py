"""Whole commands, saves and trainings that are killed (SIGKILL) at random moments.

What they write is the old or the new one, and the next run goes on from there or starts anew.

`SLIDEJAX_TEST_KILLS=50` kills each of them that often; a normal run kills each once.
"""

import json
import os
import pathlib

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import SENTENCES, write_decoder
from forked import forked

# Each command is a fork of the process that runs this.
_KILLER = """
import json, os, random, shutil, signal, time, traceback
from slidejax.commands.main import main

setup, command, check, reset, made, kills = json.loads(ARGUMENTS)

def run(args):  # of a command, or a program
    return exec(args, {}) if isinstance(args, str) else main(args)

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
    _, status = os.waitpid(start(lambda: run(args)), 0)
    assert status == 0, (args, status)
    return time.monotonic() - begin

def checked():
    _, status = os.waitpid(start(lambda: exec(check, {})), 0)
    assert status == 0, "what is in OUT is neither the old nor the new one"

for args in setup:
    whole(args)
checked()
shutil.copytree(made, made + "-old")
long, rng = whole(command), random.Random(kills)
os.rename(made, made + "-at-once")
os.rename(made + "-old", made)
exec(reset, {})
for _ in range(kills):
    if rng.randrange(3) == 0:
        exec(reset, {})
    child = start(lambda: run(command))
    time.sleep(rng.uniform(0.2, 1.0) * long)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    checked()
whole(command)
checked()
"""


def killed(setup, command, check, made, reset="", **environment):
    """Kills a command at random moments, and lets it end at last.

    Args:
      setup: commands that make what the command needs; the last one makes its old result.
      command: arguments of `slidejax`, or a program.
      check: a program that fails unless the result is the old or the new one.
      made: the directory that it writes. What it writes in one run is kept in `made-at-once`.
      reset: a program that removes what a killed run goes on from.
      environment: variables for all of them.
    """
    kills = int(os.environ.get("SLIDEJAX_TEST_KILLS", "1"))
    plain = lambda args: args if isinstance(args, str) else [str(a) for a in args]  # noqa: E731
    arguments = json.dumps(
        [list(map(plain, setup)), plain(command), check, reset, str(made), kills]
    )
    program = _KILLER.replace("ARGUMENTS", repr(arguments))
    case = {"run": program, "environment": environment}
    [[(status, _, err)]] = forked([case], timeout=180 + 40 * kills)
    assert status == 0, err[-2000:]


def loads(out, patterns):
    """A program that fails unless OUT is a whole model of one of these patterns."""
    return (
        "import json, pathlib\n"
        "from slidejax.lm import load\n"
        f"out = pathlib.Path({str(out)!r})\n"
        "load(out)\n"
        f"assert any(p in (out / 'slidejax.json').read_text() for p in {patterns!r})\n"
    )


def arrays(folder):
    """A checkpoint's arrays by name, as bytes; in the file they may lie in any order."""
    data = (pathlib.Path(folder) / "slidejax.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:begin])
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        found[name] = entry["dtype"], entry["shape"], data[begin + start : begin + end]
    return found


def test_convert(tmp_path):
    model, out = write_decoder(tmp_path), tmp_path / "made" / "out"
    out.parent.mkdir()
    convert = ("convert", model, out, "--data-free", "--force")
    setup = [(*convert, "--pattern", "2:4")]
    killed(setup, (*convert, "--pattern", "6:8"), loads(out, ["2:4", "6:8"]), out)
    assert arrays(out) == arrays(f"{out}-at-once")
    # nothing is left of the killed ones
    assert sorted(os.listdir(out.parent)) == ["out", "out-at-once"]


def test_convert_with_calibration(tmp_path):
    """It goes on from its finished layers, and ends with the same weights to the bit."""
    model, out = write_decoder(tmp_path, num_layers=2), tmp_path / "made" / "out"
    out.parent.mkdir()
    (tmp_path / "text").write_text(SENTENCES * 8)
    convert = ("convert", model, out, "--force")
    text = ("--calibration", tmp_path / "text", "--sequences", 2)
    setup = [(*convert, "--data-free", "--pattern", "2:4")]
    reset = f"import shutil; shutil.rmtree({str(out) + '.work'!r}, ignore_errors=True)"
    killed(setup, (*convert, *text), loads(out, ["2:4", "6:8"]), out, reset)
    assert arrays(out) == arrays(f"{out}-at-once")
    assert sorted(os.listdir(out.parent)) == ["out", "out-at-once"]


def test_recover(tmp_path):
    model, sparse, out = write_decoder(tmp_path), tmp_path / "sparse", tmp_path / "made" / "out"
    out.parent.mkdir()
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES * 8)
    recover = ("recover", sparse, out, "--against", model, "--text", text, "--force")
    settings = ("--window", 16, "--batch", 2, "--steps", 12, "--every", 1)
    kept = ("--checkpoint", tmp_path / "made" / "state")
    setup = [
        ("convert", model, sparse, "--data-free"),
        ("convert", model, out, "--data-free", "--force", "--pattern", "2:4"),
    ]
    state = tmp_path / "made" / "state"
    reset = f"import shutil; shutil.rmtree({str(state)!r}, ignore_errors=True)"
    killed(setup, (*recover, *settings, *kept), loads(out, ["2:4", "6:8"]), out, reset)
    assert "recovery" in (out / "slidejax.json").read_text()
    assert arrays(out) == arrays(f"{out}-at-once")  # to the bit, wherever it went on from
    assert sorted(os.listdir(out.parent)) == ["out", "out-at-once", "state"]


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
        tmp_path / "cache" / "tuning",
        SLIDEJAX_CACHE=str(tmp_path / "cache"),
    )
    [table] = (tmp_path / "cache" / "tuning").iterdir()
    assert {entry["out"] for entry in json.loads(table.read_text())["entries"]} == {32, 64}


def test_save(tmp_path):
    """In a loop, so that most kills come while it writes."""
    models, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "made" / "out"
    out.parent.mkdir()
    setup = [
        f"import jax, slidejax as sj\n"
        f"from slidejax.lm.decoder.examples import tiny\n"
        f"for name in {[str(m) for m in models]!r}:\n"
        f"    model = tiny(hidden_size=64 if name.endswith('a') else 32)\n"
        f"    sj.lm.save(model, name)\n"
        f"sj.lm.save(model, {str(out)!r})\n"
    ]
    command = (
        f"import slidejax as sj\n"
        f"a, b = (sj.lm.load(name) for name in {[str(m) for m in models]!r})\n"
        f"for i in range(20):\n"
        f"    sj.lm.save((b, a)[i % 2], {str(out)!r})\n"
    )
    check = (
        f"import slidejax as sj\nassert sj.lm.load({str(out)!r}).config.hidden_size in (32, 64)\n"
    )
    killed(setup, command, check, out)
    assert arrays(out) == arrays(models[0])
    assert sorted(os.listdir(out.parent)) == ["out", "out-at-once"]


def test_training(tmp_path):
    """It goes on from the last state that was saved, and ends with the same weights to the bit."""
    pytest.importorskip("optax")
    out, state = tmp_path / "made" / "out", tmp_path / "made" / "state"
    out.parent.mkdir()
    command = (
        f"import jax, numpy as np, slidejax as sj\n"
        f"from slidejax.train import Shuffled, fit\n"
        f"x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)\n"
        f"w = sj.pack(jax.random.normal(jax.random.key(1), (32, 16)), '6:8', dtype='int8')\n"
        f"loss = lambda w, x: ((sj.linear(x, w) - x[:, :16]) ** 2).mean()\n"
        f"made = fit(loss, w, Shuffled(x, 32), steps=60, checkpoint={str(state)!r}, every=1)\n"
        f"sj.checkpoint.save({str(out)!r}, {{'w': made.params, 'losses': made.losses}})\n"
    )
    setup = [f"import slidejax as sj, slidejax.checkpoint\nsj.checkpoint.save({str(out)!r}, 1)"]
    check = (
        f"import os, slidejax as sj, slidejax.checkpoint\n"
        f"found = sj.checkpoint.load({str(out)!r})\n"
        f"assert found == 1 or len(found['losses']) == 60\n"
        f"if os.path.exists({str(state)!r}):\n"
        f"    saved = sj.checkpoint.load({str(state)!r})\n"
        f"    assert 1 <= saved['step'] == len(saved['losses']) <= 60\n"
    )
    reset = f"import shutil; shutil.rmtree({str(state)!r}, ignore_errors=True)"
    killed(setup, command, check, out, reset)
    assert arrays(out) == arrays(f"{out}-at-once")
    assert sorted(os.listdir(out.parent)) == ["out", "out-at-once", "state"]

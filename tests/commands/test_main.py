"""The parser of the command line: help, examples, versions, and old spellings of flags."""

import shlex
import signal
import subprocess
import sys
import time

import pytest

import slidejax
from slidejax.commands import arguments, main


def parse(text):
    return main.make_parser().parse_args(shlex.split(text))


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_shows_an_example_that_works(capsys, name):
    module = main.COMMANDS[name]
    args = parse(module.EXAMPLE.removeprefix("slidejax "))
    assert args.command == name and args.run is module.run
    with pytest.raises(SystemExit) as stopped:
        main.main([name, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and module.EXAMPLE in said and module.SUMMARY in said


def test_help_loads_neither_jax_nor_extras():
    code = (
        "import sys, slidejax.commands.main as c\n"
        "try: c.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'jax', 'numpy', 'flax', 'transformers', 'rich'} & sys.modules.keys()))"
    )
    for args in ([], ["convert"], ["tune"]):
        command = [sys.executable, "-c", code, *args, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.splitlines()[-1] == "[]" and "usage: slidejax" in done.stdout


@pytest.mark.parametrize("wait", [0.0, 0.15, 0.4, 0.8, 1.5])
def test_ctrl_c_while_starting_is_quiet(wait):
    """In the middle of imports, too: no traceback, no segmentation fault."""
    code = (
        "import runpy, sys; sys.argv[0] = 'slidejax'; import slidejax.__main__\n"
        "print('ready', flush=True); runpy.run_module('slidejax', run_name='__main__')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    time.sleep(wait)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    # While Python ends, the signal itself may end the process.
    assert child.returncode in (130, 0, -signal.SIGINT) and b"Traceback" not in err, err


def test_the_package_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "slidejax", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"slidejax {slidejax.__version__}\n"


@pytest.mark.parametrize(("old", "new"), [
    ("demo --patterns 6:8,2:4 --dtypes int8,none", "demo --pattern 6:8,2:4 --dtype int8,none"),
    ("bench --patterns 6:8 --dtypes int8", "bench --pattern 6:8 --dtype int8"),
    ("tune m --patterns 6:8 --dtypes int8", "tune m --pattern 6:8 --dtype int8"),
    ("convert m o --pattern 6:8 --dense a --skip b", "convert m o --pattern 6:8 --skip a --skip b"),
])  # fmt: skip
def test_old_spellings_are_accepted(capsys, old, new):
    assert vars(parse(old)) == vars(parse(new))
    with pytest.raises(SystemExit):
        parse(f"{old.split()[0]} --help")
    said = capsys.readouterr().out
    assert not any(flag in said for flag in ("--patterns", "--dtypes", "--dense"))


def test_defaults_are_what_the_help_says():
    assert parse("demo").pattern == ["14:16", "6:8", "4:6", "2:4"]
    assert parse("demo").dtype == ["int8", None]
    args = parse("convert m o --pattern 4:4")
    assert (args.pattern, args.dtype, args.skip, args.mixed) == ("dense", "8bit", [], [])
    assert parse("convert m o --pattern 6:8 --dtype none").dtype is None
    assert parse("bench").pattern == ["6:8"] and parse("bench").dtype is None


def test_the_methods_are_those_that_convert_knows():
    from slidejax.prune.model.methods import CALIBRATED

    assert ("magnitude", *CALIBRATED) == arguments.METHODS

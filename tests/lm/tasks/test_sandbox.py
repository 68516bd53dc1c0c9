"""Programs of every bad kind end, and count as failures; good ones pass."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from slidejax.lm.tasks import sandbox
from slidejax.lm.tasks.sandbox import Limits, Outcome, Pool, run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no such limits here")

TESTS = "\ndef check(f):\n    assert f(2) == 4\n\ncheck(double)\n"


def program(body):
    """A program that defines `double` and tests it, as those of HumanEval do."""
    return f"def double(x):\n    {body}\n{TESTS}"


@pytest.mark.parametrize(
    "body",
    [
        "return 2 * x",
        "print('noise' * 100_000); return x + x",
        "import sys; sys.stderr.write('noise'); return x + x",
        # a class that looks up its module, a file in the program's own folder, many words
        "from dataclasses import dataclass; return 4",
        "open('notes.txt', 'w').write('2'); return 2 * int(open('notes.txt').read())",
        f"return 2 * x  # {'x' * 100_000}",
    ],
)
def test_right_programs_pass(body):
    assert run(program(body)) == Outcome(True, "passed")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return x", "AssertionError"),
        ("return y", "NameError: name 'y' is not defined"),
        ("return (", "SyntaxError"),
        # leaving before the tests are done is no success
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "left before its tests were done"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("return double(x)", "RecursionError"),
        ("return [0] * 10**10", "MemoryError"),
        ("open('big', 'wb').write(bytes(10**7))", "OSError: [Errno 27] File too large"),
        ("[open(str(i), 'w').close() for i in range(100)]", "PermissionError: too many files"),
        ("import os; os.fork()", "PermissionError: os.fork is not allowed"),
        ("import subprocess; subprocess.run('true')", "PermissionError: subprocess.Popen"),
        ("import os; os.system('true')", "PermissionError: os.system"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError: os.kill is not allowed"),
        ("import os; os.killpg(0, 9)", "PermissionError: os.killpg is not allowed"),
        ("import socket; socket.socket()", "PermissionError: socket"),
        ("import resource as r; r.setrlimit(r.RLIMIT_CPU, (9, 9))", "PermissionError: resource"),
        ("import signal; signal.raise_signal(signal.SIGSEGV)", "ended by SIGSEGV"),
        ("input()", "EOFError"),
        ("import numpy", "ModuleNotFoundError"),
        ("import os; os.closerange(3, 64); return 4", "left before its tests were done"),
        # an error whose text fails
        ("raise type('Bad', (Exception,), {'__str__': lambda self: 1 / 0})", "Bad"),
    ],
)
def test_wrong_programs_fail_and_say_why(body, reason):
    outcome = run(program(body))
    assert not outcome.passed and outcome.reason.startswith(reason)


def test_endless_programs_are_ended():
    limits = Limits(wall_seconds=120, cpu_seconds=1)
    assert run(program("while True: pass"), limits).reason == "more than 1 s of processor time"
    limits = Limits(wall_seconds=0.5)
    begin = time.monotonic()
    assert run(program("import time; time.sleep(60)"), limits).reason == "more than 0.5 s"
    assert time.monotonic() - begin < 30


def test_a_program_cannot_say_that_it_has_passed():
    """Everything in the pipe but the word, which is drawn anew for each program, is a failure."""
    body = "import os; [os.write(n, b'passed') for n in range(3, 20) if _open(n)]; os._exit(0)"
    looks = "def _open(n):\n    import os\n    try: os.fstat(n); return True\n    except OSError: pass\n"
    assert not run(looks + program(body)).passed


def test_files_elsewhere_stay_as_they_are(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    for change in (
        "open({!r}, 'w')",
        "os.remove({!r})",
        "os.rename({!r}, 'x')",
        "os.chmod({!r}, 0)",
    ):
        outcome = run(f"import os\n{change.format(str(mine))}")
        assert "outside the program's folder" in outcome.reason
    assert mine.read_text() == "kept"


def test_a_program_sees_an_empty_folder_and_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "value")
    assert run("import os\nassert os.listdir() == [] and 'SECRET' not in os.environ").passed
    assert run(f"import os\nassert os.getcwd() != {os.getcwd()!r}").passed
    assert run("import sys\nassert 'slidejax' not in sys.modules").passed


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    for body in ("open('x', 'w')", "import time; time.sleep(9)", "import os; os._exit(1)"):
        run(program(body), Limits(wall_seconds=0.5))
    assert list(tmp_path.iterdir()) == []
    assert not descriptors.exists() or len(list(descriptors.iterdir())) == before


def test_what_a_program_starts_ends_with_it(monkeypatch):
    """Should a process come past the guard, it is killed with the group that it belongs to."""
    killed = []
    real = os.killpg
    monkeypatch.setattr(sandbox.os, "killpg", lambda *args: (killed.append(args), real(*args)))
    assert run("pass").passed
    assert len(killed) == 1 and killed[0][1] == signal.SIGKILL and killed[0][0] != os.getpgid(0)


def test_many_run_at_a_time_in_order():
    seen = []
    with Pool(3) as pool:
        outcomes = pool.outcomes([f"assert {i} % 2" for i in range(7)], seen.append)
    assert [o.passed for o in outcomes] == [False, True] * 3 + [False]
    assert seen == list(range(1, 8))


@pytest.mark.parametrize("name", ["wall_seconds", "cpu_seconds", "memory_bytes", "file_bytes"])
def test_limits_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be positive.*got 0"):
        Limits(**{name: 0})
    with pytest.raises(ValueError, match=r"workers must be from 1 .*, got 0"):
        Pool(0)


def test_the_child_needs_the_standard_library_alone():
    assert sys.executable
    text = Path(sandbox.__file__).with_name("child.py").read_text()
    imported = {
        line.split()[1] for line in text.splitlines() if line.lstrip().startswith("import ")
    }
    assert imported == {"json", "os", "sys", "types", "resource"} <= set(sys.stdlib_module_names)

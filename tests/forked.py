"""Commands and programs in processes of their own, under limits, and quickly.

One process loads what the commands load and starts no JAX. Each run is a fork of it, with the
variables and the directory of the caller.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading

_SERVER = """
import gc, importlib, json, os, resource, sys, tempfile, traceback
import transformers  # noqa: F401
import slidejax.checkpoint, slidejax.huggingface, slidejax.lm, slidejax.train  # noqa: F401
import slidejax.commands.convert, slidejax.commands.recover, slidejax.commands.tune
from slidejax.bench import tuning  # noqa: F401
from slidejax.commands.main import main

gc.freeze()  # a fork that looked through all modules would copy them
gc.set_threshold(10_000, 20, 20)

def load_all():
    # Python's own files may lie where another user cannot read.
    unfit = ("antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "lib2to3")
    for name in [*sys.stdlib_module_names, "encodings.unicode_escape", "encodings.latin_1"]:
        try:
            name in unfit or importlib.import_module(name)
        except ImportError:
            pass

def start(case, out, err):
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.environ.update(case.get("environment", {}))
        if "umask" in case:
            os.umask(case["umask"])
        if "file_size" in case:
            resource.setrlimit(resource.RLIMIT_FSIZE, (case["file_size"],) * 2)
        if "user" in case:
            os.setgroups([])
            os.setgid(case["user"])
            os.setuid(case["user"])
        what = case["run"]
        status = (exec(what, {}) if isinstance(what, str) else main(what)) or 0
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

def together(cases):
    if any("user" in case for case in cases):
        load_all()
    files = [(tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")) for _ in cases]
    children = [start(case, *both) for case, both in zip(cases, files)]
    found = []
    for child, both in zip(children, files):
        _, status = os.waitpid(child, 0)
        texts = []
        for file in both:
            with file:
                file.seek(0)
                texts.append(file.read())
        found.append([os.waitstatus_to_exitcode(status), *texts])
    return found

for line in sys.stdin:
    groups, environment, place = json.loads(line)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    print(json.dumps([together(cases) for cases in groups]), flush=True)
"""


@functools.cache
def _server():
    """The process whose forks run; it is started at the first call and lasts for all."""
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )
    atexit.register(_end, server)
    return server, errors


def _end(server):
    """Ends the process and all that it has started."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def forked(*groups, timeout=300):
    """Runs groups of cases one after the other, and the cases of a group at the same time.

    Args:
      groups: lists of cases. A case is a dict with `run`, the arguments of `slidejax` or a program,
        and perhaps `user` (a number), `file_size` (bytes), `umask` and `environment`.
      timeout: seconds for all of it.

    Returns:
      For each group a list of `[status, standard output, standard error]`.
    """
    plain = [
        [
            {
                **case,
                "run": case["run"] if isinstance(case["run"], str) else [*map(str, case["run"])],
            }
            for case in group
        ]
        for group in groups
    ]
    server, errors = _server()
    too_long = threading.Timer(timeout, _end, [server])
    too_long.start()
    try:
        print(json.dumps([plain, dict(os.environ), os.getcwd()]), file=server.stdin, flush=True)
        answer = server.stdout.readline()
    except BrokenPipeError:
        answer = ""
    finally:
        too_long.cancel()
    if not answer:
        _end(server)
        _server.cache_clear()
        errors.seek(0)
        raise AssertionError(f"no answer within {timeout} s: {errors.read()[-2000:]}")
    return json.loads(answer)

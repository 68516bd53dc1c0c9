"""Running programs that a model wrote, each in a process of its own.

A process has limits on wall time, CPU time, memory, the size and number of files, and processes. It
starts in an empty folder that is removed afterwards, with an environment of its own and no input or
output. It sees Python's standard library and no other packages. It cannot start processes, use the
network, or change files elsewhere, as far as Python's audit events tell (PEP 578).

This protects a machine from the accidents of a model that writes nonsense. It is no wall against a
program that was written to attack: run models that you do not trust in a container.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from slidejax.bounds import COUNT

__all__ = ["Limits", "Outcome", "Pool", "run"]

_CHILD = Path(__file__).with_name("child.py")
_MOST = 4096  # bytes of a report


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a program.

    Attributes:
      wall_seconds: from its start, that of Python included.
      cpu_seconds: whole seconds of processor time.
      memory_bytes: of address space.
      file_bytes: of each file that it writes.
      files: how often it may open a file to write.
      processes: how many processes of the user there may be before it can start none; the
        administrator is not held to it, but starts none either.

    Raises:
      ValueError: naming the limit that is not positive, or, for `processes`, negative.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 3
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    files: int = 64
    processes: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "processes" else math.nextafter(0, 1)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{field.name} must be positive and finite, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a program.

    Attributes:
      passed: whether it ran to its end and raised nothing.
      reason: "passed", the error that it raised, or why it was ended.
    """

    passed: bool
    reason: str


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Runs a program in a process of its own.

    Args:
      program: Python.
      limits: the limits of its resources; None: the defaults.

    Raises:
      NotImplementedError: the operating system has no such limits (Windows).

    >>> run("assert 1 + 1 == 2").passed, run("assert 1 + 1 == 3").reason
    (True, 'AssertionError')
    """
    if os.name != "posix":
        raise NotImplementedError("programs of a model run on Linux and macOS only")
    limits = limits or Limits()
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="slidejax-", ignore_cleanup_errors=True) as folder:
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                # no packages, nothing of the user's, no compiled files
                [sys.executable, "-S", "-s", "-P", "-B", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                # Sets have the same order each time, so that results do not change.
                env={"PATH": os.defpath, "HOME": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                pass_fds=(writing,),
                start_new_session=True,
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        try:
            job = {"word": word, "report": writing, "program": program}
            _send(process, json.dumps(job | {"limits": dataclasses.asdict(limits)}).encode())
            report = _report(reading, time.monotonic() + limits.wall_seconds)
        finally:
            os.close(reading)
            _end(process)
    if report is not None and report == word.encode():
        return Outcome(True, "passed")
    return Outcome(False, _why(report, process.returncode, limits))


def _send(process: subprocess.Popen, job: bytes) -> None:
    assert process.stdin is not None
    # A process that has died shows that by its report, which is missing.
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(job)


def _report(pipe: int, deadline: float) -> bytes | None:
    """The output of the process until it closed the pipe; None if it did not in time."""
    found = b""
    while len(found) < _MOST:
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        part = os.read(pipe, _MOST)
        if not part:
            break
        found += part
    return found


def _end(process: subprocess.Popen) -> None:
    """Ends the process and all that it started; its number is its own until `wait` returns."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(report: bytes | None, status: int, limits: Limits) -> str:
    """Why a program has not passed."""
    if report is None:
        return f"more than {limits.wall_seconds:g} s"
    kind, _, text = report.decode(errors="replace").partition(" ")
    if kind == "failed":
        return text or "error"
    if status == -signal.SIGXCPU:
        return f"more than {limits.cpu_seconds} s of processor time"
    if status < 0 and status != -signal.SIGKILL:
        return f"ended by {signal.Signals(-status).name}"
    return "left before its tests were done"


class Pool:
    """Runs programs in parallel, as they come.

    Args:
      workers: how many run at a time; None: one for each processor.
      limits: as for `run`.

    Raises:
      TypeError, ValueError: `workers` is no whole number, or not positive.

    >>> with Pool(2) as pool:
    ...     found = [pool.start(program) for program in ("pass", "1 / 0")]
    ...     [future.result().reason for future in found]
    ['passed', 'ZeroDivisionError: division by zero']
    """

    def __init__(self, workers: int | None = None, limits: Limits | None = None):
        workers = _processors() if workers is None else COUNT.check(workers, "workers")
        self._limits = limits
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="slidejax-sandbox")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def start(self, program: str) -> Future[Outcome]:
        """Begins to run a program."""
        return self._threads.submit(run, program, self._limits)

    def outcomes(
        self, programs: Iterable[str], progress: Callable[[int], None] | None = None
    ) -> list[Outcome]:
        """Runs programs, and waits for them.

        Args:
          programs: the programs.
          progress: called with the number of programs that are done.
        """
        outcomes = []
        for future in [self.start(program) for program in programs]:
            outcomes.append(future.result())
            if progress is not None:
                progress(len(outcomes))
        return outcomes


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

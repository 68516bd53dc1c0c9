"""The process in which one program that a model wrote runs. `sandbox` starts this file.

It reads one JSON object from standard input, limits itself, runs the program and writes one line to
a pipe. Only this process knows the word that begins the line of a program that ran to its end, so a
program that leaves early has not passed. It uses the standard library alone.
"""

import json
import os
import sys
import types

# Forbidden actions of a program, by the names of Python's audit events. It may not start processes,
# signal others, use the network or leave Python.
_FORBIDDEN = (
    "ctypes.",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "pty.spawn",
    "resource.",
    "signal.pthread_kill",
    "socket.",
    "subprocess.",
    "sys.addaudithook",
)
# These change files. Their first arguments are paths, one or two of them.
_CHANGES = {
    "os.chdir": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.setxattr": 1,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.utime": 1,
    "shutil.move": 2,
    "shutil.rmtree": 1,
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    answer, leave, write = job["report"], os._exit, os.write  # a program may replace those of `os`
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    limit(job["limits"])
    guard(os.getcwd(), job["limits"]["files"])
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    try:
        exec(compile(job["program"], "solution.py", "exec"), module.__dict__)
        line = job["word"]
    except BaseException as error:
        line = f"failed {described(error)}"
    try:
        write(answer, line.encode(errors="replace"))
    finally:
        leave(0)


def limit(limits: dict) -> None:
    """Sets the limits that the operating system keeps."""
    import resource

    for name, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(name)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        # The soft limit of CPU time ends the process with a signal that says why.
        resource.setrlimit(name, (value, value + (name == resource.RLIMIT_CPU)))


def guard(folder: str, files: int) -> None:
    """Refuses what `_FORBIDDEN` names, and changes of files outside the folder, for good.

    The administrator's processes pass the operating system's limit of processes, and the
    permissions of files. This holds for them, too.
    """
    real, inside = os.path.realpath, os.path.realpath(folder) + os.sep
    opened = 0

    def check(path: object) -> None:
        if isinstance(path, int) or not (real(path) + os.sep).startswith(inside):  # type: ignore
            raise PermissionError(f"{path!r} is outside the program's folder")

    def hook(event: str, args: tuple) -> None:
        nonlocal opened
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed")
        if event == "open" and args[2] & _WRITES and args[0] != os.devnull:
            if not isinstance(args[0], int):  # a number is open already
                check(args[0])
            opened += 1
            if opened > files:
                raise PermissionError("too many files were opened to write")
        for path in args[: _CHANGES.get(event, 0)]:
            check(path)

    sys.addaudithook(hook)


def described(error: BaseException) -> str:
    """An error in a line. Its text may be the program's own, and fail."""
    try:
        text = str(error)[:200]
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}".strip().rstrip(":").replace("\n", " ")


if __name__ == "__main__":
    main()

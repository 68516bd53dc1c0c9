"""The command line: `slidejax demo | convert | recover | eval | generate | bench | tune | info`.

Each command is a module with `add_arguments` and `run`, and loads what it needs when it runs:
`slidejax --help` loads no JAX, and `info`, `bench` and `tune` work in an installation
without extras. Results go to standard output, progress and notes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import slidejax
from slidejax.commands import bench, convert, demo, evaluate, generate, info, outputs, recover, tune

__all__ = ["COMMANDS", "main", "make_parser"]

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "convert": convert,
    "recover": recover,
    "eval": evaluate,
    "generate": generate,
    "bench": bench,
    "tune": tune,
    "info": info,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments; None: those of the process.

    Returns:
      The exit status: 0, or 1 after an error that one line explains. Bad usage exits with 2.
    """
    _open_streams()
    args = make_parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _note
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may lack characters that a model writes
            stream.reconfigure(errors="backslashreplace")
    try:
        with _quiet_interrupts():
            _load_packages()
        outputs.check(args)
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of standard output has gone. Without this line Python would complain about that
        # again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as e:
        return _failed(args, e, str(e))
    except MemoryError as e:
        return _failed(args, e, str(e) or "not enough memory")
    except (RuntimeError, AssertionError) as e:
        said = _of_device(e)
        if said is None:
            raise
        return _failed(args, e, said)
    return 0


def _of_device(error: BaseException) -> str | None:
    """The message for an error of JAX about a device; None for other errors.

    JAX has one class for all that goes wrong on a device, and asserts that there is one.
    """
    first = str(error).partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in first:
        return f"not enough memory on the device: {first}"
    try:
        importlib.import_module("jax").devices()
    except (RuntimeError, AssertionError) as e:
        wanted = os.environ.get("JAX_PLATFORMS")
        reason = str(e).partition("\n")[0] or "a plug-in of JAX for it is missing"
        return f"JAX has no device (JAX_PLATFORMS={wanted!r}): {reason}"
    return None


def _failed(args: argparse.Namespace, error: BaseException, said: str) -> int:
    """Says what went wrong in one line, and returns the exit status."""
    if os.environ.get("SLIDEJAX_TRACEBACK"):
        raise error
    print(f"slidejax {args.command}: error: {said}", file=sys.stderr)
    return 1


def _open_streams() -> None:
    """Opens standard streams that a caller has closed, as if they were /dev/null.

    Otherwise the next file that is opened would have their number, and what libraries print would
    go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (as long as the process)


# Modules that commands load anyway, and whose loading an interrupt must not stop half way.
_PACKAGES = ("jax", "jax.numpy", "flax.linen", "flax.nnx")


def _load_packages() -> None:
    """Imports the large packages."""
    for name in _PACKAGES:
        importlib.import_module(name)


@contextlib.contextmanager
def _quiet_interrupts() -> Iterator[None]:
    """Around the start, in which Ctrl-C ends the process at once (`slidejax.__main__`).

    Afterwards it is an exception again, so that what has begun is cleaned up.
    """
    handler = signal.getsignal(signal.SIGINT)
    starts = getattr(handler, "__name__", "") == "_quit"  # `python -m slidejax`
    yield
    if starts:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Values that begin like a negative number, whatever follows.
_NEGATIVE = re.compile(r"-(?:\d|\.\d|inf|nan)", re.IGNORECASE)


def _joined(argv: list[str]) -> list[str]:
    """The arguments with `--rows=-1,2` in the place of `--rows -1,2`.

    argparse takes a value that begins with "-" for a flag, unless all of it is a plain number. It
    would then say that the flag has no value, and not what is wrong with the one it has.

    >>> _joined(["bench", "--rows", "-1,2", "--seconds", "-inf"])
    ['bench', '--rows=-1,2', '--seconds=-inf']
    """
    made: list[str] = []
    for text in argv:
        before = made[-1] if made else ""
        is_flag = before.startswith("-") and "=" not in before and not _NEGATIVE.match(before)
        if is_flag and _NEGATIVE.match(text):
            made[-1] = f"{before}={text}"
        else:
            made.append(text)
    return made


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. It sets `args.run` to the function of the command."""
    parser = argparse.ArgumentParser(
        prog="slidejax",
        description="(2N-2):2N sparse weights for JAX and Flax.",
        epilog="example:\n  slidejax convert --help    what convert does, its flags and an example",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"slidejax {slidejax.__version__}"
    parser.add_argument("--version", action="version", version=version, help="show it and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        p = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(p)
        p.set_defaults(run=module.run)
    return parser


def _note(
    message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Prints a warning as a note, without its place in the code."""
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

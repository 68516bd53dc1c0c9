"""`python -m slidejax` and the command `slidejax`: the command line.

Nothing is imported before Ctrl-C is taken care of. An interrupt in the middle of an import leaves
packages half made, and some of them then end the process with a segmentation fault.
"""

import os
import signal
import sys


def _quit(*_: object) -> None:
    os._exit(130)


# Programs in the background ignore the signal, and programs of others have handlers of their own.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _quit)

from slidejax.commands.main import main  # noqa: E402 (see above)

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

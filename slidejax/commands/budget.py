"""`slidejax convert --budget`: a pattern for each layer, so that the model is as fast as asked."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from slidejax.bounds import Bound
from slidejax.commands import arguments

if TYPE_CHECKING:
    from slidejax.rules import Rule

__all__ = ["Budget", "add_arguments", "check", "rules"]

# Rows of x: of a prefill of 8 sequences of 512 tokens, and of one sequence that is written.
_ROWS = {"prefill": 4096, "decode": 1}
# No pattern is twice as fast as dense; which one is fast enough is seen when times are known.
_FACTOR = arguments.Number(Bound(0, 100, above=True))
_PATTERNS = ("dense", "14:16", "6:8", "4:6", "2:4")
# Layers that read the same input are one product in a model that serves, if their patterns agree.
_TOGETHER = (r"(.*)/[qkv]_proj/kernel", r"(.*)/(?:gate|up)_proj/kernel")


class Budget(NamedTuple):
    """What `--budget` asks for.

    Attributes:
      phase: "prefill" or "decode".
      speedup: over dense 8-bit layers.
    """

    phase: str
    speedup: float

    def __str__(self) -> str:
        return f"{self.phase}={self.speedup:g}"


def _budget(text: str) -> Budget:
    """Such as "prefill=1.08"."""
    phase, _, factor = text.partition("=")
    if phase not in _ROWS or not factor:
        raise argparse.ArgumentTypeError(
            f"must be prefill=FACTOR or decode=FACTOR, such as prefill=1.08, got {arguments.shown(text)}"
        )
    return Budget(phase, _FACTOR(factor))


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds `--budget` and `--gpu`."""
    p.add_argument(
        "--budget",
        type=_budget,
        metavar="PHASE=FACTOR",
        help="in place of --pattern: choose a pattern for each layer (dense, 14:16, 6:8, 4:6 or "
        "2:4, or one of --mixed), so that the linear layers are FACTOR times as fast as dense 8-bit "
        "ones and the loss rises least. Examples: prefill=1.08 (4096 tokens), decode=1.1 (one "
        "sequence). Times are measured (slidejax tune), or else estimated",
    )
    p.add_argument(
        "--gpu",
        metavar="NAME",
        help="the GPU of --budget, as JAX calls it, such as 'NVIDIA H200' (default: that of this "
        "machine; without one an H100)",
    )


def check(args: argparse.Namespace) -> None:
    """Raises a ValueError for flags that do not go together."""
    if args.budget is None:
        if args.gpu is not None:
            raise ValueError("--gpu is the GPU of --budget, and there is no --budget")
        return
    for flag, given in (("--skip", args.skip), ("--dtype none", args.dtype is None)):
        if given:
            raise ValueError(f"--budget chooses 8-bit patterns for all layers: no {flag} with it")


def rules(args: argparse.Namespace, model: Any, ids: Any) -> list[tuple[str, Rule]]:
    """The rules of `--budget`. Standard error says where the times came from.

    Args:
      args: the command's arguments.
      model: the model.
      ids: token ids to calibrate on.

    Raises:
      ValueError: no pattern is so fast, or no time is known of the GPU.
    """
    from slidejax.conversion import functional
    from slidejax.prune import Times, mixed
    from slidejax.prune.model.choose import BudgetTooSmall
    from slidejax.prune.model.convert import planned_rules
    from slidejax.rules import Rule

    dense = Rule("dense", qdtype=args.dtype)
    patterns = list(args.mixed or _PATTERNS)
    times = Times(
        _ROWS[args.budget.phase], ["dense", *patterns], qdtype=args.dtype, device=args.gpu
    )
    paths = planned_rules(functional(model), dense)
    groups = [regex for regex in _TOGETHER if any(re.fullmatch(regex, path) for path in paths)]
    try:
        found = mixed(
            model,
            dense,
            ids,
            patterns=patterns,
            groups=groups,
            cost=times,
            speedup=args.budget.speedup,
        )
    except BudgetTooSmall as e:
        raise ValueError(
            f"--budget {args.budget} cannot be reached with {', '.join(patterns)} on {times.device}: {e}"
        ) from e
    how = " and ".join(sorted(times.sources))
    print(f"note: the times of layers on {times.device} are {how}", file=sys.stderr)
    return found

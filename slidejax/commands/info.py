"""`slidejax info`: versions, devices, the CUDA library, and the implementations that run here."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from slidejax.commands import arguments, terminal

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "collect", "run", "text"]

SUMMARY = "Show versions, devices, the CUDA library, and the implementations that can run here."
EXAMPLE = "slidejax info --json info.json"

_PACKAGES = (
    "slidejax",
    "jax",
    "jaxlib",
    "flax",
    "tokenizers",
    "jinja2",
    "gguf",
    "transformers",
    "nvidia-cusparselt-cu13",
)
_ROWS = (1, 16)  # of x in the sample: decode takes few rows, the other kernels any number


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_json(p)


def run(args: argparse.Namespace) -> None:
    """Prints the facts of `collect`."""
    facts = collect()
    terminal.emit(args, facts)
    if args.json != "-":
        print(text(facts))


def _version(package: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """The facts as a JSON object.

    >>> "hopper" in collect()["implementations"]
    True
    """
    import jax
    import jax.numpy as jnp

    from slidejax.ops import registry
    from slidejax.ops.cuda import library
    from slidejax.ops.explain import explain
    from slidejax.ops.linear import linear
    from slidejax.weights.packed import pack

    weights = {
        dtype: pack(jnp.ones((512, 512), jnp.bfloat16), "6:8", dtype=dtype)
        for dtype in ("int8", "float8_e4m3fn", "bfloat16")
    }
    choices = {
        (dtype, rows): explain(linear, jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16), w)[0][1]
        for dtype, w in weights.items()
        for rows in _ROWS
    }
    every = [registry.get(name) for name in registry.implementations()]
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "platform": jax.default_backend(),
        "devices": [f"{d.id}: {d.device_kind}" for d in jax.devices()],
        "cuda_library": {
            "usable": library.missing() is None,
            "build": library.build_info(),
            "missing": {"library": library.missing()}
            | {i.name: i.available() for i in every if i.cuda_only},
            **{name: fact for i in every for name, fact in i.facts().items()},
        },
        "implementations": {
            i.name: {
                f"{dtype} {rows}": choice.refused.get(i.name)
                for (dtype, rows), choice in choices.items()
            }
            for i in every
        },
        "choice": {f"{dtype} {rows}": str(choice) for (dtype, rows), choice in choices.items()},
    }


def text(facts: dict[str, Any]) -> str:
    """Formats the facts of `collect` as text."""
    library = facts["cuda_library"]
    lines = [
        f"python {facts['python']}",
        *(f"{name} {v or 'not installed'}" for name, v in facts["versions"].items()),
    ]
    lines += [
        f"platform {facts['platform']}; devices {', '.join(facts['devices'])}",
        "",
        "CUDA library:",
    ]
    lines += [f"  {part}: {reason or 'usable'}" for part, reason in library["missing"].items()]
    if library["build"]:
        lines += [f"  built with {', '.join(f'{k} {v}' for k, v in library['build'].items())}"]
    for name, fact in library.items():
        if name not in ("usable", "build", "missing") and fact is not None:
            lines.append(f"  {name.replace('_', ' ')} {fact}")
    lines += ["", "implementations of linear (6:8, 512 x 512; dtype and rows):"]
    for name, by_case in facts["implementations"].items():
        for reason in dict.fromkeys(by_case.values()):
            cases = ", ".join(case for case, r in by_case.items() if r == reason)
            lines.append(f"  {name}: {cases}: {reason or 'runs here'}")
    lines += ["", "chosen:", *(f"  {case}: {why}" for case, why in facts["choice"].items())]
    return "\n".join(lines)

"""English text that is on every machine with Python: the language reference that `help()` shows.

It is read from the standard library (``pydoc_data.topics``), so its wording follows the version of Python; a figure
measured on it should name that version (`source`). Two disjoint parts: one to evaluate on, one to calibrate on.
"""

from __future__ import annotations

import platform
import zlib

__all__ = ["calibration", "evaluation", "source"]


def source() -> str:
    """What the text is, for tables.

    >>> source().startswith("Python 3")
    True
    """
    return f"Python {'.'.join(platform.python_version_tuple()[:2])} language reference (pydoc_data.topics)"


def evaluation() -> str:
    """The part to evaluate on: a quarter of the topics, no paragraph twice."""
    return "\n\n".join(_parts()[0])


def calibration() -> str:
    """The part to calibrate on: the other topics, without any paragraph that `evaluation` has."""
    return "\n\n".join(_parts()[1])


def _parts() -> tuple[list[str], list[str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise ValueError("this Python lacks pydoc_data, the default text: name a text file instead") from e
    # By a hash of the name, so that a topic keeps its side when others come or go. Topics quote each other at length:
    # a paragraph counts once, where it first appears, and what was evaluated on is never calibrated on.
    held_out = sorted(name for name in topics if zlib.crc32(name.encode()) % 4 == 0)
    seen: set[str] = set()
    parts = []
    for names in (held_out, sorted(topics.keys() - set(held_out))):
        part = []
        for name in names:
            for paragraph in topics[name].split("\n\n"):
                key = " ".join(paragraph.split())
                if key and key not in seen:
                    seen.add(key)
                    part.append(paragraph)
        parts.append(part)
    return parts[0], parts[1]

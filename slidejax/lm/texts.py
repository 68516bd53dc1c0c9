"""English text that is on every machine with Python: the language reference that `help()` shows, and docstrings.

The reference is read from the standard library (``pydoc_data.topics``), so its wording follows the version of Python; a
figure measured on it should name that version (`source`). Two disjoint parts: one to evaluate on, one to calibrate on.
What a model is trained on (`training`) shares not even a run of eight words with the first.
"""

from __future__ import annotations

import ast
import platform
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["calibration", "evaluation", "overlaps", "source", "training"]

# A paragraph with so many words in a row of the evaluation text is not trained on.
_RUN = 8
# Parts of the standard library whose docstrings are hardly prose, and its largest part by far.
_NO_PROSE = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "encodings",
    "site-packages",
    "dist-packages",
}


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


def training(docstrings: float = 1.0) -> str:
    """Text to train on: the calibration part and the docstrings of Python's standard library.

    A paragraph that shares a run of eight words with `evaluation` is left out (`overlaps`), a paragraph that comes again
    too. Parsing the library takes some seconds.

    Args:
      docstrings: the share of their paragraphs to take, evenly spread, in 0..1.
    """
    if not 0 <= docstrings <= 1:
        raise ValueError(f"docstrings must be a share in 0..1, got {docstrings}")
    seen: set[str] = set()
    held_out = _runs(_words(evaluation()))

    def fresh(paragraphs: Iterable[str]) -> list[str]:
        kept = []
        for paragraph in paragraphs:
            words = _words(paragraph)
            key = " ".join(words)
            if words and key not in seen and held_out.isdisjoint(_runs(words)):
                seen.add(key)
                kept.append(paragraph)
        return kept

    reference = fresh(_parts()[1])
    found = fresh(p for text in _docstrings() for p in text.split("\n\n")) if docstrings else []
    # the i-th is taken where the running count of taken ones steps up
    spread = [p for i, p in enumerate(found) if int((i + 1) * docstrings) > int(i * docstrings)]
    return "\n\n".join(reference + spread)


def overlaps(text: str, other: str) -> int:
    """How many runs of eight words ``text`` has that are in ``other`` too; case and punctuation do not count.

    >>> overlaps("one two three four five six seven eight", "so One, two three four five six - seven eight!")
    1
    """
    return len(_runs(_words(text)) & _runs(_words(other)))


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _runs(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)}


def _docstrings() -> Iterator[str]:
    """The docstrings of the standard library, file by file in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if _NO_PROSE.isdisjoint(file.relative_to(root).parts):
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue  # templates and deliberately broken files
            # docstrings stand in the bodies of definitions: expressions need not be walked
            todo: list[ast.AST] = [tree]
            while todo:
                node = todo.pop()
                if isinstance(
                    node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                ):
                    found = ast.get_docstring(node)
                    if found:
                        yield found
                    todo.extend(reversed(node.body))


def _parts() -> tuple[list[str], list[str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise ValueError(
            "this Python lacks pydoc_data, the default text: name a text file instead"
        ) from e
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

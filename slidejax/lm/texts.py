"""English text that every machine with Python has: the language reference, and docstrings.

The reference is the text that `help()` shows. It is part of the standard library
(`pydoc_data.topics`) and differs from version to version of Python, so a figure that was measured
on it should name the version (`source`). It is divided into two disjoint parts, one to evaluate on
and one to calibrate on. The text to train on (`training`) shares not even eight words in a row with
the part to evaluate on.

Beside the reference there is a text that ships with the package (`shipped`), which `slidejax
convert` calibrates on: prose of many kinds and code, written for this project.
"""

from __future__ import annotations

import ast
import platform
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

__all__ = [
    "WINDOW",
    "calibration",
    "evaluation",
    "openings",
    "overlaps",
    "shipped",
    "source",
    "training",
]

# A text is evaluated in windows of this many predictions, unless the caller says otherwise.
WINDOW = 512

# A paragraph that shares this many words in a row with the evaluation text is not trained on.
_RUN = 8
# These parts of the standard library have docstrings that are hardly prose, or are far too large.
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
    """A name of the text, for tables.

    >>> source().startswith("Python 3")
    True
    """
    version = ".".join(platform.python_version_tuple()[:2])
    return f"Python {version} language reference (pydoc_data.topics)"


def evaluation() -> str:
    """The part to evaluate on: about a quarter of the topics, without repeated paragraphs."""
    return "\n\n".join(_parts()[0])


def shipped() -> str:
    """The text that ships with the package to calibrate on: about 130,000 characters.

    Prose of many kinds (stories, letters, news, plays, conversations, contracts and licences,
    lists, mathematics), code in several languages, and pages of manuals take turns, so that its
    beginning holds some of each. It was written for this project and has its licence. It shares no
    eight words in a row with `evaluation`.

    >>> shipped().startswith("The ferry left the island")
    True
    """
    return (resources.files("slidejax") / "data" / "calibration.txt").read_text(encoding="utf-8")


def openings() -> list[str]:
    """The first words of texts of many kinds, for a model to go on with: 150 of them.

    Licences, contracts, plays, chats, lists, letters, news, science, mathematics, stories, manuals,
    data and programs in several languages. They were written for this project and have its licence.
    A model that calibrates on what it writes itself so sees more kinds of text than the text that
    ships has (`slidejax convert --sample`).

    >>> openings()[2]
    'The Apache License, Version 2.0, section 1. Definitions.'
    """
    text = (resources.files("slidejax") / "data" / "openings.txt").read_text(encoding="utf-8")
    return [line.replace("\\n", "\n") for line in text.splitlines()]


def calibration() -> str:
    """The part to calibrate on: the other topics, without the paragraphs of `evaluation`."""
    return "\n\n".join(_parts()[1])


def training(docstrings: float = 1.0) -> str:
    """Text to train on: the calibration part and the docstrings of Python's standard library.

    A paragraph is left out if it shares eight words in a row with `evaluation` (`overlaps`), or if
    it came before. Parsing the library takes some seconds.

    Args:
      docstrings: the share of the docstrings' paragraphs to take, from 0 to 1. They are spread
        evenly over the library.

    Raises:
      ValueError: if the share is not from 0 to 1.
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
    # Paragraph i is taken if the number of taken paragraphs grows at i.
    spread = [p for i, p in enumerate(found) if int((i + 1) * docstrings) > int(i * docstrings)]
    return "\n\n".join(reference + spread)


def overlaps(text: str, other: str, words: int = _RUN) -> int:
    """The number of different runs of words that are in both texts.

    Case and punctuation do not count.

    Args:
      text, other: the texts.
      words: the length of a run.

    >>> text = "one two three four five six seven eight"
    >>> overlaps(text, "so One, two three four five six - seven eight!")
    1
    """
    return len(_runs(_words(text), words) & _runs(_words(other), words))


def _words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _runs(words: list[str], length: int = _RUN) -> set[tuple[str, ...]]:
    """All runs of this number of words."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def _docstrings() -> Iterator[str]:
    """The docstrings of the standard library, file by file in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if _NO_PROSE.isdisjoint(file.relative_to(root).parts):
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue  # Some files are templates, or broken on purpose.
            # Docstrings stand in the bodies of definitions, so expressions need not be walked.
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
    """The paragraphs of `evaluation` and of `calibration`."""
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise ValueError(
            "this Python lacks pydoc_data, the default text: name a text file instead"
        ) from e
    # A hash of its name decides the side of a topic, which so keeps its side when others come or
    # go. Topics quote each other at length. A paragraph therefore counts only where it first
    # appears, and the evaluation part, which comes first, shares none with the calibration part.
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

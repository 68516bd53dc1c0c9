"""The tokenizer of a Hugging Face directory, whichever version of transformers wrote it.

The file that counts is tokenizer.json. tokenizer_config.json, special_tokens_map.json,
generation_config.json and config.json only say which tokens are special, and chat_template.jinja or
tokenizer_config.json has the chat template. Classes that these files name are not looked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidejax.checkpoint.staging import CHAT_TEMPLATES, TEXT_FILES
from slidejax.files import CHECKSUM, check_json, read_whole, reading
from slidejax.lm.text import gguf
from slidejax.lm.text.tokenizer import SPECIAL, Tokenizer, need_tokenizers

if TYPE_CHECKING:
    import tokenizers

__all__ = ["TEXT_FILES", "check", "from_files", "gather", "is_text_file", "read", "text_files"]

# The files of a tokenizer, beside the templates in additional_chat_templates/.
_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
)

# These kinds of tokenizers begin a text with its start token unless they are told otherwise.
_STARTING = ("Llama", "CodeLlama", "Gemma")

# Vocabularies that need another package, by their names.
_OTHERS = {
    "tokenizer.model": "a SentencePiece or tiktoken model",
    "tekken.json": "a tekken vocabulary",
    "vocab.json": "a vocabulary whose merges are in another file",
}


def read(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of a directory, `from_files(gather(folder))`.

    Args:
      folder: a directory with tokenizer.json and the files beside it.

    Returns:
      The tokenizer, or None if the directory has none of any kind.

    Raises:
      ValueError: a file is damaged, or files contradict each other; the file is named.
      NotImplementedError: there is a tokenizer, but no tokenizer.json.

    >>> import tempfile
    >>> from slidejax.lm.text.examples import byte_tokenizer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     byte_tokenizer().save(folder)
    ...     read(folder).encode("hi")
    [256, 104, 105]
    """
    return from_files(gather(folder), os.fspath(folder))


def gather(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """The files of a directory that belong to its tokenizer, by their names."""
    return _contents(Path(folder), (*_NAMES, *_OTHERS))


def text_files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """The files of a directory that go with a model's parameters, by their names.

    Raises:
      OSError, ValueError: naming it, if one cannot be read, such as a link to nothing, or is larger
        than any such file.
    """
    return _contents(Path(folder), TEXT_FILES)


def is_text_file(name: str) -> bool:
    """Whether a file of this name goes with a model's parameters.

    >>> is_text_file("tokenizer.json"), is_text_file("additional_chat_templates/rag.jinja")
    (True, True)
    >>> is_text_file("modeling_llama.py"), is_text_file("additional_chat_templates/../a.jinja")
    (False, False)
    """
    folder, _, template = name.rpartition("/")
    if folder != CHAT_TEMPLATES:
        return name in TEXT_FILES
    return template == Path(template).name and Path(template).suffix == ".jinja"


def _contents(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Contents by name, with the templates; their names have `/`."""
    paths = [folder / name for name in names]
    if (folder / CHAT_TEMPLATES).is_dir():
        paths += sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))
    # A file that is there and cannot be read is not missing: without it, texts have other tokens.
    paths = [path for path in paths if os.path.lexists(path)]
    return {path.relative_to(folder).as_posix(): read_whole(path) for path in paths}


def check(names: Collection[str], where: str = "") -> None:
    """Looks at the names of a directory's files only, before anything is read.

    Raises:
      NotImplementedError: there is a tokenizer, but no tokenizer.json.
    """
    if "tokenizer.json" in names or gguf.FILE in names:
        return
    for name, kind in _OTHERS.items():
        if name in names:
            raise NotImplementedError(
                f"{os.path.join(where, name)!r} is {kind}, and there is no tokenizer.json beside "
                "it: save the tokenizer with a version of transformers that writes tokenizer.json"
            )


def from_files(
    files: Mapping[str, bytes], where: str = "", ends: Iterable[int] = ()
) -> Tokenizer | None:
    """The tokenizer out of the contents of files.

    Args:
      files: contents by name, as `gather` gives them; or those of a GGUF file's tokenizer, a JSON
        object under the name `gguf.FILE`.
      where: the directory, for errors.
      ends: the tokens that end a text where no file says it.

    Returns:
      The tokenizer, or None if there is none of any kind.

    Raises:
      ValueError, NotImplementedError: as `read`.
    """
    folder = _Folder(files, where)
    if gguf.FILE in files:
        with reading(os.path.join(where, gguf.FILE)):
            return gguf.from_metadata(_metadata(folder), folder.name(gguf.FILE))
    check(files, where)
    if "tokenizer.json" not in files:
        return None
    with reading(os.path.join(where, "tokenizer.json")):
        return _from_folder(folder, ends)


def _metadata(folder: _Folder) -> dict[str, Any]:
    """The metadata of a GGUF file's tokenizer, which slidejax keeps with a checksum."""
    values = folder.json(gguf.FILE)
    unknown = [k for k in values if k != CHECKSUM and not k.startswith("tokenizer.")]
    if unknown:
        raise ValueError(f"{folder.name(gguf.FILE)} has a key {unknown[0]!r:.80}")
    if CHECKSUM in values:  # the first versions wrote none
        check_json(values, os.path.join(folder.where, gguf.FILE))
        del values[CHECKSUM]
    return values


def _from_folder(folder: _Folder, ends: Iterable[int]) -> Tokenizer:
    about = folder.json("tokenizer_config.json")
    backend = _backend(folder)
    named = _named(folder, about)
    _add_tokens(backend, about, named, folder.name("tokenizer_config.json"))
    start = _start(backend, about, named, folder.name("tokenizer_config.json"))
    found = _ends(folder) or set(ends)
    if "eos_token" in named:
        found.add(backend.token_to_id(named["eos_token"]))
    return Tokenizer(
        backend,
        start=start,
        ends=found,
        named=named,
        templates=_templates(folder, about),
        where=folder.name("tokenizer.json"),
    )


class _Folder:
    """Contents of files, with errors that name them."""

    def __init__(self, files: Mapping[str, bytes], where: str):
        self.files, self.where = files, where

    def name(self, file: str) -> str:
        return repr(os.path.join(self.where, file))

    def text(self, file: str) -> str:
        try:
            return self.files[file].decode("utf-8")
        except ValueError as e:
            raise ValueError(f"{self.name(file)} is not a text file in UTF-8: {e}") from e

    def json(self, file: str) -> dict[str, Any]:
        """A JSON object; empty if there is no such file."""
        if file not in self.files:
            return {}
        try:
            value = json.loads(self.files[file])
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{self.name(file)} is damaged: {e}") from e
        if not isinstance(value, dict):
            raise ValueError(f"{self.name(file)} must hold a JSON object, got {value!r:.80}")
        return value


def _backend(folder: _Folder) -> tokenizers.Tokenizer:
    package = need_tokenizers()
    text, name = folder.text("tokenizer.json"), folder.name("tokenizer.json")
    _check_ids(folder.json("tokenizer.json"), name)
    try:
        return package.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # it is written in Rust, whose panics are no `Exception`
        raise ValueError(f"{name} is damaged or of an unknown version: {e}") from e


def _check_ids(content: Mapping[str, Any], name: str) -> None:
    """Raises a ValueError for token ids far above the number of tokens.

    The package tokenizers takes memory for all ids below the largest one, and ends the process if
    there is too little.
    """
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, Mapping) else []
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, Mapping)]
    known = len(vocabulary) if isinstance(vocabulary, (Mapping, list)) else 0
    most = 2 * (known + len(ids)) + 100_000
    for token in ids:
        if type(token) is not int or not 0 <= token < most:
            raise ValueError(f"{name} has a token with the id {token!r:.50}, and {known} tokens")


# --- special tokens -------------------------------------------------------------------------------


def _content(token: Any, what: str) -> str:
    """The text of a token, which is written as text or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        raise ValueError(f"{what} must be text or an object with content, got {token!r}")
    return text


def _named(folder: _Folder, about: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens, `{"eos_token": "</s>", …}`."""
    found = {}
    maps = {"special_tokens_map.json": folder.json("special_tokens_map.json")}
    for file, values in {**maps, "tokenizer_config.json": about}.items():  # the later one counts
        for name in SPECIAL:
            if values.get(name) is not None:
                found[name] = _content(values[name], f"{folder.name(file)}: {name}")
    return found


def _add_tokens(
    backend: tokenizers.Tokenizer, about: Mapping[str, Any], named: Mapping[str, str], file: str
) -> None:
    """Adds tokens that only tokenizer_config.json names, as transformers does."""
    from tokenizers import AddedToken

    table = about.get("added_tokens_decoder") or {}
    if not isinstance(table, Mapping) or not all(k.isdecimal() for k in table):
        raise ValueError(f"{file}: added_tokens_decoder must map ids to tokens")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for key, token in sorted(table.items(), key=lambda item: int(item[0])):
        text = _content(token, f"{file}: added_tokens_decoder[{key}]")
        if text not in known:
            flags = token if isinstance(token, Mapping) else {}
            names = ("lstrip", "rstrip", "normalized", "single_word", "special")
            backend.add_tokens(
                [AddedToken(text, **{n: bool(flags[n]) for n in names if n in flags})]
            )
        if backend.token_to_id(text) != int(key):
            raise ValueError(
                f"{file} says that {text!r} is token {key}, and tokenizer.json says "
                f"{backend.token_to_id(text)}"
            )
    more: list[Any] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        values = about.get(name) or []
        if not isinstance(values, (list, Mapping)):  # the letters of a text would become tokens
            raise ValueError(f"{file}: {name} must be a list of tokens, got {values!r:.80}")
        more += values.values() if isinstance(values, Mapping) else values
    special = [*named.values(), *(_content(t, f"{file}: special tokens") for t in more)]
    flagged = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    missing = [text for text in dict.fromkeys(special) if text not in flagged]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in missing])


def _start(
    backend: tokenizers.Tokenizer, about: Mapping[str, Any], named: Mapping[str, str], file: str
) -> tuple[int, ...]:
    """The tokens that begin every text in use.

    An explicit `add_bos_token` counts, else what the post-processor of tokenizer.json puts in
    front. The tokenizers of Llama and Gemma put the start token there unless they are told
    otherwise.
    """
    asked = about.get("add_bos_token")
    template = _prefix(backend)
    if asked is None and not template:
        asked = str(about.get("tokenizer_class")).startswith(_STARTING) and "bos_token" in named
    if asked is None or (asked and template):
        return template
    if not asked:
        return ()
    if "bos_token" not in named:
        raise ValueError(f"{file} asks for add_bos_token and names no bos_token")
    return (backend.token_to_id(named["bos_token"]),)


def _prefix(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The tokens that the post-processor puts before a text."""
    probe = "a"
    bare = backend.encode(probe, add_special_tokens=False).ids
    whole = backend.encode(probe, add_special_tokens=True).ids
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return tuple(whole[:at])
    return ()


def _ends(folder: _Folder) -> set[int]:
    """The tokens that end a text, by generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        values = folder.json(name)
        nested = values.get("text_config")
        ids = values.get("eos_token_id")
        if ids is None and isinstance(nested, Mapping):
            ids = nested.get("eos_token_id")
        if ids is None:
            continue
        ids = list(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
        if not all(type(i) is int for i in ids):
            raise ValueError(
                f"{folder.name(name)}: eos_token_id must be a token id or a list, got {ids!r}"
            )
        return {i for i in ids if i >= 0}  # a negative one stands for none
    return set()


# --- chat templates -------------------------------------------------------------------------------


def _templates(folder: _Folder, about: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name."""
    file = folder.name("tokenizer_config.json")
    value = about.get("chat_template")
    found: dict[str, Any] = {}
    if isinstance(value, str):
        found["default"] = value
    elif isinstance(value, list) and all(isinstance(t, Mapping) for t in value):
        found = {str(t.get("name")): t.get("template") for t in value}
    elif value is not None:
        raise ValueError(f"{file}: chat_template must be text or a list of templates")
    for name, template in found.items():
        if not isinstance(template, str):
            raise ValueError(f"{file}: chat template {name!r} must be text, got {template!r:.80}")
    for path in folder.files:
        if path == "chat_template.jinja":
            found["default"] = folder.text(path)
        elif path.startswith(f"{CHAT_TEMPLATES}/"):
            found[Path(path).stem] = folder.text(path)
    return found

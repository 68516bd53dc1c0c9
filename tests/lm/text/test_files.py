"""Tokenizers of directories, as transformers 4 and 5 write them."""

import json

import pytest
from text_examples import sentence_piece

from slidejax.lm.text.examples import byte_tokenizer
from slidejax.lm.text.files import from_files, read

tokenizers = pytest.importorskip("tokenizers")


def folder(tmp_path, backend=None, **files):
    """A directory with tokenizer.json and other files; `__` in a name stands for a dot."""
    backend = byte_tokenizer("<a>", "<b>").backend if backend is None else backend
    values = {"tokenizer__json": json.loads(backend.to_str()), **files}
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / name.replace("__", ".")).write_text(text)
    return tmp_path


def with_start():
    backend = byte_tokenizer("<a>", "<b>").backend
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return backend


NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("about", "template", "start"),
    [
        ({}, False, ()),
        ({}, True, (256,)),  # tokens after the text are left out
        ({"add_bos_token": True}, False, (256,)),
        ({"add_bos_token": True}, True, (256,)),
        ({"add_bos_token": False}, True, ()),
        ({"add_bos_token": None}, True, (256,)),
        ({"tokenizer_class": "LlamaTokenizerFast"}, False, (256,)),
        ({"tokenizer_class": "GemmaTokenizer"}, False, (256,)),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False, ()),
        ({"tokenizer_class": "Qwen2Tokenizer"}, False, ()),
    ],
)
def test_the_start_of_a_text_is_that_in_use(tmp_path, about, template, start):
    backend = with_start() if template else None
    tokenizer = read(folder(tmp_path, backend, tokenizer_config__json={**NAMED, **about}))
    assert tokenizer.start == start
    assert tokenizer.encode("hi") == [*start, 104, 105]


@pytest.mark.parametrize(
    "about",
    [
        {"tokenizer_class": "TokenizersBackend"},
        {"extra_special_tokens": ["<a>"]},
        {"extra_special_tokens": {"image_token": "<a>"}},
        {"additional_special_tokens": ["<a>", {"content": "<b>"}]},
        {"bos_token": {"content": "<s>", "lstrip": False, "__type": "AddedToken"}},
        {"auto_map": {"AutoTokenizer": ["code.Class", None]}, "tokenizer_class": "Class"},
        {"backend": "tokenizers", "is_local": True, "model_max_length": 10**30},
    ],
)
def test_every_version_of_transformers_can_have_written_it(tmp_path, about):
    tokenizer = read(folder(tmp_path, with_start(), tokenizer_config__json={**NAMED, **about}))
    assert tokenizer.encode("hi<a>") == [256, 104, 105, 258]
    assert tokenizer.bos_token_id == 256 and tokenizer.is_special(258)


def test_special_tokens_map_is_read_where_tokenizer_config_does_not_say(tmp_path):
    path = folder(
        tmp_path,
        special_tokens_map__json={"eos_token": {"content": "<a>"}, "pad_token": "<b>"},
        tokenizer_config__json={"eos_token": "</s>", "unk_token": None},
    )
    assert read(path).named == {"eos_token": "</s>", "pad_token": "<b>"}


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, {257}),
        ({"generation_config__json": {"eos_token_id": [258, 259]}}, {257, 258, 259}),
        ({"generation_config__json": {"eos_token_id": 258}}, {257, 258}),
        ({"config__json": {"eos_token_id": [258]}}, {257, 258}),
        ({"config__json": {"eos_token_id": [-1, 258]}}, {257, 258}),
        ({"config__json": {"text_config": {"eos_token_id": 259}}}, {257, 259}),
        (
            {"generation_config__json": {"eos_token_id": 258}, "config__json": {"eos_token_id": 1}},
            {257, 258},
        ),
        (
            {"generation_config__json": {"top_p": 0.5}, "config__json": {"eos_token_id": 1}},
            {1, 257},
        ),
    ],
)
def test_all_tokens_that_end_a_text(tmp_path, files, ends):
    assert read(folder(tmp_path, tokenizer_config__json=NAMED, **files)).ends == ends


def test_ends_that_only_the_caller_knows():
    files = {"tokenizer.json": byte_tokenizer().backend.to_str().encode()}
    assert from_files(files, ends=(7, 8)).ends == {7, 8}
    assert from_files({}) is None


def test_tokens_that_only_tokenizer_config_names_are_added(tmp_path):
    table = {
        "260": {"content": "<new>", "special": True},
        "261": {"content": "new", "special": False},
    }
    path = folder(tmp_path, tokenizer_config__json={"added_tokens_decoder": table})
    tokenizer = read(path)
    assert tokenizer.encode("<new>new") == [260, 261] and tokenizer.decode([260, 261]) == "new"
    wrong = {"added_tokens_decoder": {"300": {"content": "<new>"}}}
    with pytest.raises(ValueError, match=r"'<new>' is token 300, and tokenizer\.json says 260"):
        read(folder(tmp_path, tokenizer_config__json=wrong))


def test_where_a_chat_template_can_be(tmp_path):
    assert read(folder(tmp_path)).templates == {}
    path = folder(tmp_path, tokenizer_config__json={"chat_template": "one"})
    assert read(path).templates == {"default": "one"}
    several = [{"name": "default", "template": "two"}, {"name": "../up", "template": "three"}]
    path = folder(tmp_path, tokenizer_config__json={"chat_template": several})
    assert read(path).templates == {"default": "two", "../up": "three"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("five")
    path = folder(tmp_path, chat_template__jinja="four é")
    assert read(path).templates == {"default": "four é", "../up": "three", "tools": "five"}


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_tokenizers_of_other_packages_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(NotImplementedError, match=f"{name}.*no tokenizer.json"):
        read(tmp_path)
    (tmp_path / name).unlink()
    assert read(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer__json": "{"}, "tokenizer.json"),
        ({"tokenizer__json": {"version": "9"}}, "tokenizer.json"),
        ({"tokenizer__json": []}, "tokenizer.json"),
        ({"tokenizer_config__json": "[1]"}, "tokenizer_config.json"),
        ({"tokenizer_config__json": "[" * 100000}, "tokenizer_config.json"),
        ({"tokenizer_config__json": {"bos_token": 3}}, "bos_token"),
        ({"tokenizer_config__json": {"add_bos_token": True}}, "add_bos_token"),
        ({"tokenizer_config__json": {"chat_template": 3}}, "chat_template"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "x"}]}}, "chat template 'x'"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"x": "y"}}}, "added_tokens_decoder"),
        ({"tokenizer_config__json": {"additional_special_tokens": "ab"}}, "must be a list of"),
        ({"tokenizer_config__json": {"extra_special_tokens": 3}}, "must be a list of"),
        ({"generation_config__json": {"eos_token_id": "2"}}, "generation_config.json"),
        ({"special_tokens_map__json": "nul"}, "special_tokens_map.json"),
    ],
)
def test_damaged_files_are_one_error_that_names_them(tmp_path, files, named):
    with pytest.raises(ValueError, match=named):
        read(folder(tmp_path, **files))


def test_a_text_in_no_utf8_is_named(tmp_path):
    path = folder(tmp_path)
    (path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja"):
        read(path)


def test_a_file_of_a_gguf_tokenizer_is_read(tmp_path):
    from slidejax.lm.text import gguf

    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<s>", "▁", "a", "▁a"],
        "tokenizer.ggml.scores": [0, -2, -3, -1],
        "tokenizer.ggml.token_type": [3, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 0,
    }
    assert from_files({gguf.FILE: json.dumps(keys).encode()}).encode("a") == [0, 3]
    assert sentence_piece().encode("a")[0] == 1

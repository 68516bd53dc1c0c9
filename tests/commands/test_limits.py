"""Values that do not fit a model are refused before its weights are read."""

import json
import shutil

import pytest

pytest.importorskip("rich")
pytest.importorskip("optax")

from command_line import SENTENCES, error, run, write_decoder

import slidejax as sj
import slidejax.lm.reading
from slidejax.lm import Decoder
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.decoder.files import load_head
from slidejax.lm.reading import read_head, read_model
from slidejax.lm.text.examples import byte_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models whose context is 64 tokens, and texts; tests only read them."""
    folder = tmp_path_factory.mktemp("limits")
    model = sj.lm.load(write_decoder(folder))
    sj.lm.save(sj.lm.convert(model, "6:8"), folder / "sparse")
    larger = tiny(vocab_size=300, max_positions=64)
    sj.lm.save(Decoder(larger.config, larger.params, files=model.files), folder / "larger")
    sj.lm.save(Decoder(model.config, model.params), folder / "mute")
    (folder / "text").write_text(SENTENCES * 8)
    (folder / "short").write_text("a")
    problem = {"task_id": "HumanEval/0", "prompt": "a" * 40, "entry_point": "f", "test": "x"}
    (folder / "problems").write_text(json.dumps(problem) + "\n")
    return folder


HUMANEVAL = "--task humaneval --run-generated-code --problems {0}/problems"
RECOVER = "--text {0}/text --against {0}/model --steps 1"
REFUSED = {
    "generate {0}/model --prompt a --max-new-tokens 63": (
        "--prompt has 2 tokens; with --max-new-tokens 63 they exceed the model's context of 64"
    ),
    "generate {0}/sparse --prompt " + "a" * 70: "--prompt has 71 tokens, more than the",
    "generate {0}/mute --prompt a": "the model came without a tokenizer",
    "generate {0}/model --chat --prompt a": "chat template",
    "eval {0}/model {0}/larger --text {0}/text": "models must share one vocabulary",
    "eval {0}/model --against {0}/larger --text {0}/text": "models must share one vocabulary",
    "eval {0}/model {0}/none --text {0}/text": "no model",
    "eval {0}/model --text {0}/short": "at least two are needed",
    "eval {0}/mute --text {0}/text": "came without a tokenizer",
    "eval {0}/model --text {0}/text --prompt a --max-new-tokens 63": "--prompt has 2 tokens; with",
    "eval {0}/model " + HUMANEVAL: "problem 'HumanEval/0' has 41 tokens; with --max-new-tokens 256",
    "eval {0}/model {0}/none --max-new-tokens 8 " + HUMANEVAL: "no model",
    "eval {0}/mute --max-new-tokens 8 " + HUMANEVAL: "the model came without a tokenizer",
    "recover {0}/model {0}/new " + RECOVER: "has no packed weights: nothing to recover",
    "recover {0}/sparse {0}/new --against {0}/sparse2 --text {0}/text": "is converted too",
    "recover {0}/sparse {0}/new --against {0}/larger --text {0}/text": "a vocabulary of 300 tokens",
    "recover {0}/sparse {0}/new --against {0}/none --text {0}/text": "no model",
    "recover {0}/sparse {0}/new --window 1 " + RECOVER: "--window must be from 2 to",
    "recover {0}/sparse {0}/new --batch 500 " + RECOVER: "--batch must be at most",
    "demo {0}/model --max-new-tokens 63 --prompt a": "--prompt has 2 tokens; with",
    "demo {0}/model --prompt a --max-new-tokens 4 --text {0}/short": "at least two are needed",
    "convert {0}/sparse {0}/new --data-free": "is converted already",
}


@pytest.mark.parametrize("command", REFUSED, ids=lambda command: command.format("")[:60])
def test_limits_of_a_model_are_told_before_its_weights_are_read(
    capsys, monkeypatch, files, command
):
    if not (files / "sparse2").exists():
        shutil.copytree(files / "sparse", files / "sparse2")

    def read(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr("slidejax.checkpoint.store.load", read)
    said = error(capsys, *command.format(files).split())
    assert REFUSED[command] in said, said
    assert not (files / "new").exists()


@pytest.mark.parametrize("name", ["model", "sparse", "mute"])
def test_a_head_is_the_model_without_its_weights(files, name):
    head, whole = read_head(files / name), read_model(files / name)
    assert head.model.config == whole.model.config and head.about == whole.about
    assert head.model.files == whole.model.files and head.start == whole.start
    assert (head.name, head.path) == (whole.name, whole.path)
    assert head.packed == (name == "sparse") and load_head(files / name)[1] == head.packed


def test_results_of_one_model_are_not_lost_if_the_next_one_fails(capsys, monkeypatch, files):
    """HumanEval takes hours for each model."""
    from slidejax.lm.tasks import humaneval

    made, whole = [], humaneval.evaluate

    def second_fails(*args, **options):
        if made:
            raise ValueError("the model computes nan")
        made.append(1)
        return whole(*args, **options)

    monkeypatch.setattr(humaneval, "evaluate", second_fails)
    flags = [*HUMANEVAL.format(files).split(), "--samples", "0", "--max-new-tokens", "2"]
    status, out, err = run(capsys, "eval", files / "model", files / "sparse", *flags, "--json")
    assert status == 1 and "the model computes nan" in err
    assert json.loads(out)["problems"] == 1


def test_the_byte_tokenizer_begins_texts():
    """The numbers of tokens above count on it."""
    assert len(byte_tokenizer().start) == 1

"""`slidejax eval` of several models: the table, the JSON, the picture."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import SENTENCES, run, write_files

from slidejax.huggingface import write_pretrained
from slidejax.lm import comparison

TEXT = SENTENCES * 2


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_directory):
    return write_files(tmp_path_factory.mktemp("compared"), tiny_directory, "6:8", TEXT)


def test_side_by_side(capsys, files):
    dense, out, text = files / "dense", files / "out", files / "text.txt"
    options = ["--text", text, "--window", 64, "--against", dense]
    status, said, _ = run(
        capsys, "eval", dense, out, *options, "--json", "--plot", files / "picture.png"
    )
    both = json.loads(said)
    assert status == 0 and [(row["pattern"], row["dtype"]) for row in both] == [
        ("original", "float32"),
        ("6:8", "float8_e4m3fn+int8"),
    ]
    _, said, _ = run(capsys, "eval", out, *options, "--json")
    assert json.loads(said) == both[1]
    assert both[0]["top1_agreement"] == 1 and both[0]["kl"] < 1e-6 < both[1]["kl"]
    assert (files / "picture.png").read_bytes().startswith(b"\x89PNG")
    _, said, _ = run(capsys, "eval", dense, out, *options)
    ratio = both[1]["perplexity"] / both[0]["perplexity"]
    assert f"{ratio:.4f}" in said and "1.0000" in said and f"{both[1]['perplexity']:.3f}" in said


def test_each_model_continues_the_prompt(capsys, files):
    options = [
        "--text",
        files / "text.txt",
        "--window",
        64,
        "--tokens",
        64,
        "--prompt",
        "The [moon]",
        "--max-new-tokens",
        7,
    ]
    models = [files / "dense", files / "out"]
    _, said, _ = run(capsys, "eval", *models, *options, "--json")
    rows = json.loads(said)
    for model, row in zip(models, rows, strict=True):
        _, said, _ = run(
            capsys, "generate", model, "--prompt", "The [moon]", "--max-new-tokens", 7, "--json"
        )
        assert (row["prompt"], row["written"]) == ("The [moon]", json.loads(said)["text"])
    status, said, _ = run(capsys, "eval", *models, *options)
    assert status == 0 and said.count("The [moon]") == 2 and "(6:8 float8_e4m3fn+int8)" in said
    status, _, err = run(capsys, "eval", models[0], *options[:-1], 1000)
    assert status == 1 and "exceed" in err


def test_the_picture_of_one_model(capsys, files):
    pytest.importorskip("matplotlib")
    assert (
        run(
            capsys,
            "eval",
            files / "dense",
            "--text",
            files / "text.txt",
            "--plot",
            files / "one.svg",
        )[0]
        == 0
    )
    assert "<svg" in (files / "one.svg").read_text()
    text, bad = files / "text.txt", files / "one.bad"
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "eval", files / "dense", "--text", text, "--plot", bad)
    assert "--plot" in (err := capsys.readouterr().err) and "one.bad" in err


def test_other_tokenizers_are_refused(capsys, files, tiny_llama, tiny_tokenizer):
    import copy

    import tokenizers

    other = copy.deepcopy(tiny_tokenizer)
    other.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    write_pretrained(files / "other", tiny_llama, other)
    status, _, err = run(
        capsys, "eval", files / "dense", files / "other", "--text", files / "text.txt"
    )
    assert status == 1 and "another tokenizer" in err


def test_losses_by_position():
    losses = np.arange(20, dtype=np.float32) % 8  # the loss is the position
    centres, means = comparison._by_position(losses, 8)
    np.testing.assert_allclose(centres, means + 1)
    assert centres[0] == 1 and centres[-1] <= 8

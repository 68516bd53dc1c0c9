"""`slidejax generate` on a tiny model, in process."""

import json
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import error, output


def test_generate_takes_every_kind_of_model(capsys, model, out):
    for path in (model, out):
        got = json.loads(
            output(capsys, "generate", path, "--prompt", "abc", "--max-new-tokens", "4", "--json")
        )
        assert got["prompt"] == "abc" and 1 <= got["tokens"] <= 4 and got["tokens_per_second"] > 0
    assert output(capsys, "generate", model, "--prompt", "abc", "--max-new-tokens", "4").startswith(
        "abc"
    )
    again = json.loads(
        output(capsys, "generate", out, "--prompt", "abc", "--max-new-tokens", "4", "--json")
    )
    assert again["text"] == got["text"]


def test_a_damaged_model_is_one_line(capsys, tmp_path, out):
    damaged = shutil.copytree(out, tmp_path / "damaged")
    file = damaged / "slidejax.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "slidejax.safetensors" in error(capsys, "generate", str(damaged))

"""`slidejax eval` of one model; tests/lm/test_comparison.py has several."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import SENTENCES, output

from slidejax.lm.evaluate import evaluate
from slidejax.lm.models import load_model

TEXT = SENTENCES * 2


def test_eval_prints_one_object(capsys, text, model, out):
    dense = json.loads(output(capsys, "eval", model, "--text", text, "--window", "64", "--json"))
    sparse = json.loads(
        output(capsys, "eval", out, "--text", text, "--window", "64", "--against", model, "--json")
    )
    loaded = load_model(model)
    expected = evaluate(loaded.model, loaded.encode(TEXT), window=64)
    assert dense["tokens"] == sparse["tokens"] == len(loaded.encode(TEXT)) - 1
    assert dense["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert dense["next_token_accuracy"] == pytest.approx(expected.next_token_accuracy)
    assert sparse["perplexity"] != dense["perplexity"] and sparse["pattern"] == "6:8"
    readable = output(capsys, "eval", model, "--text", text, "--tokens", "20", "--window", "8")
    assert "20 tokens" in readable and "perplexity" in readable

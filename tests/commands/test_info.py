"""`slidejax info`."""

import json

import jax
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import output


def test_info(capsys):
    facts = json.loads(output(capsys, "info", "--json"))
    assert facts["versions"]["jax"] == jax.__version__
    assert set(facts["implementations"]) == {
        "decode",
        "hopper",
        "cusparselt",
        "dense",
        "reference",
    }
    assert "dense" in output(capsys, "info")

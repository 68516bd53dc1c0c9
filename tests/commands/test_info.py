"""`slidejax info`."""

import json

import jax
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import output

import slidejax


def test_info(capsys):
    facts = json.loads(output(capsys, "info", "--json"))
    assert facts["versions"]["jax"] == jax.__version__
    assert tuple(facts["implementations"]) == slidejax.implementations()
    cases = {
        f"{dtype} {rows}" for dtype in ("int8", "float8_e4m3fn", "bfloat16") for rows in (1, 16)
    }
    assert all(set(by_case) == cases for by_case in facts["implementations"].values())
    assert set(facts["choice"]) == cases
    assert "dense" in output(capsys, "info")

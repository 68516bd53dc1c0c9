"""`slidejax demo` on a tiny model, in process."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import layers, output, packed_bytes


def test_demo_measures_every_row_on_the_same_tokens(capsys, tmp_path, model, text):
    file = tmp_path / "rows.json"
    options = [
        "--patterns",
        "6:8,dense",
        "--dtypes",
        "int8",
        "--tokens",
        "60",
        "--text",
        text,
        "--max-new-tokens",
        "4",
        "--prompt",
        "ab",
    ]
    said = output(capsys, "demo", model, *options, "--json", str(file))
    rows = json.loads(file.read_text())
    names = [(row["pattern"], row["dtype"]) for row in rows]
    sparse = [(p, "int8") for p in ("6:8", "dense")]
    assert names == [("original", "float32"), *sparse]
    assert {row["tokens"] for row in rows} == {60}
    assert all(
        row["tokens_per_second"] > 0 and 0 <= row["next_token_accuracy"] <= 1 for row in rows
    )
    # the linear layers of a block: q and o, k and v, gate, up and down
    weights = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 104
    by_name = dict(zip(names, rows, strict=True))
    assert by_name["original", "float32"]["bytes"] == 4 * weights
    for name, row in by_name.items():
        if name[1] == "int8":
            assert (
                row["bytes"] == sum(packed_bytes(name[0], 1, i, o) for i, o in layers())
                and row["convert_seconds"] > 0
            )
    assert "original float32: ab" in said and "6:8" in said and "60 tokens of" in said


def test_demo_of_a_converted_model_is_one_row(capsys, out, text):
    rows = json.loads(
        output(
            capsys, "demo", out, "--text", text, "--tokens", "40", "--max-new-tokens", "2", "--json"
        )
    )
    assert [(row["pattern"], row["dtype"]) for row in rows] == [("6:8", "float8_e4m3fn+int8")]

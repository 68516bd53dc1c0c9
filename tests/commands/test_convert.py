"""`slidejax convert` on a tiny model, in process."""

import json
import math
import warnings

import jax
import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import SENTENCES, error, layers, output, packed, packed_bytes, write_decoder

from slidejax import huggingface
from slidejax.lm import load
from slidejax.lm.models import load_model
from slidejax.rules import Rule
from slidejax.weights.packed import SlideWeight

FREE = ("--data-free",)  # no calibration, which takes a while


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("int8", "int8"), ("float8_e4m3fn", "float8_e4m3fn"), ("none", "float32")],
)
def test_convert_writes_what_convert_makes(capsys, tmp_path, model, dtype, expected):
    path = str(tmp_path / "out")
    said = output(capsys, "convert", model, path, "--pattern", "4:6", "--dtype", dtype, *FREE)
    assert "7 layers converted" in said
    loaded = load_model(path)
    qdtype = None if dtype == "none" else dtype
    direct = huggingface.convert(load_model(model).model, Rule("4:6", qdtype=qdtype))
    assert {w.dtype.name for w in packed(loaded.model.params)} == {expected}
    jax.tree.map(np.testing.assert_array_equal, loaded.model.params, direct.params)
    ids = np.arange(12)[None]

    def call(m):
        return jax.jit(lambda p: m(ids, params=p).logits)(m.params)

    np.testing.assert_array_equal(call(loaded.model), call(direct))
    assert loaded.about["pattern"] == "4:6" and loaded.about["source"] == "dense"


def test_a_model_is_quantised_only(capsys, tmp_path, model, text):
    """The pattern dense goes through every command, and counts as a conversion."""
    path, calibration = str(tmp_path / "out"), ["--calibration", text, "--sequences", "2"]
    said = output(
        capsys,
        "convert",
        model,
        path,
        "--pattern",
        "dense",
        "--method",
        "sparsegpt",
        "--dtype",
        "float8_e4m3fn",
        *calibration,
    )
    assert (
        "7 layers converted" in said
        and "dense float8_e4m3fn, sparsegpt" in said
        and "skipped: lm_head/kernel" in said
    )
    loaded = load_model(path)
    assert loaded.about["pattern"] == "dense" and {
        str(w.pattern) for w in packed(loaded.model.params)
    } == {"dense"}
    before, after = json.loads(
        output(capsys, "eval", model, path, "--text", text, "--window", "64", "--json")
    )
    assert [(row["pattern"], row["dtype"]) for row in (before, after)] == [
        ("original", "float32"),
        ("dense", "float8_e4m3fn"),
    ]
    assert (
        before["perplexity"] != after["perplexity"] == pytest.approx(before["perplexity"], rel=0.5)
    )
    [row] = json.loads(
        output(
            capsys,
            "demo",
            path,
            "--text",
            text,
            "--tokens",
            "40",
            "--max-new-tokens",
            "2",
            "--json",
        )
    )
    assert (row["pattern"], row["dtype"]) == ("dense", "float8_e4m3fn")
    assert row["bytes"] == sum(packed_bytes("dense", 1, i, o) for i, o in layers())
    assert "converted already" in error(
        capsys, "convert", path, str(tmp_path / "x"), "--pattern", "6:8"
    )
    output(
        capsys,
        "recover",
        path,
        str(tmp_path / "new"),
        "--against",
        model,
        "--text",
        text,
        "--window",
        "32",
        "--batch",
        "2",
        "--steps",
        "1",
    )
    assert {str(w.pattern) for w in packed(load_model(str(tmp_path / "new")).model.params)} == {
        "dense"
    }


def test_convert_chooses_a_pattern_for_each_layer(capsys, tmp_path, model):
    path = str(tmp_path / "mixed")
    said = output(
        capsys,
        "convert",
        model,
        path,
        "--pattern",
        "6:8",
        "--mixed",
        "14:16,6:8,4:6",
        "--sequences",
        "2",
        "--method",
        "magnitude",
    )
    assert (
        "7 layers converted" in said
        and "14:16, 6:8, 4:6 for the multiplications of 6:8 int8, magnitude" in said
    )
    weights = packed(load_model(path).model.params)
    chosen = {str(w.pattern) for w in weights}
    assert chosen <= {"14:16", "6:8", "4:6"} and len(chosen) > 1
    cost = sum(math.prod(w.shape) * w.pattern.expansion / 2 for w in weights)
    assert cost <= sum(math.prod(w.shape) for w in weights) * 0.75
    assert "--skip" in error(
        capsys,
        "convert",
        model,
        str(tmp_path / "x"),
        "--pattern",
        "6:8",
        "--mixed",
        "2:4",
        "--skip",
        "a",
    )


@pytest.mark.parametrize("flag", ["--skip", "--dense"])
def test_layers_can_be_skipped(capsys, tmp_path, model, flag):
    path = str(tmp_path / "out")
    output(capsys, "convert", model, path, "--pattern", "6:8", flag, ".*/self_attn/.*", *FREE)
    params = load_model(path).model.params
    assert len(packed(params)) == 3
    assert not isinstance(
        params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"], SlideWeight
    )


def dtypes_of(params):
    """Layer's name -> the dtypes of its kernels in the blocks of a Llama."""
    found = {}
    for block in params["model"]["layers"].values():
        for half in ("mlp", "self_attn"):
            for name, part in block[half].items():
                if isinstance(part, dict):
                    found.setdefault(name, set()).add(part["kernel"].dtype.name)
    return found


@pytest.mark.parametrize("flags", [(), ("--dtype", "8bit")])
def test_8_bit_is_e4m3_where_a_gate_makes_the_input(capsys, tmp_path, model, flags):
    out = str(tmp_path / "out")
    assert "6:8 8bit" in output(capsys, "convert", model, out, *flags, *FREE)
    loaded = load_model(out)
    dtypes = dtypes_of(loaded.model.params)
    assert dtypes.pop("down_proj") == {"float8_e4m3fn"}
    assert len(dtypes) == 6 and set().union(*dtypes.values()) == {"int8"}
    assert loaded.about["dtype"] == "8bit"


def test_the_dtype_of_a_layer_comes_before_8_bit(capsys, tmp_path):
    model, out = write_decoder(tmp_path, num_layers=2), str(tmp_path / "out")
    output(capsys, "convert", model, out, "--dtype-of", ".*/0/.*=int8", *FREE)
    assert dtypes_of(load(out).params)["down_proj"] == {"int8", "float8_e4m3fn"}


def test_8_bit_needs_no_layers_with_a_gate(capsys, tmp_path, model):
    """The rule for down projections may decide nothing, and nothing is said of it."""
    out, flags = str(tmp_path / "out"), ("--dtype-of", ".*down_proj.*=int8")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="slidejax: rules")
        assert "decided nothing" not in output(capsys, "convert", model, out, *flags, *FREE)
    assert set().union(*dtypes_of(load_model(out).model.params).values()) == {"int8"}


def test_a_choice_of_patterns_takes_8_bit_as_int8(capsys, tmp_path, model):
    out, flags = str(tmp_path / "out"), ("--mixed", "6:8,4:6", "--method", "magnitude")
    output(capsys, "convert", model, out, *flags, "--sequences", "1")
    loaded = load_model(out)
    assert {w.dtype.name for w in packed(loaded.model.params)} == {"int8"}
    assert loaded.about["dtype"] == "int8"


@pytest.mark.parametrize("streamed", [False, True])
def test_the_model_writes_some_of_the_calibration_text(capsys, tmp_path, model, streamed):
    model = write_decoder(tmp_path) if streamed else model
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES * 4)
    flags = ("--calibration", text, "--method", "wanda")
    kernels, length = [], 64 if streamed else 128  # positions
    for sampled in (0, 1, 1):
        out = tmp_path / f"out{len(kernels)}"
        rows = ("--sequences", 2 - sampled, "--sample", sampled)  # as many, so the same programs
        row = json.loads(output(capsys, "convert", model, out, *flags, *rows, "--json", "-"))
        assert row["sampled"] == sampled
        assert row["calibration"].startswith(f"{length * 2} tokens of")
        assert ("the model itself" in row["calibration"]) == bool(sampled)
        made = load(out) if streamed else load_model(str(out)).model
        kernels.append(np.asarray(packed(made.params)[0].values))
    assert not np.array_equal(kernels[0], kernels[1])
    np.testing.assert_array_equal(kernels[1], kernels[2])  # the seed decides what is written


def test_magnitude_calibrates_on_no_text_of_the_model(capsys, tmp_path, model):
    for flags in (FREE, ("--method", "magnitude")):
        said = error(capsys, "convert", model, tmp_path / "out", "--sample", "2", *flags)
        assert "--sample" in said


def test_an_unknown_dtype_is_named(capsys, tmp_path, model):
    with pytest.raises(SystemExit):
        output(capsys, "convert", model, str(tmp_path / "out"), "--dtype", "int4")
    said = capsys.readouterr().err
    assert "argument --dtype" in said and "got int4" in said and "8bit" in said


def test_layers_can_have_another_dtype(capsys, tmp_path, model):
    """The first expression that matches counts, and layers that are skipped stay as they are."""
    flags = [".*down_proj.*=float8_e4m3fn", ".*mlp.*=none", ".*o_proj.*=float8_e4m3fn"]
    flags = ["--dtype", "int8", *(part for flag in flags for part in ("--dtype-of", flag))]
    out = str(tmp_path / "out")
    output(capsys, "convert", model, out, *flags, "--skip", ".*o_proj.*", *FREE)
    loaded = load_model(out)
    for block in loaded.model.params["model"]["layers"].values():
        dtypes = {
            name: getattr(part["kernel"], "dtype", None)
            for half in ("mlp", "self_attn")
            for name, part in block[half].items()
            if isinstance(part, dict)
        }
        assert dtypes["down_proj"] == "float8_e4m3fn" and dtypes["up_proj"] == "float32"
        assert dtypes["q_proj"] == "int8"
        assert not isinstance(block["self_attn"]["o_proj"]["kernel"], SlideWeight)
    assert loaded.about["dtype_of"][".*mlp.*"] == "none"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mixed", "2:4"), "--mixed chooses for all layers: it does not go with --dtype-of"),
        (("--budget", "decode=1.1"), "--budget chooses for all layers"),
    ],
)
def test_a_choice_for_all_layers_leaves_no_dtype_to_name(capsys, tmp_path, model, flags, message):
    out = str(tmp_path / "out")
    assert message in error(capsys, "convert", model, out, *flags, "--dtype-of", ".*=int8")


def test_the_figures_as_json(capsys, tmp_path, model):
    path = str(tmp_path / "out")
    figures = json.loads(output(capsys, "convert", model, path, "--json", *FREE))
    assert (figures["out"], figures["source"], figures["pattern"]) == (path, "dense", "6:8")
    assert figures["layers"] == 7 and figures["seconds"] > 0
    assert figures["bytes_before"] == sum(4 * i * o for i, o in layers())
    assert figures["bytes_after"] == sum(packed_bytes("6:8", 1, i, o) for i, o in layers())

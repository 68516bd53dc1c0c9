"""The commands on a tiny model, in process: results, files, and errors in one line."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from slidejax import huggingface
from slidejax.commands import main as cli
from slidejax.lm import demo
from slidejax.lm.evaluate import evaluate
from slidejax.lm.models import load_model
from slidejax.rules import Rule
from slidejax.weights.packed import SlideWeight

TEXT = (
    "The moon is the only natural satellite of the Earth. It turns once while it goes round. " * 2
)


@pytest.fixture(scope="module")
def model(tiny_directory):
    return str(tiny_directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def out(tmp_path_factory, model):
    """The model converted to 6:8; tests only read it."""
    path = str(tmp_path_factory.mktemp("converted") / "out")
    assert cli.main(["convert", model, path, "--pattern", "6:8"]) == 0
    return path


def run(capsys, *args):
    """Standard output of a command that must succeed."""
    capsys.readouterr()  # of fixtures
    status = cli.main(list(args))
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def error(capsys, *args):
    """The one line that a failing command says."""
    capsys.readouterr()
    assert cli.main(list(args)) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in captured.err and captured.out == ""
    return lines[0]


def usage_error(capsys, *args):
    """The one line that a command says about arguments that cannot be right; nothing is read before that."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(args))
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert stopped.value.code == 2 and len(lines) == 1 and captured.out == ""
    return lines[0]


def packed(params):
    def is_weight(node):
        return isinstance(node, SlideWeight)

    return [w for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w)]


# ---------------------------------------------------------------------------------------------------- convert, eval


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("int8", "int8"), ("float8_e4m3fn", "float8_e4m3fn"), ("none", "float32")],
)
def test_convert_writes_what_convert_makes(capsys, tmp_path, model, dtype, expected):
    from slidejax import huggingface
    from slidejax.rules import Rule

    path = str(tmp_path / "out")
    said = run(capsys, "convert", model, path, "--pattern", "4:6", "--dtype", dtype)
    assert "14 layers converted" in said
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
    """The pattern dense goes through every command, and is not taken for a model that was never converted."""
    path, calibration = str(tmp_path / "out"), ["--calibration", text, "--sequences", "2"]
    said = run(
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
        "14 layers converted" in said
        and "dense float8_e4m3fn, sparsegpt" in said
        and "skipped: lm_head/kernel" in said
    )
    loaded = load_model(path)
    assert loaded.about["pattern"] == "dense" and {
        str(w.pattern) for w in packed(loaded.model.params)
    } == {"dense"}
    before, after = json.loads(
        run(capsys, "eval", model, path, "--text", text, "--window", "64", "--json")
    )
    assert [(row["pattern"], row["dtype"]) for row in (before, after)] == [
        ("dense", "float32"),
        ("dense", "float8_e4m3fn"),
    ]
    assert (
        before["perplexity"] != after["perplexity"] == pytest.approx(before["perplexity"], rel=0.5)
    )
    [row] = json.loads(
        run(
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
    run(
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
    said = run(
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
    )
    assert (
        "14 layers converted" in said
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
    run(capsys, "convert", model, path, "--pattern", "6:8", flag, ".*/self_attn/.*")
    params = load_model(path).model.params
    assert len(packed(params)) == 6
    assert not isinstance(
        params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"], SlideWeight
    )


def test_eval_prints_one_object(capsys, text, model, out):
    dense = json.loads(run(capsys, "eval", model, "--text", text, "--window", "64", "--json"))
    sparse = json.loads(
        run(capsys, "eval", out, "--text", text, "--window", "64", "--against", model, "--json")
    )
    loaded = load_model(model)
    expected = evaluate(loaded.model, loaded.encode(TEXT), window=64)
    assert dense["tokens"] == sparse["tokens"] == len(loaded.encode(TEXT)) - 1
    assert dense["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert dense["next_token_accuracy"] == pytest.approx(expected.next_token_accuracy)
    assert sparse["perplexity"] != dense["perplexity"] and sparse["pattern"] == "6:8"
    readable = run(capsys, "eval", model, "--text", text, "--tokens", "20", "--window", "8")
    assert "20 tokens" in readable and "perplexity" in readable


# --------------------------------------------------------------------------------------------------- generate, demo


def test_generate_takes_every_kind_of_model(capsys, model, out):
    for path in (model, out):
        got = json.loads(
            run(capsys, "generate", path, "--prompt", "abc", "--max-new-tokens", "4", "--json")
        )
        assert got["prompt"] == "abc" and 1 <= got["tokens"] <= 4 and got["tokens_per_second"] > 0
    assert run(capsys, "generate", model, "--prompt", "abc", "--max-new-tokens", "4").startswith(
        "abc"
    )
    again = json.loads(
        run(capsys, "generate", out, "--prompt", "abc", "--max-new-tokens", "4", "--json")
    )
    assert again["text"] == got["text"]


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
    said = run(capsys, "demo", model, *options, "--json", str(file))
    rows = json.loads(file.read_text())
    names = [(row["pattern"], row["dtype"]) for row in rows]
    sparse = [(p, "int8") for p in ("6:8", "dense")]
    assert names == [("dense", "float32"), *sparse]
    assert {row["tokens"] for row in rows} == {60}
    assert all(
        row["tokens_per_second"] > 0 and 0 <= row["next_token_accuracy"] <= 1 for row in rows
    )
    # the linear layers of two blocks: q and o, k and v, gate, up and down
    weights = 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 104)
    by_name = dict(zip(names, rows, strict=True))
    assert by_name["dense", "float32"]["bytes"] == 4 * weights
    for name, row in by_name.items():
        if name[1] == "int8":
            assert (
                row["bytes"] == sum(packed_bytes(name[0], 1, i, o) for i, o in layers())
                and row["convert_seconds"] > 0
            )
    assert "dense float32: ab" in said and "6:8" in said and "60 tokens of" in said


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="on a GPU each pattern has its own kernel"
)
def test_demo_rows_share_programs(monkeypatch, model):
    loaded, compiled, lower = load_model(model), [], demo.Generator.compile

    def count(generator, *args, **kwargs):
        before = len(generator._compiled)
        lower(generator, *args, **kwargs)
        compiled.extend([0] * (len(generator._compiled) - before))

    monkeypatch.setattr(demo.Generator, "compile", count)
    ids = np.asarray(loaded.encode(TEXT), np.int32)[:61]
    with ThreadPoolExecutor(1) as pool:
        rows = [row for row, _ in demo.rows(loaded, ids, pool, window=30)]
    assert [row.pattern for row in rows[1:]] == [
        p for p in ("14:16", "6:8", "4:6", "2:4") for _ in range(2)
    ]
    assert len(compiled) == 3  # dense, int8, float32
    for row in rows[3:5]:  # what `evaluate` finds with the packed form, converted alone
        alone = huggingface.convert(loaded.model, Rule("6:8", row.dtype))
        assert evaluate(alone, ids, window=30).perplexity == pytest.approx(row.perplexity, rel=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bfloat16", None])
def test_one_conversion_serves_every_dtype(tiny_llama, dtype):
    got, seconds = demo._in_dtype(huggingface.convert(tiny_llama, Rule("6:8", None)), dtype)
    jax.tree.map(
        np.testing.assert_array_equal,
        got.params,
        huggingface.convert(tiny_llama, Rule("6:8", dtype)).params,
    )
    assert seconds > 0 or dtype is None


def layers():
    """(in, out) of all linear layers of the tiny Llama's two blocks."""
    block = [(48, 48), (48, 48), (48, 24), (48, 24), (48, 104), (48, 104), (104, 48)]
    return block * 2


def packed_bytes(pattern, size, inputs, outputs):
    """Values, one byte of zeros for each group that has some, a float32 scale for each output; K padded to blocks of eight groups."""
    kept, group = (4, 4) if pattern == "dense" else map(int, pattern.split(":"))
    groups = -(-inputs // (8 * group)) * 8
    return outputs * (groups * (kept * size + (kept < group)) + 4)


def test_demo_of_a_converted_model_is_one_row(capsys, out, text):
    rows = json.loads(
        run(
            capsys, "demo", out, "--text", text, "--tokens", "40", "--max-new-tokens", "2", "--json"
        )
    )
    assert [(row["pattern"], row["dtype"]) for row in rows] == [("6:8", "int8")]


# ---------------------------------------------------------------------------------------------------- bench and info


def test_bench_on_a_cpu(capsys):
    options = [
        "--shape",
        "64,96",
        "-M",
        "2,4",
        "--patterns",
        "6:8,dense",
        "--dtypes",
        "int8",
        "--seconds",
        "0.01",
    ]
    got = json.loads(run(capsys, "bench", *options, "--warmup", "0.001", "--json"))
    found = [(e["out"], e["in"], e["rows"], e["pattern"]) for e in got["linear"]]
    assert found == [(64, 96, m, p) for m in (2, 4) for p in ("6:8", "dense")]
    for entry in got["linear"]:
        assert {"jax bf16", "jax int8", "jax fp8"} <= entry["us"].keys()
        assert all(us is None or us > 0 for us in entry["us"].values())
        assert ("CUDA" if entry["pattern"] == "6:8" else "no zeros to skip") in entry["refused"][
            "hopper"
        ]
    assert [(s["rows"], s["pattern"]) for s in got["sums"]] == [
        (m, p) for m in (2, 4) for p in ("6:8", "dense")
    ]
    assert all(e["gb_per_s"] > 0 and e["copy_gb_per_s"] > 0 for e in got["lift"])


def test_info(capsys):
    facts = json.loads(run(capsys, "info", "--json"))
    assert facts["versions"]["jax"] == jax.__version__
    assert set(facts["implementations"]) == {"hopper", "cusparselt", "dense", "reference"}
    assert "dense" in run(capsys, "info")


# ------------------------------------------------------------------------------------------------------------ errors


def test_errors_are_one_line(capsys, tmp_path, model, out, text):
    assert "not one of smollm2" in error(capsys, "eval", str(tmp_path / "nowhere"))
    assert "converted already" in error(
        capsys, "convert", out, str(tmp_path / "x"), "--pattern", "6:8"
    )
    assert "is a file" in error(capsys, "convert", model, text, "--pattern", "6:8")
    (tmp_path / "empty").write_text("")
    assert "at least two" in error(capsys, "eval", model, "--text", str(tmp_path / "empty"))
    assert "chat template" in error(capsys, "generate", model, "--chat")
    assert not (tmp_path / "x").exists()


def test_wrong_values_are_named_before_a_model_is_read(capsys, tmp_path):
    convert = ("convert", str(tmp_path / "nowhere"), str(tmp_path / "x"), "--pattern")
    for pattern in ("5:8", "6:9"):
        said = usage_error(capsys, *convert, pattern)
        assert "--pattern: pattern must be" in said and pattern in said
    for dtype in ("int3", "int4"):
        said = usage_error(capsys, *convert, "6:8", "--dtype", dtype)
        assert "--dtype: dtype must be" in said and dtype in said and "float8_e4m3fn" in said
    said = usage_error(capsys, *convert, "6:8", "--method", "guess")
    assert "--method: invalid choice: 'guess'" in said and "sparsegpt" in said
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for flag, value, expected in [
        ("--skip", "(", "must be a regular expression"),
        ("--mixed", "6:8,1:2", "--mixed: pattern must be"),
        ("--mixed", ",", "must be names"),
        ("--sequences", "0", "must be 1 or more"),
        ("--sequences", "many", "must be a whole number"),
        ("--compute", "int8", "must be bfloat16"),
        ("--calibration", str(tmp_path / "nothing"), "must be a text file"),
        ("--calibration", str(tmp_path), "must be a text file"),
        ("--calibration", str(tmp_path / "binary"), "UTF-8"),
    ]:
        said = usage_error(capsys, *convert, "6:8", flag, value)
        assert f"argument {flag}: " in said and expected in said
        assert value.split(",")[-1] in said
    assert "must be a text file" in usage_error(capsys, "eval", "m", "--text", "nothing")
    assert "must be 0 or more" in usage_error(capsys, "generate", "m", "--temperature", "-1")
    assert "must be from 0 to 1" in usage_error(capsys, "recover", "m", "x", "--docstrings", "2")
    assert "must be N,K" in usage_error(capsys, "bench", "--shape", "64")
    assert "must be more than 0" in usage_error(capsys, "bench", "--seconds", "0")
    assert not (tmp_path / "x").exists()


def test_a_damaged_model_is_one_line(capsys, tmp_path, out):
    damaged = shutil.copytree(out, tmp_path / "damaged")
    file = damaged / "slidejax.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "slidejax.safetensors" in error(capsys, "generate", str(damaged))


@pytest.mark.parametrize(
    "args", [[], ["fly"], ["convert", "a", "b"], ["eval", "m", "--tokens", "0"]]
)
def test_bad_usage(capsys, args):
    with pytest.raises(SystemExit) as e:
        cli.main(args)
    assert e.value.code == 2 and "usage:" in capsys.readouterr().err

"""`slidejax recover` on a tiny model, in process."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import SENTENCES, error, output, packed, run, write_decoder, write_files

from slidejax.huggingface import write_pretrained
from slidejax.lm import load
from slidejax.lm.models import load_model
from slidejax.lm.reading import stored_dtypes

TEXT = SENTENCES * 8


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_directory):
    return write_files(tmp_path_factory.mktemp("recovered"), tiny_directory, "4:6", TEXT)


def test_recover_writes_a_better_model(capsys, files):
    text, dense, out, new = (files / name for name in ("text.txt", "dense", "out", "new"))
    options = [
        "--against",
        dense,
        "--text",
        text,
        "--window",
        32,
        "--batch",
        8,
        "--learning-rate",
        3e-3,
        "--warmup",
        2,
    ]
    status, said, err = run(
        capsys, "recover", out, new, *options, "--steps", 25, "--checkpoint", files / "state"
    )
    assert status == 0, err
    assert "25 steps" in said and "held-out rows: loss" in said
    _, before, _ = run(
        capsys, "eval", out, "--text", text, "--window", 32, "--against", dense, "--json"
    )
    _, after, _ = run(
        capsys, "eval", new, "--text", text, "--window", 32, "--against", dense, "--json"
    )
    assert json.loads(after)["kl"] < 0.8 * json.loads(before)["kl"]
    about = load_model(new).about
    assert about["pattern"] == "4:6" and about["recovery"]["steps"] == 25
    # the state holds the whole run: it is written once more without a step
    again = ["--steps", 25, "--checkpoint", files / "state", "--json"]
    status, said, _ = run(capsys, "recover", out, files / "again", *options, *again)
    figures = json.loads(said)
    assert status == 0 and figures["out"] == str(files / "again") and figures["steps"] == 25
    assert 0 < figures["last_loss"] < figures["first_loss"]
    held = dict(figures["held_out"])
    assert held[figures["kept_step"]] == min(held.values()) < held[0] and max(held) == 25
    kernels = [
        load_model(f).model.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].values
        for f in (new, files / "again")
    ]
    np.testing.assert_array_equal(*kernels)


def test_an_earlier_result_is_not_replaced_by_chance(capsys, files):
    out = files / "old"
    write_pretrained(out, load_model(files / "dense").model)
    before = (out / "slidejax.safetensors").read_bytes()
    args = ("recover", files / "out", out, "--text", files / "text.txt", "--steps", 1)
    options = ("--window", 32, "--batch", 2)
    status, _, err = run(capsys, *args, *options)
    assert status == 1 and "holds an earlier result" in err and "--force" in err
    assert (out / "slidejax.safetensors").read_bytes() == before
    # slidejax.json names the original model, which is beside it
    status, _, err = run(capsys, *args, *options, "--force")
    assert status == 0 and load_model(out).about["recovery"]["steps"] == 1, err


def test_the_original_model_writes_some_of_the_text(capsys, files):
    options = [
        "--against",
        files / "dense",
        "--text",
        files / "text.txt",
        "--window",
        200,
        "--batch",
        2,
        "--steps",
        1,
    ]
    for sampled, out, state in ((0, "none", "no"), (3, "some", "kept")):
        more = ("--sample", sampled, "--checkpoint", files / state)
        status, _, err = run(capsys, "recover", files / "out", files / out, *options, *more)
        assert status == 0, err
    without, with_some = (
        load_model(files / name).about["recovery"]["rows"] for name in ("none", "some")
    )
    assert with_some == without + 3 > 3
    kept = list((files / "kept.rows").glob("rows-*.safetensors"))  # for a run that goes on
    assert len(kept) == 1 and not (files / "no.rows").exists()
    with pytest.raises(SystemExit):
        run(capsys, "recover", files / "out", files / "x", *options, "--sample", -1)
    assert "argument --sample: must be from 0 to 2147483647" in capsys.readouterr().err


def asked_of(capsys, files, monkeypatch, *options):
    """The settings of a recovery, which does as it is told: 8 rows of 16 tokens a step."""

    def said(*args, accumulate, learning_rate, **options):
        raise ValueError(f"{accumulate} parts at {learning_rate}")

    monkeypatch.setattr("slidejax.train.recover.recover", said)
    flags = ["--text", files / "text.txt", "--window", 16, "--batch", 8, "--steps", 1, *options]
    status, _, err = run(
        capsys, "recover", files / "out", files / "x", "--against", files / "dense", *flags
    )
    assert status != 0
    return err


@pytest.mark.parametrize(("large", "rate"), [(8 * 16, 5e-4), (8 * 16 + 1, 2e-4)])
def test_a_large_step_has_a_larger_rate(capsys, files, monkeypatch, large, rate):
    monkeypatch.setattr("slidejax.train.recover._LARGE_STEP", large)
    assert f"at {rate}" in asked_of(capsys, files, monkeypatch)


@pytest.mark.parametrize(
    ("rows", "options", "parts"),
    [(8, (), 1), (2, (), 4), (1, ("--held-out", 4), 4), (1, ("--accumulate", 2), 2)],
)
def test_a_batch_is_cut_so_that_its_logits_fit(capsys, files, monkeypatch, rows, options, parts):
    """262,144 tokens of vocabulary make 17 GB of logits for 32 rows: too much for most GPUs."""
    size = load_model(files / "dense").model.config.vocab_size * 16 * 4
    monkeypatch.setattr("slidejax.commands.recover._LOGITS", rows * size)
    assert f"{parts} parts" in asked_of(capsys, files, monkeypatch, *options)


def test_errors_are_one_line(capsys, files):
    dense, out, text = files / "dense", files / "out", files / "text.txt"
    (files / "short").write_text("moon")
    lost = files / "lost"
    made = load_model(out)
    write_pretrained(lost, made.model, made.tokenizer, {"source": "gone", "source_path": "/gone"})
    for args, message in [
        ((lost, files / "x", "--text", text), "name it with --against"),
        ((out, files / "x", "--against", out, "--text", text), "must name the original model"),
        (
            (dense, files / "x", "--against", dense, "--text", text, "--steps", 1),
            "nothing to recover",
        ),
        ((out, text, "--against", dense), "is a file"),
        (
            (out, files / "x", "--against", dense, "--text", files / "short", "--window", 64),
            "--window must be from 1 to 4, the tokens of the text, got 64",
        ),
        (
            (out, files / "x", "--against", dense, "--text", text, "--batch", 500),
            "the rows, got 500",
        ),
        (
            (out, files / "x", "--against", dense, "--text", text, "--held-out", 500),
            "--held-out must be a multiple of --accumulate, 1, from 0 to ",
        ),
    ]:
        status, said, err = run(capsys, "recover", *args)
        assert status == 1 and said == "" and message in err and "Traceback" not in err, (args, err)
    assert not (files / "x").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--batch 4 --accumulate 3", "--accumulate must divide --batch, 4, got 3"),
        ("--accumulate 64", "--accumulate must divide the default of --batch, "),
        ("--text {text} --docstrings 0.5", "--docstrings is of the default text"),
    ],
)
def test_flags_that_do_not_go_together_are_named_before_a_model_is_read(capsys, text, flags, said):
    words = flags.format(text=text).split()
    assert said in error(capsys, "recover", "no-model", "no-out", *words)


def test_what_is_left_alone_keeps_its_stored_dtype(capsys, tmp_path):
    """OUT keeps embeddings in bfloat16; a CPU computes in float32, and NEW was larger than OUT."""
    dense, text, out, new = write_decoder(tmp_path), *(tmp_path / n for n in ("text", "out", "new"))
    text.write_text(TEXT)
    skip = ("--data-free", "--skip", ".*layers/0/self_attn/q_proj.*")
    output(capsys, "convert", dense, out, *skip, "--compute", "float32")
    options = ("--text", text, "--window", 16, "--batch", 4, "--steps", 2, "--warmup", 0)
    output(capsys, "recover", out, new, *options, "--held-out", 0)
    before, after = stored_dtypes(out), stored_dtypes(new)
    embedding = "model/embed_tokens/embedding"
    assert before[embedding] == after[embedding] == jnp.bfloat16
    # This kernel is in bfloat16, too, but it was trained, and keeps what it learnt.
    kernel = "model/layers/0/self_attn/q_proj/kernel"
    assert before[kernel] == jnp.bfloat16 and after[kernel] == jnp.float32
    assert {k: v for k, v in after.items() if k != kernel} == {
        k: v for k, v in before.items() if k != kernel
    }
    # Nothing is lost, and the dtype of the computation stays.
    first, second = load(out), load(new)
    assert second.dtype == first.dtype == jnp.float32
    np.testing.assert_array_equal(
        *(one.params["model"]["embed_tokens"]["embedding"] for one in (first, second))
    )
    assert not np.array_equal(
        *(
            one.params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
            for one in (first, second)
        )
    )


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", None])
def test_a_model_of_16_bit_values_is_recovered_and_quantised(capsys, tmp_path, dtype):
    dense = write_decoder(tmp_path)
    text, out, new = (tmp_path / name for name in ("text", "out", "new"))
    text.write_text(TEXT)
    output(capsys, "convert", dense, out, "--data-free", "--dtype", "bfloat16")
    options = ("--text", text, "--window", 16, "--batch", 4, "--steps", 2)
    output(capsys, "recover", out, new, *options, *(() if dtype is None else ("--dtype", dtype)))
    found = {w.dtype.name for w in packed(load(new).params)}
    assert found == {"float32" if dtype is None else dtype}
    assert stored_dtypes(new)["model/embed_tokens/embedding"] == jnp.bfloat16

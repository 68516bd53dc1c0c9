"""`slidejax convert`: refusals before any work, and the files that it writes."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import error, output, run

from slidejax.commands import inputs
from slidejax.lm import load, reading, save
from slidejax.lm.decoder.examples import tiny


@pytest.fixture
def unread(monkeypatch):
    """Fails where a model is read."""

    def read(*args, **kwargs):
        raise AssertionError("a model was read")

    monkeypatch.setattr(inputs, "load", read)
    monkeypatch.setattr(reading, "read_shell", read)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A decoder without a tokenizer; its head is tied."""
    path = tmp_path_factory.mktemp("bare") / "model"
    save(tiny(tied=True), path)
    return str(path)


def test_an_out_that_exists_is_refused_before_any_work(capsys, tmp_path, out, unread):
    files = sorted(os.listdir(out))
    assert "holds an earlier result: name another one, or replace it with --force" in error(
        capsys, "convert", "smollm2", out
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary").write_text("dear")
    for force in ([], ["--force"]):
        said = error(capsys, "convert", "smollm2", tmp_path / "other", *force)
        assert "other things in it" in said
    assert sorted(os.listdir(out)) == files and (tmp_path / "other" / "diary").exists()


def test_what_cannot_be_written_is_refused_before_any_work(capsys, tmp_path, unread):
    (tmp_path / "file").write_text("")
    assert "no directory can be written there" in error(
        capsys, "convert", "smollm2", tmp_path / "file" / "out"
    )
    assert "too long" in error(capsys, "convert", "smollm2", tmp_path / ("n" * 300))
    assert os.listdir(tmp_path) == ["file"]


def test_a_model_is_not_replaced_by_what_is_made_of_it(capsys, tmp_path, bare, unread):
    link = tmp_path / "link"
    link.symlink_to(bare)
    files = {name: (Path(bare) / name).read_bytes() for name in os.listdir(bare)}
    for model, out in ((bare, bare), (bare, link), (link, bare)):
        for command in ("convert", "recover"):
            said = error(capsys, command, model, out, "--force")
            assert "is the model that is read, which would be lost" in said
    assert "which would be lost" in error(capsys, "recover", "m", bare, "--against", link)
    assert "lies in" in error(capsys, "convert", bare, Path(bare) / "new")
    assert "must name a directory" in error(capsys, "convert", bare, "")
    assert {name: (Path(bare) / name).read_bytes() for name in os.listdir(bare)} == files


def test_figures_do_not_go_where_the_model_goes(capsys, tmp_path, bare, unread):
    for command in ("convert", "recover"):
        said = error(capsys, command, bare, tmp_path / "x", "--json", tmp_path / "x")
        assert "--json" in said and "is OUT, which is a directory" in said
    assert not os.listdir(tmp_path)


def test_flags_that_contradict_each_other(capsys, tmp_path, unread):
    for flags in (["--method", "wanda"], ["--mixed", "2:4"], ["--calibration", __file__]):
        said = error(capsys, "convert", "smollm2", tmp_path / "x", "--data-free", *flags)
        assert f"does not go with {flags[0]}" in said
    for flags in (["--calibration", __file__], ["--sample", "3"]):
        said = error(capsys, "convert", "smollm2", tmp_path / "x", "--method", "magnitude", *flags)
        assert flags[0] in said and "--method magnitude does not calibrate" in said


def test_a_full_disk_is_found_before_the_work(capsys, tmp_path, bare, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    said = error(capsys, "convert", bare, tmp_path / "x", "--data-free")
    assert "will be written and 0.0 MiB are free" in said and not os.listdir(tmp_path)


def test_without_a_tokenizer_the_way_out_is_named(capsys, tmp_path, bare):
    assert "--data-free" in error(capsys, "convert", bare, tmp_path / "x")
    assert not os.listdir(tmp_path)


def test_force_replaces_and_magnitude_is_warned_of(capsys, tmp_path, bare):
    path = tmp_path / "x"
    for flags, warned in (["--data-free"], True), (["--method", "magnitude", "--force"], True):
        status, said, err = run(capsys, "convert", bare, path, *flags)
        assert status == 0 and "14 layers converted" in said
        assert ("note: pruning to 6:8 by magnitude ruins" in err) == warned
    free = ["--data-free", "--pattern", "dense", "--force"]
    assert "magnitude" not in run(capsys, "convert", bare, path, *free)[2]


def test_a_tied_head_is_kept_once_and_floats_in_bfloat16(capsys, tmp_path, bare):
    from slidejax.checkpoint import load as load_tree

    original = load(bare)
    for flags, dtype in ([], "bfloat16"), (["--floats", "float32"], "float32"):
        path = tmp_path / dtype
        flags = ["--data-free", "--skip", ".*/down_proj/.*", *flags, "--json"]
        figures = json.loads(output(capsys, "convert", bare, path, *flags))
        files = [path / name for name in os.listdir(path)]
        assert figures["bytes_on_disk"] == sum(file.stat().st_size for file in files)
        params = load_tree(path)["params"]
        assert "lm_head" not in params
        kept = params["model"]["embed_tokens"]["embedding"]
        skipped = params["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]
        assert kept.dtype == skipped.dtype == dtype
        assert params["model"]["norm"]["weight"].dtype == np.float32
        model = load(path)  # computes in the dtype of the original model
        embedding = original.params["model"]["embed_tokens"]["embedding"]
        assert model.dtype == np.float32 and model.config.tied
        np.testing.assert_array_equal(
            model.params["model"]["embed_tokens"]["embedding"],
            jnp.asarray(embedding, dtype).astype(np.float32),
        )

"""The result of long work is not lost if the disk fills up before it is written."""

import contextlib
import os
import re
import shutil

import pytest

pytest.importorskip("rich")
pytest.importorskip("optax")

import numpy as np
from command_line import SENTENCES, error, run, write_decoder
from forked import forked
from places import mounted, root

import slidejax as sj
from slidejax.checkpoint.space import reserved
from slidejax.lm.reading import keep_model, read_model
from slidejax.train import recover as recovery


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`model`, `sparse` and `text`; tests only read them."""
    folder = tmp_path_factory.mktemp("kept")
    sj.lm.save(sj.lm.convert(sj.lm.load(write_decoder(folder)), "6:8"), folder / "sparse")
    (folder / "text").write_text(SENTENCES * 8)
    return folder


def recover(files, out, *more):
    flags = ("--window", "16", "--batch", "2", "--steps", "2")
    texts = ("--against", files / "model", "--text", files / "text")
    return ("recover", files / "sparse", out, *texts, *flags, *more)


def fill(folder):
    """Another process takes all the room of a disk."""
    with (folder / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def filled_by_then(monkeypatch, disk):
    """Fills a disk when the training is done."""
    trained = recovery.recover

    def then_fill(*args, **options):
        made = trained(*args, **options)
        fill(disk)
        return made

    monkeypatch.setattr(recovery, "recover", then_fill)


@root
def test_others_cannot_take_the_room_while_a_model_trains(capsys, monkeypatch, tmp_path, files):
    with mounted(tmp_path / "disk", "4m") as disk:
        filled_by_then(monkeypatch, disk)
        status, _, err = run(capsys, *recover(files, disk / "new"))
        assert status == 0, err
        assert sj.lm.load(disk / "new").about["recovery"]["steps"] == 2
        assert sorted(os.listdir(disk)) == ["new", "other"]


@root
def test_a_model_that_does_not_fit_is_kept_elsewhere(capsys, monkeypatch, tmp_path, files):
    right = tmp_path / "right"
    assert run(capsys, *recover(files, right))[0] == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    # room that was reserved is free for a moment: another process may take it then
    monkeypatch.setattr("slidejax.checkpoint.space.os.posix_fallocate", lambda *args: None)
    with mounted(tmp_path / "disk", "4m") as disk:
        filled_by_then(monkeypatch, disk)
        said = error(capsys, *recover(files, disk / "new"))
        assert os.listdir(disk) == ["other"]
    assert "No space left" in said
    kept = re.search("; the model is complete in '(.*)'$", said)[1]
    assert kept == str(elsewhere / os.path.basename(kept)) and "new.kept-" in kept
    for name in ("slidejax.safetensors", "tokenizer.json"):
        assert (elsewhere / kept / name).read_bytes() == (right / name).read_bytes()


LIMITED = """
import resource
from slidejax.commands.main import main
from slidejax.train import recover as recovery

trained = recovery.recover

def then_limit(*args, **options):
    made = trained(*args, **options)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    return made

recovery.recover = then_limit
raise SystemExit(main(ARGS))
"""


def test_where_nothing_can_be_written_the_error_says_how_to_go_on(capsys, tmp_path, files):
    state = tmp_path / "state"
    runs = [recover(files, tmp_path / "new", *more) for more in ((), ("--checkpoint", state))]
    programs = [LIMITED.replace("ARGS", repr([*map(str, args)])) for args in runs]
    found = forked(*([{"run": program}] for program in programs))
    said = [
        "the training of 2 steps is lost: --checkpoint DIR would have kept it",
        f"the training is kept in {str(state)!r}: the same command goes on from there",
    ]
    for [(status, out, err)], how in zip(found, said, strict=True):
        assert status == 1 and err.count("error: ") == 1 and "Traceback" not in err, err
        assert f"cannot be written: File too large: '{tmp_path / 'new'}" in err and how in err, err
        assert out == ""
    assert os.listdir(tmp_path) == ["state"]
    status, out, err = run(capsys, *runs[1], "--steps", "2")
    assert status == 0 and "2 steps" in out, err


def test_a_model_is_written_elsewhere_where_its_place_went(monkeypatch, tmp_path, files):
    loaded = read_model(files / "sparse")
    for name in ("file", "elsewhere", "theirs"):
        (tmp_path / name).mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    shutil.rmtree(tmp_path / "file")
    (tmp_path / "file").write_text("")
    for path in ("file/out", "theirs"):
        with pytest.raises(OSError, match="; the model is complete in ") as told:
            keep_model(tmp_path / path, loaded.model, loaded, {}, lost="all is lost")
        kept = re.search("complete in '(.*)'", str(told.value))[1]
        values = sj.lm.load(kept).params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].values
        old = loaded.model.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].values
        np.testing.assert_array_equal(values, old)
    assert os.listdir(tmp_path / "theirs") == ["thesis.txt"]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file" / "x"))
    monkeypatch.setattr("os.getcwd", lambda: str(tmp_path / "file"))
    with pytest.raises(OSError, match="all is lost"):
        keep_model(tmp_path / "file" / "out", loaded.model, loaded, {}, lost="all is lost")


def test_room_is_taken_while_the_work_lasts(tmp_path):
    with reserved(tmp_path / "out", 1_000_000):
        [file] = tmp_path.iterdir()
        assert file.stat().st_blocks * 512 >= 1_000_000
    assert not os.listdir(tmp_path)
    too_much = reserved(tmp_path / "out", 2**60)
    with pytest.raises(OSError, match=r"MiB will be written and .* are free"), too_much:
        pass
    assert not os.listdir(tmp_path)

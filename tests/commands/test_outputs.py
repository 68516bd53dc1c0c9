"""No command writes over its inputs: every command, every flag that names a file."""

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import error, run

from slidejax.commands import arguments, inputs
from slidejax.commands.main import COMMANDS, make_parser
from slidejax.huggingface import write_pretrained
from slidejax.lm import Decoder, load, reading, save
from slidejax.lm.decoder.examples import tiny

# The inputs of each command, by the flag that names them; "" are its positional arguments.
READS = {
    "demo": {"": ["m"], "--text": "t", "--calibration": "c"},
    "convert": {"": ["m", "new"], "--calibration": "c"},
    "recover": {"": ["m", "new"], "--against": "a", "--text": "t"},
    "eval": {"": ["m", "m2"], "--against": "a", "--text": "t"},
    "generate": {"": ["m"]},
    "bench": {},
    "tune": {"": ["m"]},
    "info": {},
}
PROGRAMS = ("eval", {"": ["m"], "--task": "humaneval", "--against": "a", "--problems": "t"})


def written(command):
    """The flags of a command that name files to write, by what argparse knows of them."""
    [commands] = [a for a in make_parser()._actions if hasattr(a, "choices") and a.choices]
    kinds = (arguments.out_file, arguments.plot_file)
    actions = commands.choices[command]._actions
    return [a.option_strings[-1] for a in actions if a.type in kinds]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a tiny decoder whose notes name the original model."""
    model, made = tiny(), tmp_path_factory.mktemp("saved")

    def save_to(folder, original="nowhere"):
        if not (made / original).exists():
            about = {"source": original, "source_path": "/gone"}
            save(Decoder(model.config, model.params, about=about), made / original)
        shutil.copytree(made / original, folder)

    return save_to


@pytest.fixture
def files(tmp_path, monkeypatch, saved):
    """Models and texts in a folder; fails where a model is read, or anything in it was changed."""

    def read(*args, **kwargs):
        raise AssertionError("a model was read")

    monkeypatch.setattr(inputs, "load", read)
    monkeypatch.setattr(reading, "read_shell", read)
    for name in ("m", "m2", "a"):
        saved(tmp_path / name)
    for name in ("t", "c"):
        (tmp_path / name).write_text("words " * 20)
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    before = _tree(tmp_path)
    yield tmp_path
    assert _tree(tmp_path) == before


def _tree(folder):
    paths = sorted(folder.rglob("*"))
    return [(str(p), p.read_bytes() if p.is_file() else None) for p in paths if not p.is_symlink()]


def _argv(command, reads):
    flags = [part for flag, value in reads.items() if flag for part in (flag, value)]
    return [command, *reads.get("", []), *flags]


@pytest.mark.parametrize(
    ("command", "reads"),
    [*READS.items(), PROGRAMS],
    ids=[*READS, "humaneval"],
)
def test_a_file_that_is_written_is_nothing_that_is_read(capsys, files, command, reads):
    assert set(READS) == set(COMMANDS)
    flags = [f for f in written(command) if (f == "--plot") <= (reads is not PROGRAMS[1])]
    flags = [f for f in flags if (f == "--completions") <= (reads is PROGRAMS[1])]
    assert "--json" in flags
    named = [*reads.get("", []), *(v for flag, v in reads.items() if flag not in ("", "--task"))]
    for flag in flags:
        suffix = ".png" if flag == "--plot" else ""
        for read in named:
            places = [read, f"inner/../{read}"]
            if (files / read).is_dir():
                places = [f"{read}/config.json", f"{read}/slidejax.json", f"{read}/more/x"]
            elif read == "new":
                places = ["new", "new/x", "new.work" if command == "convert" else "new/y"]
            for place in places:
                target = place + suffix
                if suffix and (files / place).is_file():  # a link with the right ending
                    os.symlink(files / place, files / f"to{suffix}")
                    target = f"to{suffix}"
                said = error(capsys, *_argv(command, reads), flag, target)
                assert f"{flag} {target!r}" in said, said
                if target.startswith("to"):
                    os.unlink(target)


def test_files_that_a_model_only_links_to_are_kept_too(capsys, files):
    """Directories of downloaded models hold links into another folder."""
    os.rename("a/slidejax.safetensors", "inner/blob")
    os.symlink("../inner/blob", "a/slidejax.safetensors")
    os.symlink("a", "link")
    for place in ("inner/blob", "link/slidejax.safetensors", "link/x", "a/slidejax.safetensors"):
        said = error(capsys, "generate", "link", "--json", place)
        assert f"--json {place!r}" in said and "the model that is read" in said
    os.unlink("a/slidejax.safetensors"), os.unlink("link")
    os.rename("inner/blob", "a/slidejax.safetensors")


def test_two_files_are_not_written_to_one_place(capsys, files):
    said = error(capsys, "eval", "m", "--plot", "x.png", "--json", "inner/../x.png")
    assert "--plot 'x.png' is --json" in said


def test_devices_are_no_files(capsys, files, monkeypatch):
    """A pipe or a device is never replaced, so it may be named by several flags."""
    for command, *flags in (["generate"], ["eval", "--text", os.devnull]):
        monkeypatch.setattr(COMMANDS[command], "run", lambda args: None)
        assert run(capsys, command, "m", *flags, "--json", os.devnull)[0] == 0


RELATIONS = {
    "is": lambda path: path,
    "is, by a link": lambda path: _link(path),
    "lies in": lambda path: f"{path}/new",
    "lies in, by a link": lambda path: f"{_link(path)}/new",
    "holds": lambda path: _around(path),
}


def _link(path):
    shutil.rmtree("inner")
    os.symlink(path, "inner")
    return "inner"


def _around(path):
    """A directory that slidejax wrote, with this one in it."""
    shutil.copytree(path, "around")
    os.rename(path, f"around/{path}")
    os.symlink(f"around/{path}", path)
    return "around"


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(
    ("command", "flag", "read"),
    [
        ("convert", "OUT", "m"),
        ("convert", "--work", "m"),
        ("convert", "--work", "new"),
        ("recover", "OUT", "m"),
        ("recover", "OUT", "a"),
        ("recover", "OUT", "noted"),
        ("recover", "--checkpoint", "m"),
        ("recover", "--checkpoint", "a"),
        ("recover", "--checkpoint", "noted"),
        ("recover", "--checkpoint", "new"),
    ],
)
def test_a_directory_that_is_written_is_apart(
    capsys, tmp_path, monkeypatch, saved, command, flag, read, relation
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inputs, "load", _unread)
    monkeypatch.setattr(reading, "read_shell", _unread)
    for name in ("m", "a", "new", "noted"):
        saved(name, "noted")
    os.mkdir("inner")
    place = RELATIONS[relation](read)
    before = _tree(tmp_path)
    argv = [command, "m", place if flag == "OUT" else "new", "--force"]
    argv += ["--against", "a"] if read == "a" else []
    argv += [flag, place] if flag != "OUT" else []
    if flag == "--work" and relation == "holds":  # files are added to it, and none is replaced
        with pytest.raises(AssertionError, match="a model was read"):
            run(capsys, *argv)
    else:
        said = error(capsys, *argv)
        assert f"{flag} {place!r} {relation.split(',')[0]}" in said, said
    assert _tree(tmp_path) == before
    load(read)


def _unread(*args, **kwargs):
    raise AssertionError("a model was read")


def test_a_text_is_not_replaced(capsys, files):
    said = error(capsys, "recover", "m", "inner", "--text", "t", "--checkpoint", "t")
    assert "--checkpoint 't' is a text that is read" in said
    os.rename("t", "a/merges.txt")
    for command, flag in (("convert", "--calibration"), ("recover", "--text")):
        said = error(capsys, command, "m", "a", "--force", flag, "a/merges.txt")
        assert "OUT 'a' holds 'a/merges.txt', a text that is read" in said
    os.rename("a/merges.txt", "t")


def test_the_directory_of_a_flax_model_notes_its_original_model(
    capsys, tmp_path, monkeypatch, tiny_directory
):
    """Directories of transformers' models have the same notes."""
    from slidejax.lm.models import load_model

    made = load_model(tiny_directory)
    about = {"source": "gone", "source_path": str(tmp_path / "original")}
    for name in ("original", "sparse"):
        write_pretrained(tmp_path / name, made.model, made.tokenizer, about)
    monkeypatch.setattr(inputs, "load", _unread)
    said = error(capsys, "recover", tmp_path / "sparse", tmp_path / "original", "--force")
    assert "is the original model, which is read, which would be lost" in said
    assert load_model(tmp_path / "original").about == about


def test_conversion_from_files_to_files_keeps_its_work_elsewhere(tmp_path):
    from slidejax.lm import convert_files
    from slidejax.prune import Calibration

    save(tiny(), tmp_path / "m")
    for work in ("m", "m/work", "out", "out/work"):
        how = Calibration([[1, 2, 3, 4]], work=tmp_path / work)
        with pytest.raises(ValueError, match=r"work '.*' (is|lies in)"):
            convert_files(tmp_path / "m", tmp_path / "out", "6:8", "wanda", how)
    assert os.listdir(tmp_path) == ["m"] and not (Path(tmp_path) / "m" / "conversion").exists()

"""Places that cannot be written: one clear error before the work, and nothing is lost or left.

Some of these need root, for another user or a file system of their own, and skip without it.
"""

import json
import os
import pathlib
import shutil
import tempfile

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("optax")

from command_line import SENTENCES, write_decoder
from forked import forked
from places import mounted, root

import slidejax as sj
import slidejax.checkpoint

NOBODY = 65534


@pytest.fixture(scope="module")
def base():
    """Models and a text where every user can read them."""
    folder = pathlib.Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    model = sj.lm.load(write_decoder(folder))
    (folder / "text").write_text(SENTENCES * 8)
    sj.lm.save(sj.lm.convert(model, "6:8"), folder / "sparse")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def place(base):
    """A new folder that every user can read."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=base))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def convert(base, out, *more):
    return ("convert", base / "model", out, "--data-free", "--force", *more)


def calibrate(base, out, *more):
    flags = ("--method", "wanda", "--sequences", "1", "--calibration", base / "text", "--force")
    return ("convert", base / "model", out, *flags, *more)


def recover(base, out, *more):
    flags = ("--window", "16", "--batch", "2", "--steps", "2", "--every", "1", "--force")
    texts = ("--against", base / "model", "--text", base / "text")
    return ("recover", base / "sparse", out, *texts, *flags, *more)


def save(base, out):
    return (
        "import slidejax as sj\n"
        f"model = sj.lm.load({str(base / 'sparse')!r})\n"
        "try:\n"
        f"    sj.lm.save(model, {str(out)!r})\n"
        "except (OSError, ValueError) as e:\n"
        "    raise SystemExit(f'error: {e}')\n"
    )


def train(base, out):
    return (
        "import numpy as np, jax, slidejax as sj\n"
        "from slidejax.train import Shuffled, fit\n"
        "x = np.ones((8, 512), np.float32)\n"
        "w = sj.pack(jax.random.normal(jax.random.key(0), (512, 64)), '6:8', dtype='int8')\n"
        "loss = lambda w, x: (sj.linear(x, w) ** 2).mean()\n"
        "try:\n"
        f"    fit(loss, w, Shuffled(x, 4), steps=2, every=1, checkpoint={str(out)!r},\n"
        "        progress=lambda *done: print('step', done, flush=True))\n"
        "except (OSError, ValueError) as e:\n"
        "    raise SystemExit(f'error: {e}')\n"
    )


WRITERS = {"convert": convert, "calibrate": calibrate, "recover": recover, "save": save}
WRITERS["train"] = train


def _tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(found, name, said):
    """Checks that a run ended with one error, before any work."""
    status, out, err = found
    errors = [line for line in err.splitlines() if "error: " in line]
    assert status == 1 and "Traceback" not in err and len(errors) == 1, (name, found)
    assert any(words in errors[0] for words in said), (name, found)
    assert "step" not in out, (name, "it began to train")


def run_all(base, place, said, out=None, writers=WRITERS, **limits):
    """Runs all writers with one OUT each, which must be refused and must stay as it was."""
    outs = {name: out or place / name for name in writers}
    before = _tree(place)
    cases = [{"run": make(base, outs[name]), **limits} for name, make in writers.items()]
    for name, [found] in zip(writers, forked(*([case] for case in cases)), strict=True):
        refused(found, name, said)
        assert outs[name].name in found[2] or str(outs[name].parent) in found[2], (name, found)
    assert _tree(place) == before


@root
def test_a_parent_that_may_not_be_written(base, place):
    shutil.copytree(base / "sparse", place / "old")
    os.chown(place / "old", NOBODY, NOBODY)
    said = ["no directory can be written there: Permission denied"]
    run_all(base, place, said, user=NOBODY)
    writers = {name: make for name, make in WRITERS.items() if name != "train"}
    run_all(base, place, said, place / "old", writers, user=NOBODY)


@root
def test_what_belongs_to_another_user(base, place):
    """In folders like /tmp one may write, and not rename what others have."""
    shutil.copytree(base / "sparse", place / "old")
    place.chmod(0o1777)
    writers = {name: make for name, make in WRITERS.items() if name != "train"}
    run_all(base, place, ["belongs to another user"], place / "old", writers, user=NOBODY)


@root
def test_a_full_disk(base, place):
    with mounted(place / "disk", "64k") as disk:
        (disk / "old").mkdir()
        (disk / "old" / "slidejax.json").write_text("{}")
        run_all(base, disk, ["are free", "No space left"])


def test_a_limit_of_files(base, place):
    run_all(base, place, ["ulimit -f", "File too large"], file_size=50_000)


@root
def test_a_mount_point(base, place):
    with mounted(place / "disk", "4m") as disk:
        run_all(base, place, ["is a mount point"], disk)
        state = {"run": recover(base, place / "new", "--checkpoint", disk)}
        work = {"run": calibrate(base, place / "new", "--work", disk)}
        [refusal], [done] = forked([state], [work])
        refused(refusal, "recover", [f"--checkpoint {str(disk)!r} is a mount point"])
        # files are put into this one, which any directory takes
        assert done[0] == 0 and "conversion" in os.listdir(disk), done


@pytest.mark.parametrize("kind", ["dangling", "loop", "good"])
def test_a_link(base, place, kind):
    target = {"dangling": "missing", "loop": "out", "good": "there"}[kind]
    (place / "out").symlink_to(target)
    if kind != "good":
        run_all(base, place, ["is a symbolic link"], place / "out")
        return
    shutil.copytree(base / "sparse", place / "there")
    writers = {name: make for name, make in WRITERS.items() if name != "train"}
    groups = [[{"run": make(base, place / "out")}] for make in writers.values()]
    for [found] in forked(*groups):
        assert found[0] == 0, found
        assert (place / "out").is_symlink() and sj.lm.load(place / "there")
    assert sorted(os.listdir(place)) == ["out", "there"]


@root
def test_a_user_without_a_home_can_do_everything(base, place):
    os.chown(place, NOBODY, NOBODY)
    environment = {"HOME": "/nonexistent", "SLIDEJAX_CACHE": ""}
    cases = [
        {"run": make(base, place / name), "user": NOBODY, "environment": environment}
        for name, make in WRITERS.items()
    ]
    for name, [found] in zip(WRITERS, forked(*([case] for case in cases)), strict=True):
        assert found[0] == 0, (name, found)
        assert (place / name).stat().st_uid == NOBODY
    assert sorted(os.listdir(place)) == sorted(WRITERS)


@root
def test_a_folder_for_finished_layers_or_states_is_tried_before_the_work(base, place):
    os.chown(place, NOBODY, NOBODY)
    (place / "closed").mkdir()
    (place / "file").write_text("")
    flags = {"--work": calibrate, "--checkpoint": recover}
    bad = {"closed/x": "Permission denied", "file": "", "file/x": ""}
    tried = [(flag, path) for flag in flags for path in bad]
    cases = [
        {"run": flags[flag](base, place / "out", flag, place / path), "user": NOBODY}
        for flag, path in tried
    ]
    before = _tree(place)
    for (flag, path), [found] in zip(tried, forked(*([c] for c in cases)), strict=True):
        refused(found, flag, [bad[path]])
        assert str(place / path) in found[2], found
    assert _tree(place) == before


def test_figures_that_cannot_be_written_are_shown(base):
    """The work of hours is not lost for a full disk."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    run = ("generate", base / "model", "--prompt", "a", "--max-new-tokens", "2")
    [[(status, out, err)]] = forked([{"run": (*run, "--json", "/dev/full")}])
    assert status == 1 and "cannot be written: No space left on device: '/dev/full'" in err
    assert json.loads(out[out.index("{") :])["tokens"] == 2


@pytest.mark.parametrize("writer", ["convert", "calibrate", "recover", "save"])
def test_of_two_at_once_one_wins_whole(base, place, writer):
    """The others say so before their work, or come after it."""
    make, out = WRITERS[writer], place / "out"
    found = forked([{"run": make(base, out)}] * 3)[0]
    won = [one for one in found if one[0] == 0]
    assert won
    for status, _, err in found:
        assert status == 0 or "written by another process" in err, found
    assert writer != "save" or len(won) == 3  # there is no work to lose
    sj.lm.load(out)
    assert os.listdir(place) == ["out"]

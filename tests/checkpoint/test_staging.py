"""Directories that appear complete or not at all."""

import os
import subprocess
import sys

import numpy as np
import pytest

import slidejax as sj
import slidejax.checkpoint
from slidejax.checkpoint.space import check_space
from slidejax.checkpoint.staging import check_apart, check_target, claimed, staged


def test_replacing_without_an_atomic_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr("slidejax.checkpoint.staging._exchange", lambda a, b: False)
    sj.checkpoint.save(tmp_path / "out", 1)
    sj.checkpoint.save(tmp_path / "out", 2)
    assert sj.checkpoint.load(tmp_path / "out") == 2 and os.listdir(tmp_path) == ["out"]


def test_other_peoples_directories_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="other things in it"):
        sj.checkpoint.save(tmp_path / "mine", {})
    with pytest.raises(ValueError, match="is a file"):
        sj.checkpoint.save(tmp_path / "mine" / "thesis.txt", {})
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_block_that_fails_changes_nothing(tmp_path):
    with staged(tmp_path / "out", "marker") as folder:
        (folder / "marker").write_text("first")

    def fail_half_way():
        with staged(tmp_path / "out", "marker") as folder:
            (folder / "marker").write_text("second")
            assert (tmp_path / "out" / "marker").read_text() == "first"
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert (tmp_path / "out" / "marker").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("atomic", [True, False])
def test_an_earlier_directory_goes_as_a_whole(tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr("slidejax.checkpoint.staging._exchange", lambda a, b: False)
    for files in (["marker", "merges.txt"], ["marker", "vocab.json"]):
        with staged(tmp_path / "deep" / "out", "marker") as folder:
            for file in files:
                (folder / file).write_text(file)
    assert sorted(os.listdir(tmp_path / "deep" / "out")) == ["marker", "vocab.json"]
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("atomic", [True, False])
def test_what_the_user_put_there_stays(tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr("slidejax.checkpoint.staging._exchange", lambda a, b: False)
    sj.checkpoint.save(tmp_path / "out", 1)
    (tmp_path / "out" / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "notes" / "deep" / "a.txt").write_text("mine")
    (tmp_path / "out" / "link").symlink_to("nowhere")
    sj.checkpoint.save(tmp_path / "out", 2)
    assert sj.checkpoint.load(tmp_path / "out") == 2 and os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "notes" / "deep" / "a.txt").read_text() == "mine"
    assert os.readlink(tmp_path / "out" / "link") == "nowhere"


def test_everything_is_as_readable_as_any_other_file(tmp_path):
    sj.checkpoint.save(tmp_path / "out", {"a": np.ones(3)})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode
    for file in (tmp_path / "out").iterdir():
        assert file.stat().st_mode == (tmp_path / "other" / "file").stat().st_mode


def test_links_and_mount_points(tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    sj.checkpoint.save(tmp_path / "link", 1)
    sj.checkpoint.save(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink() and sj.checkpoint.load(tmp_path / "place") == 2
    (tmp_path / "nowhere").symlink_to("missing/place")
    with pytest.raises(ValueError, match=r"symbolic link to .*missing/place"):
        sj.checkpoint.save(tmp_path / "nowhere", 1)
    with pytest.raises(ValueError, match="'/proc' is a mount point"):
        check_target("/proc", "marker")
    (tmp_path / "mounted here").mkdir()
    mounts = f"36 35 98:0 / {tmp_path!s}/mounted\\040here rw - ext3 /dev/root rw\n"
    (tmp_path / "mountinfo").write_text(mounts)
    monkeypatch.setattr("slidejax.checkpoint.staging._MOUNTS", tmp_path / "mountinfo")
    with pytest.raises(ValueError, match="is a mount point"):
        check_target(tmp_path / "mounted here", "marker")


def test_a_place_is_claimed_before_the_work(tmp_path):
    with claimed(tmp_path / "new" / "out", "marker") as target:
        assert os.listdir(tmp_path / "new") == [".out.claimed"]
        with pytest.raises(ValueError, match="written by another process"):
            claimed(target, "marker").__enter__()
        with staged(target, "marker") as folder:
            (folder / "marker").touch()
    assert os.listdir(tmp_path / "new") == ["out"]
    with pytest.raises(ValueError, match=r"an earlier result.*--force"):
        claimed(target, "marker", flag="--force").__enter__()
    with claimed(target, "marker", overwrite=True):
        pass
    with claimed(tmp_path / "a" / "b" / "out", "marker"):
        pass
    assert os.listdir(tmp_path) == ["new"]  # folders that were made for nothing are gone
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="no directory can be written there") as error:
        claimed(tmp_path / "file" / "out", "marker").__enter__()
    assert error.value.filename == str(tmp_path / "file" / "out")


def test_what_is_read_is_not_written(tmp_path):
    (tmp_path / "model" / "in").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    model = tmp_path / "model"
    for out, source, said in [
        (model, model, "which would be lost"),
        (tmp_path / "link", model, "which would be lost"),
        (model, tmp_path / "link", "which would be lost"),
        (tmp_path / "x" / ".." / "model", model, "which would be lost"),
        (model / "new" / "er", model, "lies in"),
        (tmp_path / "link" / "new", model, "lies in"),
        (model, model / "in", "holds"),
        (tmp_path, tmp_path / "link", "holds"),
    ]:
        with pytest.raises(ValueError, match=f"OUT '{out}'.*{said}"):
            check_apart(out, source, "OUT")
    for out, source in [
        (tmp_path / "models", model),
        (tmp_path / "new", model),
        (model / "in", model / "other"),  # is not there
        (model, None),
        (model, ""),
    ]:
        check_apart(out, source)


@pytest.mark.parametrize("bad", ["", "a\0b"])
def test_a_path_that_no_directory_can_have_is_named(bad):
    with pytest.raises(ValueError, match="OUT must name a directory"):
        check_target(bad, "m", "OUT")
    with pytest.raises(ValueError, match="OUT must name a directory"):
        check_apart(bad, ".", "OUT")


def test_space_is_looked_for(tmp_path, monkeypatch):
    check_space(tmp_path / "a" / "out", 1 << 20)
    with pytest.raises(OSError, match="MiB will be written"):
        check_space(tmp_path / "a" / "out", 1 << 60)
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 20, 1 << 20))
    with pytest.raises(OSError, match="ulimit -f"):
        check_space(tmp_path / "a" / "out", 2 << 20)


def test_finished_work_is_kept_if_only_its_place_is_lost(tmp_path):
    def somebody_was_faster():
        with staged(tmp_path / "out", "marker") as folder:
            (folder / "marker").write_text("an hour of work")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.txt").write_text("years")

    with pytest.raises(OSError, match=r"complete in '.*out\.written-1'"):
        somebody_was_faster()
    assert (tmp_path / "out.written-1" / "marker").read_text() == "an hour of work"
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"
    assert sorted(os.listdir(tmp_path)) == ["out", "out.written-1"]


# Runs writers in processes of their own, which begin at once, and kills them.
_WRITERS = """
import itertools, os, random, signal, sys, time
from pathlib import Path
from slidejax.checkpoint.staging import staged
out = Path(sys.argv[1])

def write(text):
    with staged(out, "marker") as folder:
        for file in ("marker", "other"):
            (folder / file).write_text(text * 100_000)

def start(name):
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        for k in itertools.count():
            if os.getppid() != parent:  # it failed, and waits for nobody
                os._exit(1)
            write(name + str(k))
    return child

def kill(*children):
    for child in children:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it had no error
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

def check():
    marker, other = ((out / file).read_text() for file in ("marker", "other"))
    assert marker == other and len(marker) >= 100_000

write("x")
rng = random.Random(0)
for _ in range(20):
    child = start("a")
    time.sleep(rng.uniform(0, 0.05))
    kill(child)
    check()
children = [start(name) for name in "bc"]
time.sleep(0.5)
kill(*children)
check()
write("y")
print(os.listdir(out.parent))
"""


def test_killed_writers_and_several_at_once(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", _WRITERS, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout == "['out']\n", ran.stderr  # whole, and nothing is left of the killed ones


def test_an_old_directory_gets_its_name_back(tmp_path, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".out.replaced-{dead.pid}").mkdir()
    (tmp_path / f".out.replaced-{dead.pid}" / "marker").write_text("old")

    def fail():
        with staged(tmp_path / "out", "marker"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "out" / "marker").read_text() == "old"


def test_a_limit_of_files_is_one_error(tmp_path):
    sj.checkpoint.save(tmp_path / "out", 1)
    code = (
        "import resource, sys, numpy as np, slidejax as sj, slidejax.checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: sj.checkpoint.save(sys.argv[1], {'a': np.ones(100_000)})\n"
        "except OSError as e: print(e)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert f"File too large: '{tmp_path}/out" in ran.stdout, ran.stderr
    assert sj.checkpoint.load(tmp_path / "out") == 1 and os.listdir(tmp_path) == ["out"]


def test_where_a_directory_may_be_written(tmp_path):
    assert check_target(tmp_path / "new", "marker") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert check_target(tmp_path / "empty", "marker") == tmp_path / "empty"
    with pytest.raises(ValueError, match="no marker"):
        check_target(tmp_path, "marker")
    (tmp_path / "marker").touch()
    assert check_target(tmp_path, "marker") == tmp_path

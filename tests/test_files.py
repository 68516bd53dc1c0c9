"""Files that a half-written one never replaces."""

import json
import os
import subprocess
import sys
import threading

import pytest

from slidejax.files import exclusive, replacing, write_json


def test_missing_folders_are_made(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": [1, None]})
    text = (tmp_path / "a" / "b.json").read_text()
    assert json.loads(text) == {"x": [1, None]} and text.endswith("\n")
    assert os.listdir(tmp_path / "a") == ["b.json"]


def test_an_earlier_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"first")

    def fail_half_way():
        with replacing(path) as file:
            file.write(b"sec")
            file.flush()
            assert path.read_bytes() == b"first"
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]
    with replacing(path) as file:
        file.write(b"second")
    assert path.read_bytes() == b"second" and os.listdir(tmp_path) == ["file"]


def test_a_value_that_is_no_json_leaves_the_file_alone(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == 1 and os.listdir(tmp_path) == ["file.json"]


def test_permissions_are_the_usual_or_those_of_before(tmp_path):
    (tmp_path / "other").touch()
    write_json(tmp_path / "new", 1)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    write_json(tmp_path / "new", 2)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


def test_links_stay_and_their_file_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    for value in (1, 2):
        write_json(tmp_path / "link", value)
        assert (tmp_path / "link").is_symlink()
        assert json.loads((tmp_path / "there" / "file").read_text()) == value


def test_pipes_and_devices_are_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_json(tmp_path / "pipe", [1])
    reader.join()
    assert json.loads(got[0]) == [1] and (tmp_path / "pipe").is_fifo()
    (tmp_path / "null").symlink_to("/dev/null")
    write_json(tmp_path / "null", 1)
    assert os.readlink(tmp_path / "null") == "/dev/null" and not os.path.isfile("/dev/null")
    code = "from slidejax.files import write_json; write_json('/dev/stdout', [1]); print('after')"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert "1" in (tmp_path / "out").read_text() and "after" in (tmp_path / "out").read_text()
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path, 1)
    with pytest.raises(OSError, match="No space left"):
        write_json("/dev/full", 1)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    code = (
        "import os, sys; from slidejax.files import replacing\n"
        "with replacing(sys.argv[1]) as file: os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")])
    assert len(os.listdir(tmp_path)) == 1
    with replacing(tmp_path / "file") as file:  # another writer at work is left alone
        write_json(tmp_path / "file", 1)
        assert len(os.listdir(tmp_path)) == 2
        file.write(b"2")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"2"


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_json(tmp_path / "file" / "below", 1)


def test_one_at_a_time(tmp_path):
    inside = []

    def work():
        with exclusive(tmp_path / "lock") as held:
            assert held
            inside.append(1)
            assert len(inside) == 1
            inside.pop()

    threads = [threading.Thread(target=lambda: [work() for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == []
    with exclusive(tmp_path / "lock"), exclusive(tmp_path / "lock", wait=False) as second:
        assert not second

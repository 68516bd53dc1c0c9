"""The memory that is found, and the models that are refused because they do not fit."""

import re
import types

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slidejax as sj
from slidejax.lm import load, memory, save
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.reading import bytes_of, read_head

MEMINFO = "MemTotal: 100 kB\nMemAvailable: {there} kB\nSwapFree: {swap} kB\nHugePages_Free: 0\n"


def host(tmp_path, there, swap=0, groups=()):
    """`/proc` and `/sys/fs/cgroup` of a machine; `groups` are (path, limit, used, swap)."""
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text(MEMINFO.format(there=there, swap=swap))
    (tmp_path / "self" / "cgroup").write_text("4:memory:/old\n0::/a/b\n")
    for path, limit, used, swap_limit in groups:
        folder = tmp_path / "groups" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.stat").write_text(f"anon {used}\nfile 77\n")
        (folder / "memory.swap.max").write_text(f"{swap_limit}\n")
    return memory._of_host(tmp_path, tmp_path / "groups")


@pytest.mark.parametrize(
    ("there", "swap", "groups", "expected"),
    [
        (8, 0, (), 8 << 10),
        (8, 4, (), 12 << 10),
        (8, 4, [("", "max", 0, "max")], 12 << 10),
        (8, 4, [("a/b", 5000, 1000, 0)], 4000),
        (8, 4, [("a/b", 5000, 1000, "max")], 8096),
        (8, 4, [("a/b", 5000, 1000, 50)], 4050),
        (8, 0, [("a", 3000, 1000, 0), ("a/b", 5000, 1000, 0)], 2000),
        (8, 0, [("a/b", 1000, 3000, 0)], 0),
        (8, 0, [("other", 1000, 0, 0)], 8 << 10),
    ],
)
def test_the_memory_of_a_host_is_the_most_that_it_can_give(tmp_path, there, swap, groups, expected):
    assert host(tmp_path, there, swap, groups) == expected


def test_a_system_without_these_files_is_not_checked(tmp_path):
    assert memory._of_host(tmp_path, tmp_path) is None


def test_a_gpu_gives_what_its_allocator_may_still_take(monkeypatch):
    monkeypatch.delenv("SLIDEJAX_MEMORY", raising=False)

    def device(stats):
        return types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)

    assert memory.available(device({"bytes_limit": 100, "bytes_in_use": 30})) == 70
    for unknown in (None, {}, {"bytes_in_use": 3}, {"bytes_limit": 0}):
        assert memory.available(device(unknown)) is None


def test_the_variable_says_what_there_is(monkeypatch):
    monkeypatch.setenv("SLIDEJAX_MEMORY", "0")
    assert memory.available() is None
    monkeypatch.setenv("SLIDEJAX_MEMORY", "1e3")
    assert memory.available() == 1000
    for bad in ("", "-1", "nan", "inf", "8GB"):
        monkeypatch.setenv("SLIDEJAX_MEMORY", bad)
        with pytest.raises(ValueError, match=r"SLIDEJAX_MEMORY must be a number of bytes"):
            memory.available()


@given(st.dictionaries(st.sampled_from("ab"), st.integers(0, 2000), min_size=1))
def test_only_what_does_not_fit_is_refused(sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIDEJAX_MEMORY", "1000")
        if sum(sizes.values()) <= 1000:
            memory.check_fits(sizes, "hint")
        else:
            with pytest.raises(MemoryError, match=r"1000|0\.0 MiB are there\. hint"):
                memory.check_fits(sizes, "hint")


@pytest.mark.parametrize("pattern", [None, "6:8", "dense"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_a_model_is_never_smaller_than_said(tmp_path, pattern, dtype):
    model = tiny()
    save(model if pattern is None else sj.lm.convert(model, pattern), tmp_path / "m")
    said = bytes_of(read_head(tmp_path / "m", text=False), tmp_path / "m", dtype)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(load(tmp_path / "m", dtype).params))
    assert 0.6 * size < said <= size


def test_codes_are_counted_as_codes():
    shapes = {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    assert memory.size_of(shapes, "bfloat16", codes=True) == 32
    assert re.fullmatch(r"2\.0 GiB", memory.shown_bytes(2**31))

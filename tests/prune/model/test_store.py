"""Finished stages on disk."""

import jax.numpy as jnp
import numpy as np
import pytest

from slidejax.prune.model.result import Pruned
from slidejax.prune.model.store import Store, kept_rows, remove


def pruned(rounded):
    mask = np.arange(40).reshape(10, 4) % 3 > 0
    kernel = jnp.where(mask, jnp.arange(40.0).reshape(10, 4), 0)
    return Pruned(jnp.asarray(mask), kernel, jnp.arange(1.0, 5.0) if rounded else None)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_stage_comes_back(tmp_path, rounded):
    store = Store(tmp_path / "work", "key")
    assert not store.has(3) and store.load(3) is None
    stage = {"a/b/kernel": pruned(rounded), "c/kernel": pruned(not rounded)}
    store.save(3, stage)
    again = Store(tmp_path / "work", "key")  # another process
    assert again.has(3) and not again.has(2)
    found = again.load(3)
    assert found.keys() == stage.keys()
    for path, one in stage.items():
        for name in ("mask", "kernel", "scale"):
            want, got = getattr(one, name), getattr(found[path], name)
            assert (want is None) == (got is None)
            if want is not None:
                assert want.dtype == got.dtype
                np.testing.assert_array_equal(want, got)


def test_a_folder_belongs_to_one_conversion(tmp_path):
    Store(tmp_path, "key")
    with pytest.raises(ValueError, match="another conversion"):
        Store(tmp_path, "another key")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bfloat16", "float32"])
def test_kernels_are_kept_in_the_smallest_form_that_is_exact(tmp_path, dtype):
    """In about as many bytes as the dtype has, and an eighth for the mask."""
    rng, rounded = np.random.default_rng(0), dtype in ("int8", "float8_e4m3fn")
    values = rng.normal(size=(400, 300)).astype(np.float32)
    mask = rng.random(values.shape) < 0.75
    scale = np.exp(rng.normal(size=300)).astype(np.float32) if rounded else None
    if rounded:
        codes = np.asarray(jnp.asarray(values * 40, dtype)).astype(np.float32)
        values = codes * scale
    kernel = np.where(mask, np.asarray(jnp.asarray(values, "float32" if rounded else dtype)), 0)
    stage = {"kernel": Pruned(mask, kernel.astype(np.float32), scale)}
    store = Store(tmp_path, "key")
    store.save(0, stage)
    [found] = store.load(0).values()
    np.testing.assert_array_equal(found.kernel, stage["kernel"].kernel)
    np.testing.assert_array_equal(found.mask, mask)
    size = (tmp_path / "stage-0000.safetensors").stat().st_size
    assert size < mask.size * (jnp.dtype(dtype).itemsize + 0.125) + 4000


def test_a_damaged_stage_counts_as_missing(tmp_path):
    store = Store(tmp_path, "key")
    for at in range(3):
        store.save(at, {"kernel": pruned(True)})
    file = tmp_path / "stage-0001.safetensors"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for bad in (b"", whole[:-30], bytes(flipped)):
        file.write_bytes(bad)
        with pytest.warns(UserWarning, match=r"stage-0001\.safetensors' is damaged"):
            assert store.load(1) is None
    assert store.load(0) and store.load(2)


def test_only_its_own_files_are_removed(tmp_path):
    folder = tmp_path / "work"
    Store(folder, "key").save(0, {"kernel": pruned(True)})
    (folder / "diary").write_text("dear")
    remove(folder)
    assert [file.name for file in folder.iterdir()] == ["diary"]
    (folder / "diary").unlink()
    remove(folder)
    assert not folder.exists()


def test_a_damaged_stage_is_computed_again(tmp_path):
    """Whatever byte is lost, changed or cut off."""
    store = Store(tmp_path / "work", "key")
    store.save(0, {"a/kernel": pruned(True)})
    [file] = [f for f in (tmp_path / "work").iterdir() if f.name.startswith("stage")]
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    spots = rng.choice(len(good), 40, replace=False)
    bad = [good[:at] for at in spots[:10]]
    bad += [good[:at] + bytes([good[at] ^ 1 << rng.integers(8)]) + good[at + 1 :] for at in spots]
    for data in bad:
        file.write_bytes(data)
        with pytest.warns(UserWarning, match=r"stage-0000.*computed again"):
            assert store.load(0) is None
        assert not file.exists() and not store.has(0)
    file.write_bytes(good)
    assert store.has(0)


def test_rows_are_made_once_and_again_if_they_are_damaged(tmp_path):
    made = []

    def make():
        made.append(1)
        return np.arange(6, dtype=np.int32).reshape(2, 3)

    folder = tmp_path / "work"
    for key, count in (("a" * 64, 1), ("a" * 64, 1), ("b" * 64, 2), ("a" * 64, 2)):
        np.testing.assert_array_equal(kept_rows(folder, key, make), [[0, 1, 2], [3, 4, 5]])
        assert len(made) == count
    (file,) = folder.glob("rows-aaaa*")
    good = file.read_bytes()
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:50], b""):
        file.write_bytes(bad)
        with pytest.warns(UserWarning, match="rows-aaaa.* the rows are written again"):
            kept_rows(folder, "a" * 64, make)
        assert file.read_bytes() == good
    remove(folder)
    assert not folder.exists()

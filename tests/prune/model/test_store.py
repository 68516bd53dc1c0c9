"""Finished stages on disk."""

import jax.numpy as jnp
import numpy as np
import pytest

from slidejax.prune.model.result import Pruned
from slidejax.prune.model.store import Store


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

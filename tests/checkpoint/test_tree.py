"""Trees of parameters as JSON and arrays, and back."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import slidejax as sj
import slidejax.checkpoint
from slidejax.checkpoint.tree import encode

leaves = st.sampled_from(
    [
        None,
        True,
        3,
        0.5,
        "text",
        np.zeros((0, 3), np.int8),
        np.float32(2.0),
        np.arange(4, dtype=np.uint32),
        np.eye(2),
    ]
)


keys = st.text("ab/~.' ", min_size=0, max_size=3) | st.integers(-2, 3)


trees = st.recursive(
    leaves,
    lambda t: (
        st.dictionaries(keys, t, max_size=3)
        | st.lists(t, max_size=3)
        | st.lists(t, max_size=2).map(tuple)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(tree=trees)
def test_any_tree_comes_back(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("tree") / "out"
    sj.checkpoint.save(path, tree)
    again = sj.checkpoint.load(path)

    def same(a, b):
        if isinstance(a, dict):
            assert (
                isinstance(b, dict)
                and list(a) == list(b)
                and all(type(x) is type(y) for x, y in zip(a, b, strict=False))
            )
            return all(same(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, (np.ndarray, np.generic)):
            return np.asarray(b).dtype == a.dtype and np.array_equal(a, b)
        return type(a) is type(b) and a == b

    assert same(tree, again)


def test_a_key_may_be_the_name_that_safetensors_keeps_for_itself(tmp_path):
    tree = {"__metadata__": np.arange(3), "__metadata__'": np.ones(2, np.int8)}
    sj.checkpoint.save(tmp_path / "out", tree)
    again = sj.checkpoint.load(tmp_path / "out")
    assert again.keys() == tree.keys()
    assert all(np.array_equal(again[key], tree[key]) for key in tree)


def test_no_two_paths_share_a_name():
    tree = {"a": {"b": np.zeros(1)}, "a/b": np.ones(1), "a~1b": np.full(1, 2.0)}
    arrays = {}
    encode(tree, (), arrays)
    assert sorted(float(array[0]) for array in arrays.values()) == [0, 1, 2]

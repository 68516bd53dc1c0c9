"""Saving and loading trees of parameters; damaged and foreign files."""

import json
import os
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st

import slidejax as sj
import slidejax.checkpoint
from slidejax.checkpoint import store
from slidejax.files import json_checksum
from slidejax.variants.prepared import map_weights
from slidejax.variants.serving import serving

DTYPES = ["int8", "float8_e4m3fn", "bfloat16", "float16", "float32"]


def kernel(shape=(70, 6), dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def small_tree():
    return {
        "layer/with~odd": {
            "kernel": sj.pack(kernel(), "6:8", dtype="int8"),
            "bias": jnp.arange(6, dtype=jnp.bfloat16),
        },
        "norm": {"scale": np.linspace(0, 1, 5, dtype=np.float16)},
    }


def test_a_checkpoint_names_the_version_that_wrote_it(tmp_path):
    sj.checkpoint.save(tmp_path / "params", small_tree())
    metadata = json.loads((tmp_path / "params" / store.METADATA).read_text())
    assert metadata["library_version"] == sj.__version__ and sj.__version__[0].isdigit()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["2:4", "6:8", "14:16", "dense"])
def test_packed_weights_come_back_bit_for_bit(tmp_path, pattern, dtype):
    w = sj.pack(kernel(), pattern, dtype=dtype)
    sj.checkpoint.save(tmp_path / "out", {"kernel": w})
    again = sj.checkpoint.load(tmp_path / "out")
    assert_same({"kernel": w}, again)
    np.testing.assert_array_equal(sj.unpack(w), sj.unpack(again["kernel"]))


def test_flax_containers_and_random_keys(tmp_path):
    sj.checkpoint.save(tmp_path / "frozen", freeze(small_tree()))
    assert_same(small_tree(), sj.checkpoint.load(tmp_path / "frozen"))

    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    sj.checkpoint.save(tmp_path / "nnx", nnx.state(model))
    other = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(5)), nnx.Dropout(0.5, rngs=nnx.Rngs(6)))
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, sj.checkpoint.load(tmp_path / "nnx"))
    nnx.update(other, state)
    x = jnp.ones((2, 4))
    np.testing.assert_array_equal(model(x), other(x))


def test_prepared_forms_are_not_saved(tmp_path):
    w = sj.pack(kernel(), "6:8").replace(prepared={"dense": kernel()})
    sj.checkpoint.save(tmp_path / "out", w)
    assert not sj.checkpoint.load(tmp_path / "out").prepared


def test_arrays_are_on_the_default_device_and_usable_under_jit(tmp_path):
    sj.checkpoint.save(tmp_path / "out", small_tree())
    params = sj.checkpoint.load(tmp_path / "out")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert jax.jit(lambda p: p["norm"]["scale"].sum())(params) == 2.5


# -------------------------------------------------------------------------- replacing what is there


def test_an_earlier_checkpoint_is_replaced_only_by_a_complete_one(tmp_path, monkeypatch):
    path = tmp_path / "out"
    sj.checkpoint.save(path, {"a": jnp.ones(3)})

    def fail_half_way(folder, arrays, metadata):
        (folder / store.ARRAYS).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(store, "_write", fail_half_way)
        with pytest.raises(OSError, match="disk full"):
            sj.checkpoint.save(path, {"a": jnp.zeros(3)})
    np.testing.assert_array_equal(sj.checkpoint.load(path)["a"], 1)
    sj.checkpoint.save(path, {"a": jnp.zeros(3)})
    np.testing.assert_array_equal(sj.checkpoint.load(path)["a"], 0)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "tree",
    [
        {"x": object()},
        {"x": {1.5: 2}},
        {"x": lambda: None},
        {"x": np.ma.masked_array([1.0, 2.0], [True, False])},
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, tree):
    with pytest.raises(TypeError, match="x"):
        sj.checkpoint.save(tmp_path / "out", tree)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------ damaged files


@pytest.fixture
def saved(tmp_path):
    sj.checkpoint.save(tmp_path / "out", small_tree())
    return tmp_path / "out"


def test_every_truncation_is_one_clear_error(saved):
    for file in (store.ARRAYS, store.METADATA):
        data = (saved / file).read_bytes()
        for size in {0, 1, 7, 8, 9, len(data) // 3, len(data) // 2, len(data) - 2}:
            (saved / file).write_bytes(data[:size])
            with pytest.raises(ValueError, match=file):
                sj.checkpoint.load(saved)
        (saved / file).write_bytes(data)
    sj.checkpoint.load(saved)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_flipped_bit_never_passes_in_silence(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("flip") / "out"
    tree = small_tree()
    sj.checkpoint.save(path, tree)
    file = path / data.draw(st.sampled_from([store.ARRAYS, store.METADATA]))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        again = sj.checkpoint.load(path)
    except ValueError:
        return
    assert_same(again, tree)  # what was flipped is white space


def test_sizes_are_checked_before_memory_is_taken(saved):
    """A header that claims a terabyte is refused by looking at the size of the file."""
    header = {"x": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    text = json.dumps(header).encode()
    (saved / store.ARRAYS).write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match=r"'x'.*does not fit"):
        sj.checkpoint.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "not a slidejax checkpoint"),
        (lambda m: m.update(format_version=99), "format_version 99"),
        (lambda m: m.pop("tree"), "no key 'tree'"),
        (lambda m: m["tree"].update(kind="pickle"), "not a description"),
        (lambda m: weight_of(m).update(pattern="4:9"), "pattern must be"),
        (lambda m: weight_of(m).update(pattern="2:4"), "layer/with~odd/kernel.*pattern 2:4"),
        (lambda m: weight_of(m).update(in_features=3), "at most 8"),
        (lambda m: weight_of(m).update(in_features=True), "in_features must be"),
        (lambda m: weight_of(m).update(dtype="bfloat16"), "values are int8"),
        (lambda m: weight_of(m)["values"].update(shape=[6, 8, 6]), "slidejax.json says"),
        (lambda m: weight_of(m)["zeros"].update(name="missing"), "lacks 'missing'"),
        (lambda m: weight_of(m)["zeros"].pop("dtype"), "an array needs"),
        (lambda m: m["tree"]["items"].pop(), "does not know"),
        (lambda m: m["tree"]["items"].append(m["tree"]["items"][0]), "each once"),
        (lambda m: m.update(more=1), "has a key 'more'"),
        (lambda m: m.update(format_version=True), "format_version True"),
    ],
)
def test_metadata_that_lies_is_refused(saved, change, message):
    metadata = json.loads((saved / store.METADATA).read_text())
    change(metadata)
    (saved / store.METADATA).write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=store.METADATA):  # by its checksum, or before
        sj.checkpoint.load(saved)
    metadata["sha256"] = json_checksum(metadata)
    (saved / store.METADATA).write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=message):
        sj.checkpoint.load(saved)


def test_files_of_version_1_had_no_checksum(saved):
    metadata = json.loads((saved / store.METADATA).read_text()) | {"format_version": 1}
    (saved / store.METADATA).write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="has a key 'sha256'"):  # one that lost its checksum
        sj.checkpoint.load(saved)
    del metadata["sha256"]
    (saved / store.METADATA).write_text(json.dumps(metadata))
    sj.checkpoint.load(saved)
    metadata["tree"] = {"kind": "constant", "valeu": 3}
    (saved / store.METADATA).write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"a constant has the keys .* got"):
        sj.checkpoint.load(saved)


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        *(("zeros", byte) for byte in (0x11, 0x12, 0x80)),
        *(("scale", bad) for bad in (np.nan, np.inf, 0.0, -1.0)),
    ],
)
def test_weights_that_pack_does_not_make_are_refused(tmp_path, leaf, value):
    """In a file, whose checksums are right, and before anything is written."""
    w = sj.pack(jnp.ones((8, 3)), "6:8", dtype="int8")
    changed = np.array(getattr(w, leaf))
    changed.flat[1] = value
    bad = w.replace(**{leaf: jnp.asarray(changed)})
    with pytest.raises(ValueError, match=rf"params at 'w'\.{leaf}\["):
        sj.checkpoint.save(tmp_path / "bad", {"w": bad})
    assert not os.listdir(tmp_path)
    sj.checkpoint.save(tmp_path / "out", {"w": w})
    metadata = json.loads((tmp_path / "out" / store.METADATA).read_text())
    ((_, node),) = metadata["tree"]["items"]
    node[leaf]["crc32"] = zlib.crc32(changed.tobytes())
    metadata["sha256"] = json_checksum(metadata)
    (tmp_path / "out" / store.METADATA).write_text(json.dumps(metadata))
    file = tmp_path / "out" / store.ARRAYS
    before = np.asarray(getattr(w, leaf)).tobytes()
    assert file.read_bytes().count(before) == 1
    file.write_bytes(file.read_bytes().replace(before, changed.tobytes()))
    with pytest.raises(ValueError, match=rf"'w'.*{leaf}\["):
        sj.checkpoint.load(tmp_path / "out")


def test_trees_that_are_too_deep_are_one_error(tmp_path):
    tree = 1
    for _ in range(5000):
        tree = [tree]
    with pytest.raises(ValueError, match="too deep"):
        sj.checkpoint.save(tmp_path / "out", tree)
    sj.checkpoint.save(tmp_path / "out", 1)
    file = tmp_path / "out" / store.METADATA
    metadata = json.loads(file.read_text()) | {"format_version": 1}
    del metadata["sha256"]
    for depth in (330, 5000):
        tree = '{"kind": "list", "items": [' * depth + '{"kind": "bad"}' + "]}" * depth
        text = json.dumps(metadata | {"tree": "here"}).replace('"here"', tree)
        file.write_text(text)
        with pytest.raises(ValueError, match=store.METADATA):
            sj.checkpoint.load(tmp_path / "out")


def weight_of(metadata):
    layer = dict(metadata["tree"]["items"])["layer/with~odd"]
    return dict(layer["items"])["kernel"]


def test_missing_and_foreign_directories(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*nowhere"):
        sj.checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "slidejax.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="not a slidejax checkpoint"):
        sj.checkpoint.load(tmp_path)


def test_a_deleted_array_is_named(tmp_path):
    w = sj.pack(jnp.ones((64, 8)), "6:8")
    jax.jit(lambda w: w, donate_argnums=0)(w)
    for tree in ({"a": {"kernel": w}}, {"a": {"kernel": w.values}}):
        with pytest.raises(ValueError, match=r"'a/kernel'.* was deleted, as a program deletes"):
            sj.checkpoint.save(tmp_path / "out", tree)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrap",
    [
        sj.trainable.masters,
        lambda tree: sj.adapters.add(tree, rank=1),
        lambda tree: map_weights(serving, tree),
    ],
)
def test_other_weights_than_packed_ones_are_refused_with_the_way_out(tmp_path, wrap):
    tree = wrap({"kernel": sj.pack(jnp.ones((64, 8)), "6:8", dtype="int8")})
    with pytest.raises(TypeError, match=r"'kernel' is a \w+Weight.*adapters\.merge and .*deploy"):
        sj.checkpoint.save(tmp_path / "out", tree)

"""Safetensors files: read as others write them, and refused where they are damaged."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from slidejax.checkpoint.arrays import ArrayFile, checksum


def write(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": shape or [end - begin], "data_offsets": [begin, end]}


@given(
    st.sampled_from(["int8", "uint8", "int32", "float16", "bfloat16", "float32", "bool"]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 99),
)
def test_arrays_come_back_as_safetensors_writes_them(tmp_path_factory, dtype, shape, seed):
    path = tmp_path_factory.mktemp("arrays") / "file.safetensors"
    rng = np.random.default_rng(seed)
    arrays = {
        name: rng.integers(0, 2, shape).astype(jnp.dtype(dtype)) for name in ("one", "another")
    }
    save_file(arrays, path)
    with ArrayFile(path) as file:
        for name, array in arrays.items():
            file.expect(name, dtype, tuple(shape))
            got = file.read(name)
            assert got.dtype == array.dtype and got.shape == array.shape
            np.testing.assert_array_equal(got, array)
        file.finish()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 2), "b": entry(1, 3)}, "'b' overlaps"),
        ({"a": entry(0, 1), "b": entry(2, 3)}, "'b' overlaps another array or leaves a gap"),
        ({"a": entry(0, 2)}, "expected"),
        ({"a": entry(0, 4)}, "does not fit"),
        ({"a": entry(0, 3, dtype="F32")}, "does not fit"),
        ({"a": entry(0, 3, dtype="F99")}, "unknown dtype"),
        ({"a": entry(0, 3, shape=[-3])}, "not a natural number"),
        ({"a": entry(0, 3, shape=[True, 3])}, "not a natural number"),
        ({"a": {"dtype": "U8"}}, "malformed"),
        ([], "not a JSON object"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, message):
    with pytest.raises(ValueError, match=message):
        ArrayFile(write(tmp_path / "file", header, b"123"))


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    """A header that claims a terabyte is refused by looking at the size of the file."""
    with pytest.raises(ValueError, match=r"'x'.*does not fit"):
        ArrayFile(write(tmp_path / "file", {"x": entry(0, 1 << 40, "F32", [1 << 38])}))


def test_files_that_are_no_files_of_arrays(tmp_path):
    with pytest.raises(ValueError, match="missing"):
        ArrayFile(tmp_path / "nowhere")
    for content in (b"", b"1234567", struct.pack("<Q", 100) + b"{}"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match="header does not fit"):
            ArrayFile(tmp_path / "file")
    (tmp_path / "file").write_bytes(struct.pack("<Q", 2) + b"{(")
    with pytest.raises(ValueError, match="not JSON"):
        ArrayFile(tmp_path / "file")


def test_each_array_is_asked_for_once(tmp_path):
    with ArrayFile(write(tmp_path / "file", {"a": entry(0, 1), "b": entry(1, 3)}, b"123")) as file:
        with pytest.raises(ValueError, match="lacks 'c'"):
            file.expect("c", "uint8", (1,))
        with pytest.raises(ValueError, match=r"'a' is uint8\[1\]"):
            file.expect("a", "int8", (1,))
        file.expect("a", "uint8", (1,))
        with pytest.raises(ValueError, match="'a' twice"):
            file.expect("a", "uint8", (1,))
        with pytest.raises(ValueError, match="holds 'b'"):
            file.finish()


def test_the_checksum_is_that_of_the_bytes():
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert checksum(array) == checksum(array.view(np.uint8)) != checksum(array + 1)

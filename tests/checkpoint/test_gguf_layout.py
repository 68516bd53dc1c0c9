"""The layout of GGUF files: what the package gguf wrote is read, and damage is one ValueError."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf")

from slidejax.checkpoint.gguf_layout import GGUFLayout

VALUES = {
    "a.text": ("string", "Ġword\n"),
    "a.flag": ("bool", True),
    "a.small": ("uint8", 200),
    "a.negative": ("int32", -7),
    "a.large": ("uint64", 1 << 40),
    "a.real": ("float32", 0.5),
    "a.double": ("float64", 0.1),
    "a.names": ("array", ["x", "", "▁y"]),
    "a.numbers": ("array", [1, -2, 3]),
    "a.reals": ("array", [0.5, 2.0]),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in VALUES.items():
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_tensor("one", np.arange(6, dtype=np.float32))
    writer.add_tensor("two", np.arange(12, dtype=np.float16).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_are_those_that_were_written(path):
    layout = GGUFLayout(path)
    assert layout.values == {"general.architecture": "llama"} | {
        key: value for key, (_, value) in VALUES.items()
    }
    one, two = layout.tensors["one"], layout.tensors["two"]
    assert (one.shape, two.shape) == ((6,), (3, 4))
    np.testing.assert_array_equal(layout.data(one, 24).view(np.float32), np.arange(6))
    np.testing.assert_array_equal(layout.data(two, 8).view(np.float16), np.arange(12).reshape(3, 4))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_one_error_and_takes_no_memory(path, tmp_path, data):
    """Bytes are replaced, and the file may be cut: lengths of 2**60 among them."""
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, len(content) - 8))
        new = data.draw(st.sampled_from([b"\xff", b"\x00", b"\x09", b"\x00" * 7 + b"\x10"]))
        content[at : at + len(new)] = new
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content[: data.draw(st.integers(4, len(content)))])
    try:
        layout = GGUFLayout(damaged)
        for place in layout.tensors.values():
            layout.data(place, 4 * place.shape[-1])
    except ValueError as e:
        said = str(e)
    else:
        said = "damaged.gguf"  # the change did not matter to the layout
    assert "damaged.gguf" in said


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"GOOF", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "expected 2 or 3 .little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "damaged or cut short"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60) + b"x" * 20, "damaged or cut short"),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1),
            "key 'k': an array of values of type 9",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + struct.pack("<Q1sIQ", 1, b"k", 10, 5) * 2,
            "twice",
        ),
    ],
)
def test_what_is_no_such_file_is_refused(content, match, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        GGUFLayout(tmp_path / "model.gguf")

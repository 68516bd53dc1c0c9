"""A GGUF file in parts, to be changed and put together again, whatever it then says."""

import dataclasses
import math
import random
import struct

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclasses.dataclass
class Key:
    """A key of the metadata.

    Attributes:
      name: its name.
      kind: the number of its type.
      payload: its value as it lies in the file.
    """

    name: bytes
    kind: int
    payload: bytes


@dataclasses.dataclass
class Tensor:
    """The entry of a tensor in the header."""

    name: bytes
    dims: list[int]
    kind: int
    start: int
    axes: int | None = None  # what it says instead of the number of `dims`


@dataclasses.dataclass
class Parts:
    """The parts of a file; `more_*` is added to what the header counts."""

    keys: list[Key]
    tensors: list[Tensor]
    data: bytes
    alignment: int = 32
    more_keys: int = 0
    more_tensors: int = 0

    def key(self, name):
        """The key of a name, or None."""
        return next((key for key in self.keys if key.name == name.encode()), None)

    def put(self, name, kind, payload):
        """Replaces a key or adds one."""
        key = self.key(name)
        if key is None:
            self.keys.append(Key(name.encode(), kind, payload))
        else:
            key.kind, key.payload = kind, payload

    def tensor(self, name):
        """The tensor of a name."""
        return next(tensor for tensor in self.tensors if tensor.name == name.encode())

    def write(self):
        """The file."""
        counts = len(self.tensors) + self.more_tensors, len(self.keys) + self.more_keys
        parts = [b"GGUF", struct.pack("<IQQ", 3, *counts)]
        for key in self.keys:
            parts += [text(key.name), struct.pack("<I", key.kind), key.payload]
        for tensor in self.tensors:
            axes = len(tensor.dims) if tensor.axes is None else tensor.axes
            parts += [text(tensor.name), struct.pack("<I", axes)]
            parts += [struct.pack("<Q", dim) for dim in tensor.dims]
            parts += [struct.pack("<IQ", tensor.kind, tensor.start)]
        header = b"".join(parts)
        return header + b"\0" * (-len(header) % self.alignment) + self.data


def number(value, kind):
    """A number as it lies in a file, wrapped to its type."""
    code = _CODES[kind]
    if code in "fd":
        with_limit = value if not math.isfinite(value) else max(min(value, 3e38), -3e38)
        return struct.pack(f"<{code}", with_limit)
    size = struct.calcsize(f"<{code}")
    return (int(value) % 256**size).to_bytes(size, "little")


def text(value):
    """A text as it lies in a file."""
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def array(kind, items, count=None):
    """An array of payloads, which may say another count."""
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


def items_of(payload):
    """The type of an array, and the payloads of its items."""
    kind, count = struct.unpack_from("<IQ", payload)
    at, items = 12, []
    for _ in range(count):
        size = _size(payload, at, kind)
        items.append(payload[at : at + size])
        at += size
    return kind, items


def _size(data, at, kind):
    """How many bytes a value has that begins at a place."""
    if kind in _CODES:
        return struct.calcsize(f"<{_CODES[kind]}")
    if kind == STRING:
        return 8 + struct.unpack_from("<Q", data, at)[0]
    kind, count = struct.unpack_from("<IQ", data, at)
    size = 12
    for _ in range(count):
        size += _size(data, at + size, kind)
    return size


def parts_of(data):
    """The parts of a sound file."""
    tensors, keys = struct.unpack_from("<QQ", data, 8)
    at, parts = 24, Parts([], [], b"")

    def take(size):
        nonlocal at
        at += size
        return data[at - size : at]

    for _ in range(keys):
        name = take(_size(data, at, STRING))[8:]
        (kind,) = struct.unpack("<I", take(4))
        parts.keys.append(Key(name, kind, take(_size(data, at, kind))))
    for _ in range(tensors):
        name = take(_size(data, at, STRING))[8:]
        (axes,) = struct.unpack("<I", take(4))
        dims = list(struct.unpack(f"<{axes}Q", take(8 * axes)))
        kind, start = struct.unpack("<IQ", take(12))
        parts.tensors.append(Tensor(name, dims, kind, start))
    parts.data = data[at + -at % 32 :]
    return parts


# --- changes --------------------------------------------------------------------------------------

# Values of every type that no key should have.
ODD = [
    *((kind, number(value, kind)) for kind in (4, 5, 10, 11) for value in (0, 1, -1, 2**31, 2**63)),
    *(
        (kind, number(value, kind))
        for kind in (6, 12)
        for value in (0, -1, math.nan, math.inf, 9e37)
    ),
    *((7, bytes([value])) for value in (0, 1, 2)),
    *((STRING, text(value)) for value in ("", "x", "none", "../x", b"\xff\xfe", "a" * 5000)),
    (STRING, struct.pack("<Q", 2**60)),
    (ARRAY, array(4, [])),
    (ARRAY, array(4, [number(1, 4)] * 3)),
    (ARRAY, array(5, [number(-1, 5)] * 2)),
    (ARRAY, array(6, [number(math.nan, 6)] * 2)),
    (ARRAY, array(STRING, [text("x")] * 2)),
    (ARRAY, array(STRING, [], 2**40)),
    (ARRAY, array(4, [], 2**62)),
    (ARRAY, array(0, [b"\1" * 100_000])),
    (ARRAY, array(ARRAY, [array(4, [number(1, 4)])])),
    (ARRAY, array(ARRAY, [struct.pack("<IQ", ARRAY, 1)] * 500, 1)),
    (ARRAY, array(77, [])),
    (13, b""),
    (2**32 - 1, b""),
]

# Keys that change what is computed, or how a text is read, which the file may not have.
KNOWN = [
    "general.alignment",
    "general.architecture",
    "general.type",
    "split.count",
    "llama.vocab_size",
    "llama.expert_count",
    "llama.attention.sliding_window",
    "llama.attention.sliding_window_pattern",
    "llama.attention.key_length",
    "llama.attention.value_length",
    "llama.attention.causal",
    "llama.rope.dimension_count",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scale_linear",
    "tokenizer.chat_template",
    "tokenizer.chat_templates",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
]


def change(rng: random.Random, data: bytes) -> bytes:
    """A file with one change in what its header says."""
    parts = parts_of(data)
    rng.choice([_change_key, _change_key, _change_array, _change_tensor, _change_list])(rng, parts)
    return parts.write()


def _change_key(rng, parts):
    key = rng.choice(parts.keys)
    match rng.randrange(6):
        case 0 | 1:
            key.kind, key.payload = rng.choice(ODD)
        case 2:
            parts.put(rng.choice(KNOWN), *rng.choice(ODD))
        case 3:
            parts.put(rng.choice([k.name.decode() for k in parts.keys]), *rng.choice(ODD))
        case 4:
            key.kind = rng.choice([*range(14), 99])
        case 5:
            if key.kind in _CODES:
                code = f"<{_CODES[key.kind]}"
                (old,) = struct.unpack(code, key.payload)
                new = rng.choice([old + 1, old - 1, -old, 2 * old, 1000 * old, old // 2, 0])
                key.payload = number(new, key.kind)
            else:
                key.payload = rng.choice([key.payload[:-1], key.payload + b"\0", key.payload * 2])


def _change_array(rng, parts):
    key = rng.choice([key for key in parts.keys if key.kind == ARRAY])
    kind, items = items_of(key.payload)
    at = rng.randrange(len(items))
    match rng.randrange(8):
        case 0:
            items.pop()
        case 1:
            items.insert(at, items[at])
        case 2:
            other = rng.randrange(len(items))
            items[at], items[other] = items[other], items[at]
        case 3:
            items = items[: len(items) // 2]
        case 4:
            items = items * rng.choice([2, 50])
        case 5:
            items = []
        case 6 if kind == STRING:
            odd = ["", " ", "x", "a b c", "  ", "\u0120", "x" * 3000, b"\xff", "\0"]
            items[at] = text(rng.choice(odd))
        case 6:
            items[at] = number(rng.choice([0, 1, -1, 7, 2**31, 2**31 - 1]), kind)
        case 7:
            key.payload = array(kind, items, rng.choice([0, len(items) - 1, len(items) + 1, 2**50]))
            return
    key.payload = array(kind, items)


def _change_tensor(rng, parts):
    tensor, other = rng.choice(parts.tensors), rng.choice(parts.tensors)
    match rng.randrange(9):
        case 0:
            tensor.start = other.start
        case 1:
            tensor.start += rng.choice([1, -1, 4, 32, 2**20, 2**62, 2**63])
            tensor.start %= 2**64
        case 2:
            tensor.kind = rng.choice([*range(40), 99, 2**31])
        case 3:
            tensor.dims[0] = rng.choice([0, 1, tensor.dims[0] - 1, 2**31, 2**32, 2**63, 2**64 - 1])
        case 4:
            tensor.dims = rng.choice(
                [[2**32] * 2, [2**63, 2], [2**16] * 4, [0] * 4, [*tensor.dims, 1]]
            )
        case 5:
            tensor.dims = tensor.dims[::-1]
        case 6:
            tensor.axes = rng.choice([0, 1, 2, 3, 5, 2**31, 2**32 - 1])
        case 7:
            tensor.name = rng.choice(
                [other.name, b"", b"x", b"\xff", tensor.name + b"x", b"a" * 70_000]
            )
        case 8:
            tensor.dims, other.dims = other.dims, tensor.dims


def _change_list(rng, parts):
    match rng.randrange(8):
        case 0:
            parts.keys.remove(rng.choice(parts.keys))
        case 1:
            parts.tensors.remove(rng.choice(parts.tensors))
        case 2:
            parts.keys.insert(0, rng.choice(parts.keys))
        case 3:
            parts.tensors.insert(0, rng.choice(parts.tensors))
        case 4:
            parts.more_keys = rng.choice([1, -1, 2**40, 2**62])
        case 5:
            parts.more_tensors = rng.choice([1, -1, 2**40, 2**62])
        case 6:
            parts.data = rng.choice([b"", parts.data[:-1], parts.data[:100], parts.data[32:]])
        case 7:
            key = rng.choice(parts.keys)
            key.name = rng.choice(
                [b"", b"\xff", key.name + b"x", b"llama." + key.name, b"k" * 70_000]
            )

"""Random changes of files, by what is in them: JSON, safetensors, GGUF, msgpack, bytes."""

import json
import random
import struct

import gguf_parts

_ODD = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.5,
    2**31,
    2**63,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../x",
    "\ud800",
    "a" * 5000,
    [],
    {},
    [None],
    [[[[1]]]],
    {"": 1},
    {"type": "x"},
)


def _places(value, path=()):
    """The paths of everything in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, (*path, key))
    if isinstance(value, list):
        for key, inner in enumerate(value):
            yield from _places(inner, (*path, key))


def change_json(rng: random.Random, value):
    """A JSON value with one change somewhere."""
    value = json.loads(json.dumps(value))
    places = [path for path in _places(value) if path]
    if not places:
        return rng.choice(_ODD)
    # Each depth has the same chance; else nearly all changes would be in long lists.
    depth = rng.choice(sorted({len(path) for path in places}))
    path = rng.choice([path for path in places if len(path) == depth])
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], holder[path[-1]]
    kinds = ["odd", "odd", "drop"]
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        kinds += ["number", "number"]
    if isinstance(old, str) and old:
        kinds += ["text", "text"]
    if isinstance(old, (list, dict)) and old:
        kinds += ["grow", "shrink"]
    kinds += ["rename", "swap"] if isinstance(holder, dict) else ["double", "swap"]
    match rng.choice(kinds):
        case "odd":
            holder[key] = rng.choice(_ODD)
        case "drop":
            del holder[key]
        case "number":
            holder[key] = rng.choice([old + 1, old - 1, -old, old * 2, old * 1000, float(old) / 3])
        case "text":
            at = rng.randrange(len(old))
            holder[key] = rng.choice(
                [old[:at], old[:at] + chr(ord(old[at]) ^ 1) + old[at + 1 :], old + old, old.upper()]
            )
        case "grow":
            if isinstance(old, list):
                old.append(rng.choice(_ODD))
            else:
                old[rng.choice(["x", "type", "kind", ""])] = rng.choice(_ODD)
        case "shrink":
            old.pop(rng.choice(list(old)) if isinstance(old, dict) else rng.randrange(len(old)))
        case "rename":
            at = rng.randrange(len(key) + 1)
            holder[key[:at] + "x" + key[at:]] = holder.pop(key)
        case "double":
            holder.insert(key, old)
        case "swap":
            other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[key], holder[other] = holder[other], old
    return value


def change_bytes(rng: random.Random, data: bytes, within: int | None = None) -> bytes:
    """Bytes with one change: flipped, cut, repeated, inserted."""
    if not data:
        return b"\0"
    at = rng.randrange(min(len(data), within or len(data)))
    match rng.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(rng.choice([1, 4, 8])) + data[at:]
        case 2:
            return data[:at] + data[at + rng.choice([1, 4, 8]) :]
        case 3:
            return data[:at] + data[at // 2 : at] + data[at:]
        case 4:
            return data[:at] + rng.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" * 4]) + data[at + 8 :]
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def change_json_file(rng: random.Random, data: bytes) -> bytes:
    """A JSON file: its content, its text, or what it says is there nine levels or 100,000 deep."""
    match rng.randrange(12):
        case 0 | 1:
            return change_bytes(rng, data)
        case 2:
            depth = rng.choice([40, 330, 100_000])
            return rng.choice([b"[" * depth, b'{"a":' * depth + b"1" + b"}" * depth])
        case 3:
            deep = '{"kind":"list","items":[' * 330 + "1" + "]}" * 330
            value = json.loads(data)
            key = rng.choice(list(value) or ["x"])
            return json.dumps({**value, key: "HERE"}).replace('"HERE"', deep).encode()
    return json.dumps(change_json(rng, json.loads(data))).encode()


def change_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file: its length, its header, its bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    match rng.randrange(6):
        case 0:
            return change_bytes(rng, data)
        case 1:
            return change_bytes(rng, data, 8 + length)
        case 2:
            new = rng.choice([0, 1, length - 1, length + 1, length + 8, len(data), 2**40, 2**63])
            return struct.pack("<Q", new) + data[8:]
    header = json.dumps(change_json(rng, json.loads(data[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def change_msgpack(rng: random.Random, data: bytes) -> bytes:
    """A msgpack file; most of it are lengths and codes of types."""
    return change_bytes(rng, data, rng.choice([64, 1024, len(data)]))


def change_gguf(rng: random.Random, data: bytes) -> bytes:
    """A GGUF file: what its header says, or bytes of it, most often near its beginning."""
    if rng.randrange(3):
        return gguf_parts.change(rng, data)
    header = data.rindex(b"output_norm.weight") + 64
    return change_bytes(rng, data, rng.choice([24, 400, header, len(data)]))

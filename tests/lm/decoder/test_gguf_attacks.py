"""GGUF files with absurd metadata: one error that names file and key, in no time and memory."""

import math
import resource
import struct
import time

import pytest

pytest.importorskip("gguf")

import gguf_parts
from gguf_parts import ARRAY, STRING, array, number, text

import slidejax as sj
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.models import load_model

U32, I32, F32, BOOL, U64 = 4, 5, 6, 7, 10
TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a small file with a tokenizer."""
    from lm.decoder.test_gguf import write

    words = {"model": "gpt2", "pre": "smollm", "merges": ['! "'], "token_type": [1] * 64}
    words["tokens"] = ['!"', "Ġ", *map(chr, range(33, 95))]
    words["scores"] = [0.5] * 64
    change = {f"tokenizer.ggml.{name}": value for name, value in words.items()}
    change["llama.attention.head_count_kv"] = 2
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", tiny(), change=change).read_bytes()


def put(key, kind, payload):
    return lambda parts: parts.put(key, kind, payload)


def u32(key, value):
    return put(key, U32, number(value, U32))


def edit(key, change):
    """Changes the list of payloads of an array."""

    def changed(parts):
        kind, items = gguf_parts.items_of(parts.key(key).payload)
        parts.key(key).payload = array(kind, change(items))

    return changed


def tensor(name, **fields):
    def changed(parts):
        for field, value in fields.items():
            setattr(parts.tensor(name), field, value)

    return changed


SIZES = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "rope.dimension_count",
    "vocab_size",
)
NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
FLOATS = (0.0, -1.0, math.nan, math.inf, -math.inf)
NO_SIZES = {
    "zero": (U32, number(0, U32)),
    "negative": (I32, number(-3, I32)),
    "huge": (U64, number(2**63, U64)),
    "a fraction": (F32, number(2.5, F32)),
    "nan": (F32, number(math.nan, F32)),
    "true": (BOOL, b"\1"),
    "a text": (STRING, text("4")),
    "an empty list": (ARRAY, array(U32, [])),
    "a long list": (ARRAY, array(U32, [number(4, U32)] * 9)),
    "a list of texts": (ARRAY, array(STRING, [text("4")] * 2)),
}
IDS = ("bos", "eos", "eot", "padding")

# what is wrong -> (a change of the parts, what the error names)
ATTACKS = {
    **{
        f"{key} is {what}": (put(f"llama.{key}", *value), f"llama.{key}")
        for key in SIZES
        for what, value in NO_SIZES.items()
    },
    **{
        f"{key} is {value}": (put(f"llama.{key}", F32, number(value, F32)), f"llama.{key}")
        for key in (*NUMBERS, "rope.scaling.factor", "rope.scale_linear")
        for value in FLOATS
    },
    **{
        f"{key} is {what}": (put(f"llama.{key}", *NO_SIZES[what]), f"llama.{key}")
        for key in NUMBERS
        for what in ("true", "a text", "an empty list")
    },
    "a double beyond float32": (
        put("llama.rope.freq_base", 12, struct.pack("<d", 1e300)),
        "llama.rope.freq_base",
    ),
    "a scaling of an unknown type": (
        put("llama.rope.scaling.type", STRING, text("yarn")),
        "llama.rope.scaling.type",
    ),
    "a scaling whose type is a number": (
        u32("llama.rope.scaling.type", 1),
        "llama.rope.scaling.type",
    ),
    "heads that do not divide": (
        u32("llama.attention.head_count_kv", 3),
        "attention.head_count_kv",
    ),
    **{
        f"a window that is {what}": (
            put("llama.attention.sliding_window", *NO_SIZES[what]),
            "attention.sliding_window",
        )
        for what in ("negative", "huge", "nan", "true", "a text", "an empty list")
    },
    "more tokens than embeddings": (
        edit(TOKENS, lambda items: [*items, text("more")]),
        TOKENS,
    ),
    "no tokens": (edit(TOKENS, lambda items: []), "tokenizer.ggml"),
    "a token twice": (edit(TOKENS, lambda items: [items[1], *items[1:]]), TOKENS),
    "tokens that are numbers": (
        put(TOKENS, ARRAY, array(U32, [number(1, U32)] * 64)),
        TOKENS,
    ),
    "tokens that are a text": (put(TOKENS, STRING, text("t" * 64)), TOKENS),
    "a token that is no Unicode": (edit(TOKENS, lambda items: [text(b"\xff"), *items[1:]]), TOKENS),
    **{
        f"{key} of another length": (
            edit(f"tokenizer.ggml.{key}", lambda items: items[:-1]),
            f"tokenizer.ggml.{key}",
        )
        for key in ("scores", "token_type")
    },
    "scores that are nan": (
        edit("tokenizer.ggml.scores", lambda items: [number(math.nan, F32)] * 64),
        "tokenizer.ggml.scores",
    ),
    "types that are texts": (
        put("tokenizer.ggml.token_type", ARRAY, array(STRING, [text("1")] * 64)),
        "tokenizer.ggml.token_type",
    ),
    **{
        f"the merge {merge!r}": (edit(MERGES, lambda items, m=merge: [text(m)]), MERGES)
        for merge in ("", " ", "a", "a ", " a", "! zz", "! !")
    },
    "merges that are numbers": (put(MERGES, ARRAY, array(U32, [number(1, U32)])), MERGES),
    **{
        f"{name} is {what}": (
            put(f"tokenizer.ggml.{name}_token_id", kind, payload),
            f"tokenizer.ggml.{name}_token_id",
        )
        for name in IDS
        for what, (kind, payload) in {
            "negative": NO_SIZES["negative"],
            "beyond the tokens": (U32, number(64, U32)),
            "true": NO_SIZES["true"],
            "a text": NO_SIZES["a text"],
            "nan": NO_SIZES["nan"],
        }.items()
    },
    "a chat template that is a number": (
        u32("tokenizer.chat_template", 1),
        "tokenizer.chat_template",
    ),
    "add_bos_token that is a text": (
        put("tokenizer.ggml.add_bos_token", STRING, text("no")),
        "tokenizer.ggml.add_bos_token",
    ),
    "a pre-tokenizer that is a list": (
        put("tokenizer.ggml.pre", ARRAY, array(U32, [])),
        "tokenizer.ggml.pre",
    ),
    "an architecture that is a list": (
        put("general.architecture", ARRAY, array(U32, [])),
        "general.architecture",
    ),
    "a list of lists": (
        put("llama.block_count", ARRAY, array(ARRAY, [array(U32, [])])),
        "llama.block_count",
    ),
    "lists 2,000 levels deep": (
        put("llama.block_count", ARRAY, struct.pack("<IQ", ARRAY, 1) * 2000),
        "llama.block_count",
    ),
    "a list that says it has 2**60 entries": (
        put("llama.block_count", ARRAY, array(U32, [], 2**60)),
        "llama.block_count",
    ),
    "a text that says it has 2**60 bytes": (
        put("general.name", STRING, struct.pack("<Q", 2**60)),
        "general.name",
    ),
    "a value of an unknown type": (put("general.name", 77, b""), "general.name"),
    "a truth value that is 2": (put("general.flag", BOOL, b"\2"), "general.flag"),
    "a key twice": (lambda parts: parts.keys.append(parts.keys[3]), "twice"),
    "a tensor twice": (lambda parts: parts.tensors.append(parts.tensors[3]), "twice"),
    **{
        f"an alignment of {value}": (u32("general.alignment", value), "general.alignment")
        for value in (0, 1, 12, 2**31)
    },
    "a tensor that is not aligned": (tensor("blk.0.ffn_up.weight", start=4), "blk.0.ffn_up.weight"),
    "two tensors in one place": (tensor("blk.0.ffn_up.weight", start=0), "overlap"),
    "a tensor beyond the file": (tensor("blk.0.ffn_up.weight", start=2**40), "cut short"),
    **{
        f"the sizes {dims}": (tensor("blk.0.ffn_up.weight", dims=dims), name)
        for dims, name in (
            ([0, 4], "blk.0.ffn_up.weight"),
            ([2**32, 2**32], "cut short"),
            ([2**63, 2], "cut short"),
            ([2**16] * 4, "cut short"),
            ([8, 8], "blk.0.ffn_up.weight"),
        )
    },
    "a tensor of no axes": (tensor("blk.0.ffn_up.weight", axes=0), "blk.0.ffn_up.weight"),
    "a tensor of 2**31 axes": (tensor("blk.0.ffn_up.weight", axes=2**31), "blk.0.ffn_up.weight"),
    "an unknown quantisation": (tensor("blk.0.ffn_up.weight", kind=99), "blk.0.ffn_up.weight"),
    "rows that are no whole blocks": (
        tensor("blk.0.ffn_up.weight", kind=12),
        "blk.0.ffn_up.weight",
    ),
    "fewer keys than it says": (lambda parts: setattr(parts, "more_keys", 1), "damaged"),
    "2**60 keys": (lambda parts: setattr(parts, "more_keys", 2**60), "keys"),
    "2**40 tensors": (lambda parts: setattr(parts, "more_tensors", 2**40), "tensors"),
}

# These take as many bytes as they say, and Python would take many times that.
LARGE = {
    "a list of 40 million bytes": put(
        "general.x", ARRAY, array(0, [b"\1" * 40_000_000], 40_000_000)
    ),
    "five million empty texts": put(
        "general.x", ARRAY, array(STRING, [b"\0" * 40_000_000], 5_000_000)
    ),
    "a text of 40 MB and one wide letter": put("general.x", STRING, text("a" * 40_000_000 + "🌙")),
    "a million keys": lambda parts: parts.keys.extend(
        gguf_parts.Key(b"general.%d" % i, 0, b"\0") for i in range(1_000_000)
    ),
    "a text of 100 MB": put("general.x", STRING, text("a" * 100_000_000)),
}


def refused(path, read):
    """The error that reading a file raises, in less than a second."""
    begun = time.process_time()
    with pytest.raises((ValueError, OSError, NotImplementedError)) as error:
        read(path)
    assert time.process_time() - begun < 1
    assert str(path) in str(error.value), error.value
    return str(error.value)


def changed(tmp_path, sound, change):
    parts = gguf_parts.parts_of(sound)
    change(parts)
    (tmp_path / "bad.gguf").write_bytes(parts.write())
    return tmp_path / "bad.gguf"


@pytest.mark.parametrize("attack", ATTACKS)
def test_absurd_metadata_are_refused_by_name(tmp_path, sound, attack):
    change, named = ATTACKS[attack]
    said = refused(changed(tmp_path, sound, change), sj.lm.load)
    assert named in said and len(said) < 600


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_flax_model_of_transformers_refuses_them_too(tmp_path, sound, attack):
    pytest.importorskip("transformers")
    change, named = ATTACKS[attack]
    if attack in ("more tokens than embeddings", "no tokens"):
        named = ""  # it takes the tokens for the vocabulary
    if "eot" in attack:
        named = ""
    said = refused(changed(tmp_path, sound, change), load_model)
    assert named in said


@pytest.mark.parametrize("attack", LARGE)
def test_large_metadata_take_no_more_memory_than_the_file(tmp_path, sound, attack):
    path = changed(tmp_path, sound, LARGE[attack])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        sj.lm.load(path)
    except ValueError as e:
        said = str(e)
    else:
        said = str(path)  # it fits
    assert str(path) in said
    grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grew < 200 + (path.stat().st_size >> 20)


def test_what_is_not_damaged_is_read(tmp_path, sound):
    """Lists with the same number for each layer, tokens without a text, and another alignment."""
    sizes = array(U32, [number(2, U32)] * 2)

    def change(parts):
        parts.put("llama.attention.head_count_kv", ARRAY, sizes)
        edit(TOKENS, lambda items: [*items[:-2], text(""), text("")])(parts)
        parts.keys.append(gguf_parts.Key(b"general.alignment", U32, number(8, U32)))
        parts.alignment = 8

    model = sj.lm.load(changed(tmp_path, sound, change))
    assert model.config.num_kv_heads == 2 and model.tokenizer.encode("!") == [2]

"""Damaged files of every kind: one clear error, in no time and no memory, or the same content.

A normal run tries a few changes of each file. All of them:

    SLIDEJAX_TEST_MUTATIONS=20000 python -m pytest tests/test_fuzz.py
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutations import (
    change_bytes,
    change_gguf,
    change_json_file,
    change_msgpack,
    change_safetensors,
)

import slidejax as sj
import slidejax.checkpoint
from slidejax.lm.decoder import examples
from slidejax.lm.decoder.gguf import GGUF_TOKENIZER
from slidejax.lm.models import load_model
from slidejax.lm.reading import read_model
from slidejax.lm.text.examples import byte_tokenizer
from slidejax.ops import tuning
from slidejax.prune.model.result import Pruned
from slidejax.prune.model.store import Store

MUTATIONS = int(os.environ.get("SLIDEJAX_TEST_MUTATIONS", "280"))
_SECONDS, _MIB = 1.0, 200


# --- the kinds of files ---------------------------------------------------------------------------


def checkpoint(folder):
    w = sj.pack(jnp.arange(64.0).reshape(16, 4), "6:8", dtype="int8")
    tree = {"a/b": {"kernel": w, "bias": jnp.ones(4, jnp.bfloat16)}, "n": [1, None, "x", 2.5]}
    tree["key"] = jax.random.key(0)
    sj.checkpoint.save(folder, tree)
    return sj.checkpoint.load


def saved_decoder(folder):
    model = examples.tiny()
    model = sj.lm.Decoder(model.config, model.params, files=byte_tokenizer().files())
    sj.lm.save(model, folder)
    return _load_decoder


def directory(folder):
    """As Hugging Face keeps it, in two shards."""
    golden = os.path.join(os.path.dirname(__file__), "lm", "decoder", "golden", "llama")
    folder.mkdir()
    shutil.copy(os.path.join(golden, "config.json"), folder)
    values = json.loads((folder / "config.json").read_bytes())
    from safetensors.numpy import load_file, save_file

    tensors = load_file(os.path.join(golden, "model.safetensors"))
    values["vocab_size"] = 300  # as many as the tokenizer has
    (folder / "config.json").write_text(json.dumps(values))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (300, 32))
    index = {}
    for shard in range(2):
        file = f"model-{shard}.safetensors"
        names = sorted(tensors)[shard::2]
        save_file({name: tensors[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    byte_tokenizer().save(folder)
    return _load_decoder


def decoder_of_a_gguf_file(folder):
    """The files that `save` writes of one, with its tokenizer."""
    gguf_file(folder / "from")
    model = sj.lm.load(folder / "from" / "model.gguf")
    sj.lm.save(model, folder / "to")
    return lambda folder: _load_decoder(folder / "to")


def gguf_file(folder):
    from lm.decoder.test_gguf import write

    folder.mkdir(parents=True)
    model = examples.tiny()

    words = {"model": "gpt2", "pre": "smollm", "merges": ['! "'], "token_type": [1] * 64}
    words["tokens"] = ['!"', "Ġ", *map(chr, range(33, 127))][: model.config.vocab_size]
    change = {f"tokenizer.ggml.{name}": value for name, value in words.items()}
    write(folder / "model.gguf", model, change=change)

    return lambda folder: _load_decoder(folder / "model.gguf")


def gguf_file_for_flax(folder):
    """The same file, for another reader."""
    pytest.importorskip("transformers")
    gguf_file(folder)
    return lambda folder: load_model(folder / "model.gguf").encode('! "!')


def _load_decoder(path):
    model = sj.lm.load(path)
    tokenizer = model.tokenizer
    return model.config, model.params, None if tokenizer is None else tokenizer.encode('! "!')


def flax_directory(folder):
    """As a Flax class of transformers is kept: one file of msgpack."""
    pytest.importorskip("transformers")
    from flax.serialization import msgpack_serialize

    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300}
    values |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 2, "max_position_embeddings": 32, "eos_token_id": 2}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_k": 5}))
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(**values)
    shapes = FlaxLlamaForCausalLM(config, _do_init=False).params_shape_tree
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(params))
    byte_tokenizer().save(folder)
    return _load_flax


def _load_flax(folder):
    loaded = load_model(folder)
    return loaded.model.params, loaded.encode('! "!')


def tuning_table(folder):
    """The entries of `slidejax tune`."""
    os.environ["SLIDEJAX_CACHE"] = str(folder)
    for rows in (1, 16):
        entry = {"in": 64, "out": 32, "pattern": "6:8", "dtype": "int8", "rows": rows}
        times = {"dense": 2.0, tuning.Variant("hopper", "hopper"): 1.0}
        path = tuning.record("test", [entry | {"us": times}])
    name = path.relative_to(folder)
    return lambda folder: tuning._read(folder / name)


def stages(folder):
    """The finished stages of a conversion."""
    mask = np.arange(64).reshape(16, 4) % 3 > 0
    kernel = jnp.where(mask, 1.5, 0)
    Store(folder, "key").save(0, {"a/kernel": Pruned(jnp.asarray(mask), kernel, jnp.ones(4))})
    return lambda folder: Store(folder, "key").read(0)


def training(folder):
    """The state of a training."""
    pytest.importorskip("optax")
    from slidejax.train.loop import Shuffled, fit

    rows = np.ones((4, 8), np.float32)
    w = sj.pack(jnp.ones((8, 2)), "6:8", dtype="int8")

    def run(folder):
        loss = lambda w, x: jnp.mean(sj.linear(x, w))  # noqa: E731
        return fit(loss, w, Shuffled(rows, 4), steps=1, checkpoint=folder).params

    run(folder)
    return run


_CHANGES = {
    ".json": change_json_file,
    ".safetensors": change_safetensors,
    ".msgpack": change_msgpack,
    ".gguf": change_gguf,
    "": change_bytes,
}
# kind -> the files to change, and whether they are files of ours, whose content has a checksum
KINDS = {
    checkpoint: (["slidejax.json", "slidejax.safetensors"], True),
    saved_decoder: (["slidejax.json", "slidejax.safetensors"], True),
    decoder_of_a_gguf_file: (["to/gguf_tokenizer.json"], True),
    directory: (
        [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "model.safetensors.index.json",
            "model-0.safetensors",
        ],
        False,
    ),
    gguf_file: (["model.gguf"], False),
    gguf_file_for_flax: (["model.gguf"], False),
    flax_directory: (
        [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "flax_model.msgpack",
        ],
        False,
    ),
    tuning_table: (["tuning/test.json"], True),
    stages: (["conversion", "stage-0000.safetensors"], True),
    training: (["slidejax.json", "slidejax.safetensors"], True),
}
_COUNT = sum(len(files) for files, _ in KINDS.values())
CASES = [(kind, file) for kind, (files, _) in KINDS.items() for file in files]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound directory of each kind, made when it is asked for: `(folder, load, content)`."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("sound") / kind.__name__
            load = kind(folder)
            made[kind] = folder, load, load(folder)
        return made[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIDEJAX_CACHE", "")
        yield get


def _content(tree):
    leaves, structure = jax.tree.flatten(tree)
    return str(structure), [_leaf(leaf) for leaf in leaves]


def _leaf(leaf):
    if not hasattr(leaf, "dtype"):
        return repr(leaf)
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


@pytest.fixture
def little_memory():
    """A file that asks for all memory gets a MemoryError, and the tests go on."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@pytest.mark.parametrize(("kind", "file"), CASES, ids=[f"{k.__name__}-{f}" for k, f in CASES])
def test_changed_files(sound, little_memory, tmp_path, kind, file):
    folder, load, content = sound(kind)
    changed = tmp_path / kind.__name__
    shutil.copytree(folder, changed)
    good = (folder / file).read_bytes()
    ours = KINDS[kind][1]
    problems = []
    for number in range(-(-MUTATIONS // _COUNT)):
        rng = random.Random(f"{kind.__name__} {file} {number}")
        change = _CHANGES[os.path.splitext(file)[1] if file != "conversion" else ""]
        data = change(rng, good)
        (changed / file).write_bytes(data)
        begun, before = time.process_time(), _peak()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = load(changed)
        except (ValueError, OSError, NotImplementedError) as e:
            # Another file of the directory may be the one that does not fit.
            names = [name for name, _ in _walk(changed)] + [str(changed), GGUF_TOKENIZER]
            if not any(name in str(e) for name in names):
                problems.append(f"{number}: names no file: {type(e).__name__}: {e}")
        except Exception as e:
            problems.append(f"{number}: {type(e).__name__}: {str(e)[:150]}")
        else:
            if ours and _content(found) != _content(content):
                problems.append(f"{number}: other content was accepted")
        took, grew = time.process_time() - begun, _peak() - before
        if took > _SECONDS:  # the first time may have imported modules
            begun = time.process_time()
            with contextlib.suppress(Exception):
                load(changed)
            took = time.process_time() - begun
        if took > _SECONDS:
            problems.append(f"{number}: {took:.1f} s")
        if grew > _MIB + (len(data) >> 20):
            problems.append(f"{number}: {grew} MiB")
    assert not problems, "\n".join(problems[:20]) + f"\n{len(problems)} in all"


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_what_is_no_file(sound, little_memory, tmp_path, kind):
    """A pipe that nobody writes to, a device that never ends, a link to nothing, a directory."""
    folder, load, _ = sound(kind)
    others = {
        "pipe": os.mkfifo,
        "device": lambda path: os.symlink("/dev/zero", path),
        "link": lambda path: os.symlink("nothing", path),
        "directory": os.mkdir,
    }
    readers = [load] if kind in (checkpoint, stages, training, tuning_table) else [load, read_model]
    for file in KINDS[kind][0]:
        for name, make in others.items():
            if (kind, name) == (tuning_table, "link"):  # nothing was measured
                continue
            changed = tmp_path / file / name
            shutil.copytree(folder, changed)
            os.unlink(changed / file)
            make(changed / file)
            for read in readers:
                with _at_most(5), pytest.raises((ValueError, OSError)) as e:
                    read(changed)
                assert str(changed) in str(e.value) or file in str(e.value)
            shutil.rmtree(changed)


@contextlib.contextmanager
def _at_most(seconds):
    """An AssertionError if the block takes longer."""

    def stop(*_):
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _walk(folder):
    for root, _, files in os.walk(folder):
        for name in files:
            yield name, os.path.join(root, name)

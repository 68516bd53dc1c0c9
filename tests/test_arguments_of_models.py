"""Arguments of functions around whole models: conversion, training, generation, tuning, files.

As in `test_arguments`, each bad value is refused in one error that names the argument.
"""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import test_arguments
from argument_sweep import (
    ARRAYS,
    COMPLEX,
    DTYPES,
    FLOAT,
    IDS,
    KERNEL,
    MODEL,
    NAMES,
    NUMBERS,
    REAL,
    WHOLE,
    W,
    X,
    check_named,
    flat,
)
from flax import linen as nn
from flax import nnx

import slidejax as sj
import slidejax.adapters
import slidejax.checkpoint.gguf
import slidejax.checkpoint.huggingface
import slidejax.conversion
import slidejax.functional
import slidejax.generate
import slidejax.huggingface
import slidejax.linen
import slidejax.lm
import slidejax.lm.generation
import slidejax.lm.tasks.humaneval as humaneval
import slidejax.lm_eval
import slidejax.models
import slidejax.nnx
import slidejax.prune
import slidejax.rules
import slidejax.train
import slidejax.trainable
import slidejax.tune
from slidejax.lm import Decoder
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.text.examples import byte_tokenizer

PATTERNS = ["6:9", "", 0, [], None, object(), KERNEL, len]
FILES = [None, "", 0, 1.5, [], object(), "a\0b"]
FUNCTIONS = [None, 0, "a", [], X]
TEXTS = [None, "", 0, 1.5, [], {}, object(), X, len]
USED = sj.Report(skipped={"a": "b"})
RULES = [
    iter([(".*", "6:8")]),
    {(".*", "6:8")},
    "6:9",
    0,
    1.5,
    {},
    None,
    object(),
    len,
    [1],
    [("(", "6:8")],
    [(".*", 0)],
    [(".*",)],
]
CALIBRATIONS = [*ARRAYS[:5], *ARRAYS[7:9], [1], [], {}, np.full((4, 8), np.nan)]
LAYER = nnx.Linear(64, 16, rngs=nnx.Rngs(0))
DENSE = nn.Dense(16)
VARIABLES = {"params": {"kernel": KERNEL, "bias": np.zeros(16, np.float32)}}
SPARSE = sj.lm.convert(MODEL, "6:8")
HEAD = np.ones((2, 4, 8), np.float32)
CACHE = np.zeros((2, 2, 6, 8), np.float32)
TURNS = np.ones((2, 4), np.float32)
ATTENTION = {
    "q": HEAD, "k": HEAD[:, :2], "v": HEAD[:, :2], "keys": CACHE, "values": CACHE,
    "positions": np.zeros(2, int), "turns": (TURNS, TURNS),
}  # fmt: skip
ENTRY = {"in": 64, "out": 64, "pattern": "6:8", "dtype": "int8", "rows": 1, "us": {"dense": 1.0}}
_WRITES = tiny(vocab_size=260, num_layers=1)
WRITER = Decoder(_WRITES.config, _WRITES.params, files=byte_tokenizer().files())
TASK = humaneval.Problem("a", "def f():\n", "f", "def check(f): pass")


RESULT_OF = humaneval.Result(("a",), np.ones(1, bool), np.ones((1, 0), bool), {}, [])


def completed(**options):
    return list(humaneval.completions(**options))


def recovered(**options):
    return sj.recover(**{"steps": 1, "window": 4, "batch": 2, **options})


# function, its arguments, and bad values of each
CASES = [
    (sj.decode_attention, ATTENTION, {
        "q": [*ARRAYS, COMPLEX, HEAD.astype(int)], "k": ARRAYS, "v": ARRAYS,
        "keys": [*ARRAYS, COMPLEX, CACHE.astype(int)], "values": [*ARRAYS, COMPLEX],
        "positions": [*ARRAYS, COMPLEX, np.zeros(2), np.zeros(2, bool)],
        "turns": [*ARRAYS, (TURNS,), (TURNS, None), (TURNS, TURNS[:1]), (TURNS, TURNS.astype(complex))],
        "scale": [*NUMBERS[:8], float("inf"), len], "window": [*NUMBERS, 0, 1.5, True],
        "implementation": NAMES,
    }),
    (sj.Pattern, {"kept": 6, "group": 8}, {
        "kept": [*WHOLE, 5], "group": [*WHOLE, 7],
    }),
    (sj.Pattern.parse, {"text": "6:8"}, {}),
    (sj.unpack, {"w": W}, {"w": ARRAYS[:9]}),
    (sj.quantize, {"w": FLOAT, "dtype": "int8"}, {
        "w": ARRAYS[:9], "dtype": [*DTYPES, "float32", None],
    }),
    (sj.RMSNorm, {"weight": np.ones(4, np.float32)}, {"eps": REAL}),
    (sj.Activation, {}, {"activation": [*NAMES, None]}),
    (sj.prepare, {"tree": {"a": W}, "implementation": "dense"}, {}),
    (sj.explain, {"fn": lambda: 1}, {"fn": FUNCTIONS, "platform": ["tpu", "", 0, [], X, len]}),
    (sj.combine, {"train": {"a": X}, "rest": {"a": None}}, {
        "train": [{"b": X}, {"a": {"c": X}}], "rest": [{"a": X}, {"b": None}, [None]],
    }),
    (sj.Rule, {"pattern": "6:8"}, {
        "pattern": PATTERNS, "qdtype": DTYPES, "dtype": DTYPES, "optional": [None, 0, "no", []],
    }),
    (sj.rules.RuleSet, {"rules": "6:8"}, {"rules": RULES}),
    (sj.rules.pack_by_rule, {"kernel": KERNEL, "rule": sj.Rule("6:8"), "path": "a"}, {
        "kernel": [*ARRAYS[:13], COMPLEX], "rule": [None, 0, "6:9", []], "prune": [0, "a", [], lambda k, p, path: None, lambda k, p, path: (1, 2, 3, 4)],
    }),
    (sj.prune.mixed, {"model": MODEL, "rule": "6:8", "calibration": IDS}, {
        "model": ["a", 0, None, len], "rule": [*PATTERNS, [(".*", "6:8")]],
        "calibration": CALIBRATIONS,
        "patterns": ["6:8", None, 0, [], [0], ["6:9"], [None], len],
        "groups": [None, 0, ["("], [0], [None], "a", ["nothing"]],
        "cost": [*FUNCTIONS, lambda s, p: "a", lambda s, p: -1, lambda s, p: float("nan"), lambda s, p: None],
        "loss": [0, "a", [], X], "speedup": [*REAL, 0], "params": ["a", 0, {}, []],
    }),
    (sj.prune.measured_times, {"rows": 8}, {
        "rows": [*WHOLE, 0], "qdtype": [*DTYPES, None], "device": [0, [], "", object()],
    }),
    (sj.prune.Times, {"rows": 8, "patterns": ["6:8"]}, {
        "rows": [*WHOLE, 0], "patterns": ["6:8", None, 0, [], [0], ["6:9"], len],
        "qdtype": [*DTYPES, None], "device": [0, [], "", object()],
    }),
    (sj.prune.Method, {"name": "a", "choose": lambda k, p, g: None}, {
        "name": [None, 0, "", []], "choose": FUNCTIONS, "reads": ["all", None, 0, []],
        "solve": [0, "a", []],
    }),
    (sj.prune.convert, {"model": LAYER, "rules": "6:8"}, {
        "model": ["a", 0, None, len, W], "rules": RULES, "method": [*NAMES, "gptq"][:-2],
        "report": [0, "a", [], {}, USED], "params": ["a", 0, []],
    }),
    (sj.prune.convert, {"model": DENSE, "rules": "6:8", "params": VARIABLES, "example": (X,)}, {
        "params": [None, "a", 0, []], "example": [None, 0, "a", X],
    }),
    (sj.prune.convert, {"model": LAYER, "rules": "6:8", "calibration": [X]}, {
        "calibration": [*CALIBRATIONS[1:], [{"x": X}], [X[:, :3]], [(X, X)]],
    }),
    (sj.prune.mixed, {"model": LAYER, "rule": "6:8", "calibration": [X], "loss": None}, {
        "loss": [None, lambda y, b: y, lambda y, b: None, lambda y, b: 1.0, lambda y, b: (y.sum(),)],
    }),
    (sj.prune.convert, {"model": DENSE, "rules": "6:8", "params": VARIABLES}, {
        "calibration": [[{"x": X}], [X[:, :3]], [(X, X)], [IDS.tolist()]],
    }),
    (sj.linen.convert, {"variables": VARIABLES, "rules": "6:8"}, {
        "variables": [None, 0, "a", [], X], "rules": RULES, "model": ["a", 0, LAYER],
        "report": [0, "a", [], USED], "prune": [0, "a", []],
    }),
    (sj.linen.apply, {"model": DENSE, "variables": VARIABLES}, {
        "model": ["a", 0, None, LAYER], "variables": [None, 0, "a", []],
    }),
    (sj.linen.fuse_projections, {"params": {"a": W}}, {
        "groups": [None, 0, "a", ["ab"], [[0]], [[0, 1]], [["a"]], [[]]],
    }),
    (sj.linen.register, {"cls": nn.Dense, "parameter": "w", "equation": "ab,bc->ac"}, {
        "cls": [None, 0, "a", DENSE, int], "parameter": TEXTS,
        "equation": [None, 0, "", "ab", []], "shape": [None, 0, "", []], "input": [0, [], ""],
    }),
    (sj.nnx.register, {"cls": nnx.Conv, "parameter": "w", "equation": "ab,bc->ac"}, {
        "cls": [None, 0, "a", LAYER, int], "parameter": TEXTS, "equation": [None, 0, "", "ab", []],
    }),
    (sj.nnx.convert, {"model": LAYER, "rules": "6:8"}, {
        "model": ["a", 0, None, len, W, DENSE], "rules": RULES, "report": [0, "a", [], USED],
        "prune": [0, "a", []],
    }),
    (sj.nnx.map_weights, {"model": sj.nnx.convert(LAYER, "6:8"), "fn": lambda w: w}, {
        "model": ["a", 0, None, W], "fn": FUNCTIONS,
    }),
    (sj.linen.SlideDense, {"features": 8}, {}),
    (sj.conversion.functional, {"model": LAYER}, {"model": ["a", 0, None, W]}),
    (sj.conversion.register, {"family": None}, {"family": [None, 0, "a", LAYER]}),
    (sj.functional.watching_inputs, {"watch": len}, {"watch": FUNCTIONS}),
    (sj.functional.watching_outputs, {"watch": len}, {"watch": FUNCTIONS}),
    (sj.trainable.deploy, {"tree": None}, {}),
    (sj.trainable.map_wrapped, {"fn": len, "tree": {}}, {"fn": FUNCTIONS}),
    (sj.train.sample, {"model": MODEL, "prompts": IDS[:, :2], "length": 4}, {
        "model": [None, "a", 0, LAYER], "prompts": [None, "a", 0, [], [[-1]], [[999]], X, [[1.5]], {}],
        "length": [*WHOLE, 0, 2], "temperature": REAL, "batch": [*WHOLE, 0],
        "seed": WHOLE,
    }),
    (recovered, {"model": SPARSE, "teacher": MODEL, "tokens": IDS}, {
        "model": [None, "a", 0, MODEL, LAYER], "teacher": [None, "a", 0, LAYER],
        "tokens": [None, "a", 0, [], [1.5], X, -IDS, IDS * 999, {}],
        "steps": [*WHOLE[:10], 1.5, 0], "window": [*WHOLE, 0], "batch": [*NUMBERS, 1.5, 0, 99],
        "accumulate": [*WHOLE, 0, 3], "learning_rate": [*NUMBERS, float("inf"), 0], "warmup": WHOLE,
        "temperature": [*REAL, 0], "hidden": REAL, "trained": [0, 1.5, "(", "nothing"],
        "held_out": [*NUMBERS, 1.5, 99], "seed": WHOLE, "qdtype": DTYPES, "every": [*WHOLE, 0],
        "checkpoint": [0, 1.5, [], object()], "progress": [0, "a", []],
    }),
    (WRITER.stream, {"prompt": [1, 2], "max_new_tokens": 1}, {
        "prompt": [None, 0, 1.5, {}, object(), np.zeros((2, 2)), [], [999], [-1], W, [[1], [2]]],
        "max_new_tokens": [v for v in WHOLE if v is not None], "temperature": REAL,
        "top_k": WHOLE, "top_p": [*REAL, 1.5], "stop": [0, 1.5, [1], object()], "seed": WHOLE,
    }),
    (WRITER.generate, {"prompts": "a", "max_new_tokens": 1}, {
        "params": ["a", 0, {}, [], {"a": "b"}, {"a": None}],
    }),
    (RESULT_OF.figures, {}, {"against": [0, "a", {}, object()]}),
    (sj.lm.generation.generate, {"model": MODEL, "prompts": [[1]], "max_new_tokens": 1}, {
        "model": [None, "a", 0, LAYER, len],
    }),
    (sj.lm.generation.Programs, {"init_cache": len, "apply": len}, {
        "init_cache": FUNCTIONS, "apply": FUNCTIONS, "chunk": [*WHOLE, 0], "start": [0, "a", []],
        "steps": [*NUMBERS, 1.5],
    }),
    (sj.lm.Tokenizer, {"backend": None}, {"backend": [None, "a", 0, MODEL]}),
    (humaneval.problems, {}, {"file": [0, 1.5, [], object(), "a\0b"]}),
    (humaneval.evaluate, {"model": WRITER, "tasks": [TASK], "max_new_tokens": 1}, {
        "model": [None, "a", 0, MODEL], "tasks": [None, "a", 0, [], [0], TASK],
        "samples": WHOLE, "temperature": [*REAL, 0], "max_new_tokens": [v for v in WHOLE if v is not None],
        "batch": [*NUMBERS, 1.5, 0], "seed": WHOLE, "workers": [*NUMBERS, 1.5, 0], "limits": [0, "a", []],
        "progress": [0, "a", []],
    }),
    (completed, {"model": WRITER, "prompts": ["a"], "max_new_tokens": 1}, {
        "model": [None, "a", 0, MODEL], "prompts": [None, "a", 0, [0], [None]],
        "samples": WHOLE, "first": WHOLE, "temperature": REAL,
        "max_new_tokens": [v for v in WHOLE if v is not None],
        "stop": [0, [0]], "batch": [*NUMBERS, 1.5, 0], "seed": WHOLE,
    }),
    (sj.adapters.AdaptedWeight, {}, {}),
    (sj.checkpoint.gguf.GGUFFile, {"path": "none"}, {"path": FILES}),
    (sj.checkpoint.gguf.deinterleave, {"weight": KERNEL, "heads": 2}, {
        "weight": ARRAYS, "heads": [*WHOLE, 0, 3],
    }),
    (sj.checkpoint.huggingface.cast, {"params": {"a": X}, "dtype": "float16"}, {
        "dtype": [*DTYPES, "int8"],
    }),
    (sj.models.load_model, {"model": "none"}, {"model": [*FILES, "none"], }),
    (sj.generate.Generator, {"model": MODEL}, {"model": [None, "a", 0, LAYER]}),
    (sj.lm_eval.SlideLM, {"model": WRITER}, {
        "model": [None, 0, 1.5, [], object(), "none"],
        "batch_size": ["a", "", 0, 1.5, [], None, -1], "max_length": ["a", "", 0, 1.5, [], 10**9],
        "max_gen_toks": ["a", "", 0, 1.5, [], None],
    }),
    (sj.functional.Family, {"name": "a", "owns": len, "functional": len}, {
        "name": [None, 0, ""], "owns": FUNCTIONS, "functional": FUNCTIONS,
    }),
    (sj.functional.Functional, {"run": len, "params": {}, "pack": len}, {
        "run": FUNCTIONS, "pack": FUNCTIONS,
    }),
    (sj.tune.Variant.of, {"key": "dense"}, {"key": [None, 0, [], (1, 2), (1,), ("a", "b", "c"), len]}),
    (sj.tune.entries, {"device": "NVIDIA H100"}, {"device": [None, 0, 1.5, [], b"a", object()]}),
    (sj.tune.table_path, {"device": "NVIDIA H100"}, {
        "device": [None, 0, 1.5, [], b"a", "", "..", "/", object()],
    }),
    (sj.tune.record, {"device": "NVIDIA H100", "measured": [ENTRY]}, {
        "device": [None, 0, 1.5, [], b"a", "", object()],
        "measured": [None, 0, "a", ENTRY, [0], [{}], [{**ENTRY, "us": {}}], [{**ENTRY, "us": {"a": -1}}],
                     [{**ENTRY, "in": 0}], [{**ENTRY, "us": {3: 1.0}}], [{**ENTRY, "pattern": sj.Pattern(6, 8)}],
                     [{**ENTRY, "dtype": np.dtype("int8")}], X],
    }),
    (sj.tune.forms, {"w": W}, {"w": [*ARRAYS[:9], None]}),
    (sj.tune.time_of, {"device": "NVIDIA H100", "rows": 1, "shape": (64, 64), "pattern": sj.Pattern(6, 8), "dtype": np.dtype("int8")}, {
        "device": [None, 0, 1.5, [], object()], "rows": [*WHOLE, 0],
        "shape": [None, 0, "a", (1,), (0, 1), (1.5, 2), ("a", "b"), (1, 2, 3), (-1, 1)],
        "pattern": PATTERNS, "dtype": [*DTYPES, None],
    }),
    (sj.tune.lookup, {"problem": None, "candidates": ["dense"]}, {"problem": [None, 0, "a", X]}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "name", "values"), flat(CASES))
def test_a_bad_argument_is_named(function, arguments, name, values, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEJAX_CACHE", str(tmp_path))
    check_named(function, arguments, name, values)


# Public names that are in no sweep, and why.
TREES = "its arguments are trees of anything, and other leaves stay"
PYTREE = "a pytree of JAX, whose leaves may be anything while JAX works with it"
RESULT = "a result, which slidejax makes"
FAMILY = "code of a family calls it, and no user"
FLAX = "tests/huggingface/test_arguments_of_flax_models.py has it"
EXCUSED = {
    "AdaptedWeight": PYTREE,
    "Completion": RESULT,
    "Converted": RESULT,
    "DecoderConfig": "files are read into it, and tests/lm/decoder hold their keys",
    "Fitted": RESULT,
    "Generated": RESULT,
    "Interceptor": "it takes nothing",
    "LayerCache": PYTREE,
    "LoadedModel": RESULT,
    "MasterWeight": PYTREE,
    "Packed": PYTREE,
    "Problem": RESULT,
    "Prune": "a type",
    "Cache": "a type",
    "Report": RESULT,
    "Result": RESULT,
    "Rope": "files are read into it",
    "read_pretrained": FLAX,
    "with_params": FLAX,
    "model_class": FLAX,
    "planned": FLAX,
    "calibrated": FLAX,
    "build": FLAX,
    "Variant": RESULT,
    "Skipped": "an exception",
    "SlideEinsum": "convert makes it",
    "SlideLinearGeneral": "convert makes it",
    "SlideRegistered": "convert makes it",
    "SlideWeight": PYTREE,
    "Stream": "Decoder.stream makes it",
    "arguments_of": FAMILY,
    "default_dtype": "it takes nothing",
    "deploy": TREES,
    "drop_prepared": TREES,
    "extract": TREES,
    "fuse": "tests/lm/decoder hold its errors",
    "implementations": "it takes nothing",
    "interceptor": FAMILY,
    "layer_of": FAMILY,
    "merge": TREES,
    "nbytes": TREES,
    "own_kernel": FAMILY,
    "serving": "tests/lm/decoder hold its errors",
    "show_input": FAMILY,
    "show_layers": FAMILY,
    "show_output": FAMILY,
    "split_input": FAMILY,
    "unfuse_projections": TREES,
    "watched": "it takes nothing",
    "with_rope_theta": FAMILY,
    "write_pretrained": "tests/huggingface/test_write.py holds its errors",
}
# Methods and some classes cannot be called by themselves. For each of them this is swept.
STANDS_FOR = {
    "chained": "Stage",
    "completed": "completions",
    "dense": "SlideDense",
    "gated": "GLU",
    "general": "SlideLinear",
    "normed": "LayerNorm",
    "recovered": "recover",
    "trained": "fit",
    "fuse": "fuse_projections",
}


def test_every_public_function_is_in_a_sweep_or_excused():
    """A name that is added to the public ones without its bad arguments fails here."""
    swept = set()
    for function, _, bad in (*CASES, *test_arguments.CASES):
        name = function.__name__
        swept |= {name, STANDS_FOR.get(name, name)} if bad else set()
    public = set()
    text = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        module = section.partition("\n")[0]
        if module.startswith("slidejax"):
            names = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
            found = importlib.import_module(module)
            public |= {name for name in names if callable(getattr(found, name))}
    assert public - swept - EXCUSED.keys() == set()
    assert EXCUSED.keys() - public == set()

"""Bad arguments of the functions for Flax models of transformers are refused by their names."""

import numpy as np
import pytest
from argument_sweep import DTYPES, REAL, WHOLE, W, check_named

import slidejax as sj
import slidejax.checkpoint.huggingface
import slidejax.generate
import slidejax.huggingface
from slidejax.huggingface import build, model_class, read_pretrained

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "FlaxPreTrainedModel"):
    pytest.skip("this transformers has no Flax classes", allow_module_level=True)

IDS = np.ones((4, 8), int)
NO_MODELS = [None, "a", 0, W, len]
PATHS = [None, "", 0, 1.5, [], object(), "a\0b"]
CASES = [
    (sj.huggingface.convert, {"rules": "6:8"}, {
        "flax_model": NO_MODELS, "rules": ["6:9", 0, {}, None, [1], [("(", "6:8")]],
        "method": [None, 0, "gptq", []], "params": ["a", 0, []], "report": [0, "a", []],
    }),
    (sj.huggingface.convert, {"rules": "6:8", "method": "wanda"}, {
        "calibration": [None, "a", 0, {}, [], [1], np.zeros((2, 2, 2))],
    }),
    (sj.huggingface.planned, {"rules": "6:8"}, {
        "flax_model": NO_MODELS, "rules": ["6:9", 0, {}, None, [1]],
    }),
    (sj.huggingface.calibrated, {"method": "wanda", "tokens": IDS}, {
        "flax_model": NO_MODELS, "method": [None, 0, "gptq", "magnitude", []],
        "progress": [0, "a", []],
    }),
    (sj.huggingface.fuse_projections, {}, {"flax_model": NO_MODELS}),
    (sj.huggingface.with_params, {"params": {}}, {"flax_model": NO_MODELS}),
    (sj.huggingface.with_params, {}, {"params": [None, "a", 0, [], W]}),
    (sj.generate.Generator, {}, {
        "max_new_tokens": [*WHOLE, 0], "temperature": REAL, "top_k": WHOLE, "top_p": [*REAL, 1.5],
    }),
]  # fmt: skip


def test_a_bad_argument_is_named(tiny_llama):
    for function, arguments, bad in CASES:
        own = "model" if function is sj.generate.Generator else "flax_model"
        for name, values in bad.items():
            check_named(function, {own: tiny_llama, **arguments}, name, values)


def test_a_bad_argument_of_what_builds_a_model_is_named(tiny_config, tiny_params):
    built = {"config": tiny_config, "params": tiny_params}
    check_named(build, built, "config", [None, "a", 0, {}])
    check_named(build, built, "params", [None, "a", 0, []])
    check_named(build, built, "dtype", [*DTYPES, "int8", None])
    check_named(model_class, {}, "config", [None, "a", 0, {}])
    check_named(read_pretrained, {}, "path", PATHS)
    check_named(read_pretrained, {"path": "none"}, "dtype", [*DTYPES, "int8"])

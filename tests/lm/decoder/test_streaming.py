"""Conversion from files to files: what is written, what it takes, and how it goes on."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import slidejax as sj
from slidejax.checkpoint import load as load_tree
from slidejax.lm.decoder import streaming
from slidejax.lm.decoder.examples import tiny, tiny_config
from slidejax.lm.decoder.family import functional_of
from slidejax.lm.decoder.names import safetensors_name
from slidejax.lm.decoder.source import open_source
from slidejax.prune.model import streamed
from slidejax.prune.model.smooth import folds_of
from slidejax.prune.model.stages import Stages
from slidejax.prune.model.store import Store
from slidejax.prune.model.streamed import Reading

GOLDEN = Path(__file__).parent / "golden"
IDS = np.random.default_rng(0).integers(3, 60, (4, 24)).astype(np.int32)


def same(a, b):
    """Whether two directories hold the same tree."""
    one, other = load_tree(a), load_tree(b)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def both_ways(path, tmp_path, rules, method, calibration, **options):
    """The directories that the loaded model and the files give, and their reports."""
    reports = sj.Report(), sj.Report()
    loaded = sj.lm.convert(sj.lm.load(path), rules, method, calibration, report=reports[0])
    sj.lm.save(loaded, tmp_path / "loaded", **options)
    sj.lm.convert_files(
        path, tmp_path / "files", rules, method, calibration, report=reports[1], **options
    )
    same(tmp_path / "loaded", tmp_path / "files")
    assert str(reports[0]) == str(reports[1])
    return tmp_path / "files"


def deep(path, layers=16, **changes):
    """A decoder of many layers in safetensors, whose blocks are small beside it."""
    model = tiny(num_layers=layers, **changes)
    config = model.config
    path.mkdir()
    leaves = streaming.leaves_of(model.params)
    tensors = {
        safetensors_name(p): np.ascontiguousarray(np.asarray(v).T if p.endswith("kernel") else v)
        for p, v in leaves
    }
    save_file(tensors, path / "model.safetensors")
    values = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": 10000.0,
        "tie_word_embeddings": config.tied,
    }
    (path / "config.json").write_text(json.dumps(values))
    return path, sum(tensor.nbytes for tensor in tensors.values())


# --- the same weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_calibrated_weights_are_those_of_the_loaded_model(case, tmp_path):
    rules = "6:8" if case == "llama" else [(".*/0/.*", None), (".*/mlp/.*", sj.Rule("4:6", None))]
    method = "sparsegpt" if case == "llama" else "wanda"
    out = both_ways(GOLDEN / case, tmp_path, rules, method, IDS)
    assert np.isfinite(np.asarray(sj.lm.load(out)(IDS))).all()


@pytest.mark.parametrize("method", ["wanda", None])
def test_a_tied_head_that_a_rule_converts(method, tmp_path):
    """Each layer may have another pattern, as `mixed` chooses them."""
    rules = [("lm_head", "dense"), (".*/mlp/.*", "14:16"), (".*", "6:8")]
    both_ways(GOLDEN / "llama3", tmp_path, rules, method, None if method is None else IDS)


def test_rules_that_leave_all_layers_need_no_calibration(tmp_path):
    both_ways(GOLDEN / "llama", tmp_path, [(".*", None)], "wanda", IDS)


def test_floats_and_files_of_slidejax(tmp_path):
    sj.lm.save(tiny(), tmp_path / "saved")
    out = both_ways(tmp_path / "saved", tmp_path, "6:8", None, None, floats="bfloat16")
    assert load_tree(out)["params"]["lm_head"]["kernel"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="is converted already"):
        sj.lm.convert_files(out, tmp_path / "x", "6:8")
    with pytest.raises(ValueError, match="holds an earlier result"):
        sj.lm.convert_files(tmp_path / "saved", out, "6:8")
    how = sj.prune.Calibration(IDS, in_order=False)
    with pytest.raises(ValueError, match="in_order=False needs the whole model"):
        sj.lm.convert_files(tmp_path / "saved", tmp_path / "x", "6:8", "wanda", how)
    assert not (tmp_path / "x").exists()


# --- what it takes --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_a_few_layers_are_in_memory_at_a_time(method, tmp_path, monkeypatch):
    """Live arrays at each reading and writing, against the formula that the documents use."""
    path, dense = deep(tmp_path / "model", 16 if method == "magnitude" else 10)
    ids = IDS[:2] if method == "sparsegpt" else None
    with open_source(path, "float32") as source:
        config = source.config
    rules = [(".*layers.*", "6:8")]
    before = {id(array) for array in jax.live_arrays()}
    most, times = 0, 0

    def look():
        nonlocal most, times
        live = [array for array in jax.live_arrays() if id(array) not in before]
        most, times = max(most, sum(array.nbytes for array in live)), times + 1

    for cls, name in ((Reading, "__getitem__"), (streaming._Sink, "_write")):
        plain = getattr(cls, name)
        monkeypatch.setattr(
            cls, name, lambda self, *args, plain=plain: [look(), plain(self, *args), look()][1]
        )
    sj.lm.convert_files(path, tmp_path / "out", rules, method, ids, dtype="float32")
    assert times > 100
    if ids is None:
        assert most < dense / 12  # the embedding is the largest parameter
        return
    wanted = streaming.memory_needed(config, ids, method, rules, dtype="float32")
    assert most <= wanted.total
    assert wanted.parameters < dense / 3  # so a whole model in memory would be seen


def test_what_a_model_of_70b_needs():
    """The figures of docs/decoder.md. Its number of layers makes no difference."""
    sizes = {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_heads": 64,
        "num_kv_heads": 8,
        "head_dim": 128,
        "query_scale": 128**-0.5,
        "max_positions": 8192,
    }
    ids = jax.ShapeDtypeStruct((64, 512), "int32")
    needed = [
        [
            round(size / 1e9, 1)
            for size in streaming.memory_needed(
                tiny_config(num_layers=n, **sizes),
                ids,
            )
        ]
        for n in (2, 3)
    ]
    assert needed[0] == needed[1] == [9.2, 5.2, 7.5]


def test_gate_up_and_down_are_one_unit():
    """The fold of down's input changes the columns of up."""
    model = functional_of(tiny_config(), tiny().params)
    paths = [path for path, _ in streaming.leaves_of(model.params) if path.endswith("kernel")]
    stages = Stages(model.run, model.params, IDS, dict.fromkeys(paths))
    units = streamed.units(stages, folds_of(stages))
    assert [list(unit) for unit in units] == [[0], [1], [2, 3], [4], [5], [6, 7], [8]]
    assert [list(unit) for unit in streamed.units(stages, [])] == [[at] for at in range(9)]


def test_space_is_asked_for_before_the_work(tmp_path, monkeypatch):
    """For OUT, and for the finished stages on the same disk."""
    convert = functools.partial(sj.lm.convert_files, GOLDEN / "llama", rules="6:8")
    convert(tmp_path / "first")
    size = sum(file.stat().st_size for file in (tmp_path / "first").glob("*.safetensors"))
    usage, free = shutil.disk_usage(tmp_path), 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(OSError, match=r"will be written and 0\.0 MiB are free"):
        convert(tmp_path / "out")
    how = sj.prune.Calibration(IDS, work=tmp_path / "work")
    free = size + 4000  # enough for OUT, and not for the stages as well
    with pytest.raises(OSError, match="will be written"):
        convert(tmp_path / "out", method="wanda", calibration=how)
    assert [file.name for file in tmp_path.iterdir()] == ["first"]
    convert(tmp_path / "out")


# --- going on -------------------------------------------------------------------------------------


def test_a_killed_conversion_goes_on(tmp_path, monkeypatch):
    path, out = GOLDEN / "llama", tmp_path / "out"
    sj.lm.convert_files(path, tmp_path / "whole", "6:8", "wanda", IDS)

    def stop(done, total):
        assert total == 8
        if done == 5:
            raise KeyboardInterrupt

    def how(**more):
        return sj.prune.Calibration(IDS, work=tmp_path / "work", **more)

    with pytest.raises(KeyboardInterrupt):
        sj.lm.convert_files(path, out, "6:8", "wanda", how(progress=stop))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["whole", "work"]
    damaged = tmp_path / "work" / "stage-0002.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    saved, save = [], Store.save
    monkeypatch.setattr(
        Store, "save", lambda self, at, found: [saved.append(at), save(self, at, found)]
    )
    with pytest.warns(UserWarning, match=r"stage-0002\.safetensors' is damaged"):
        sj.lm.convert_files(path, out, "6:8", "wanda", how())
    assert saved == [2, 5, 6, 7]
    same(tmp_path / "whole", out)
    for other, rules in ((GOLDEN / "llama", "4:6"), (GOLDEN / "llama3", "6:8")):
        with pytest.raises(ValueError, match="another conversion"):
            sj.lm.convert_files(other, tmp_path / "x", rules, "wanda", how())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"about": 5}, "about must be a dict, a function that makes one, or None, got 5"),
        ({"about": lambda report: 5}, "about's result must be a dict, got 5"),
        ({"replace": 1}, "replace must be True or False, got 1"),
        ({"report": {}}, "report must be a Report or None, got {}"),
    ],
)
def test_options_of_another_kind_are_refused_by_name(tmp_path, options, message):
    sj.lm.save(tiny(), tmp_path / "model")
    with pytest.raises(TypeError, match=message):
        sj.lm.convert_files(tmp_path / "model", tmp_path / "out", "6:8", **options)
    assert not (tmp_path / "out").exists()


_CONVERT = """
import sys, numpy, slidejax
ids = numpy.arange(48, dtype=numpy.int32).reshape(2, 24)
slidejax.lm.convert_files(sys.argv[1], sys.argv[2], "6:8", "wanda", ids)
"""


def test_every_run_writes_the_same_bytes(tmp_path):
    """Sets of texts have another order in every process."""
    sj.lm.save(tiny(), tmp_path / "model")
    for seed in "13":
        command = [sys.executable, "-c", _CONVERT, tmp_path / "model", tmp_path / seed]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "3").iterdir())
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name

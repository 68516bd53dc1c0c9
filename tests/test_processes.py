"""Two processes, each with two CPU devices, that run one program (`jax.distributed`)."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("optax")

_PROGRAM = """
import json, os, sys
rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
import jax
jax.distributed.initialize(f"localhost:{port}", 2, rank)
import numpy as np
import slidejax as sj, slidejax.checkpoint
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from slidejax.lm.decoder.examples import tiny
from slidejax.train import Shuffled, fit

mesh, said = Mesh(np.array(jax.devices()), ("m",)), {}
assert jax.process_count() == 2 and len(jax.devices()) == 4

def put(array, spec):
    place = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, place, lambda at: np.asarray(array)[at])

def attempt(name, call):
    try:
        said[name] = call()
    except Exception as e:
        said[name] = f"{type(e).__name__}: {e}"

def whole(array):
    return put(array, P())

def spread(leaf):
    if isinstance(leaf, sj.SlideWeight):
        return jax.tree.map(put, leaf, leaf.partition_spec(out="m"))
    return put(leaf, P(None, "m") if leaf.ndim == 2 else P())

def same(a, b):
    return bool(jax.tree.all(jax.tree.map(np.array_equal, a, b)))

model = tiny(hidden_size=64, intermediate_size=64, num_heads=4, num_kv_heads=4, head_dim=16)
sparse, ids = sj.lm.convert(model, "6:8"), np.arange(8)[None]
is_weight = lambda leaf: isinstance(leaf, sj.SlideWeight)
parted = sparse.with_params(jax.tree.map(spread, sparse.params, is_leaf=is_weight))
dense = model.with_params(jax.tree.map(spread, model.params))

write = lambda m: m.generate([[1, 2, 3], [4]], max_new_tokens=6)
said["written"] = [c.tokens for c in write(parted)] == [c.tokens for c in write(sparse)]

attempt("save spread", lambda: sj.checkpoint.save(out + "/a", {"x": {"y": parted.params}}))
attempt("lm.save spread", lambda: sj.lm.save(parted, out + "/b"))
attempt("convert spread", lambda: sj.lm.convert(dense, "6:8", "wanda", ids))
attempt("mixed spread", lambda: sj.prune.mixed(dense, "6:8", ids))
copies = jax.tree.map(whole, sparse.params)
attempt("save copies", lambda: sj.checkpoint.save(out + "/copies", copies))
gathered = process_allgather(parted.params, tiled=True)
if rank == 0:
    attempt("save gathered", lambda: sj.lm.save(sparse.with_params(gathered), out + "/gathered"))
said["same"] = same(gathered, sparse.params) and same(sj.checkpoint.load(out + "/copies"), copies)

sj.lm.save(model, f"{out}/model-{rank}")
made = (f"{out}/model-{rank}", f"{out}/made", "6:8")
attempt("files", lambda: sj.lm.convert_files(*made, replace=True))

x = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
w = sj.pack(jax.random.normal(jax.random.key(0), (64, 32)), "6:8", dtype="int8")
loss, rows = lambda w, x: (sj.linear(x, w) ** 2).mean(), Shuffled(x, 4)
attempt("fit", lambda: fit(loss, spread(w), rows, steps=2).steps)
for flag, value in (("checkpoint", out + "/state"), ("minutes", 1)):
    steps = {"steps": 2} if flag == "checkpoint" else {}
    attempt(flag, lambda: fit(loss, spread(w), rows, **steps, **{flag: value}).steps)
own = f"{out}/own-{rank}"
attempt("own checkpoint", lambda: fit(loss, w, rows, steps=2, checkpoint=own).steps)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The output of both processes, and the folder into which they wrote."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(rank), port, str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        ended = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), [err[-2000:] for _, err in ended]
    return [json.loads(said.splitlines()[-1]) for said, _ in ended], out


def test_a_decoder_whose_weights_lie_in_two_processes_writes_what_one_writes(two):
    assert all(said["written"] for said in two[0])


def test_arrays_that_are_spread_are_not_saved_and_named(two):
    said, out = two
    for one in said:
        assert one["save spread"].startswith("ValueError: params at 'x/y/model/")
        assert "is spread over 2 processes: gather it first" in one["save spread"]
        assert one["lm.save spread"].startswith("ValueError: params at 'params/model/")
    assert not [name for name in os.listdir(out) if name in ("a", "b") or name.startswith(".")]


def test_copies_and_what_was_gathered_are_saved(two):
    said, out = two
    assert all(one["same"] and one["save copies"] is None for one in said)
    assert said[0]["save gathered"] is None and (out / "gathered" / "slidejax.json").is_file()


def test_calibration_wants_the_model_in_one_process(two):
    for one in two[0]:
        for call in ("convert spread", "mixed spread"):
            assert one[call].startswith("ValueError: params[")
            assert "is spread over 2 processes" in one[call]


def test_of_two_conversions_to_one_place_one_wins(two):
    said, out = two
    said = [one["files"] for one in said]
    assert None in said
    assert all(one is None or "is being written by another process" in one for one in said)
    assert (out / "made" / "slidejax.json").is_file()


def test_training_over_processes_has_no_checkpoint_and_no_minutes(two):
    said, out = two
    for one in said:
        assert one["fit"] == 2 and one["own checkpoint"] == 2
        for flag in ("checkpoint", "minutes"):
            assert one[flag].startswith(f"ValueError: fit with {flag} runs in one process")
    assert not (out / "state").exists()

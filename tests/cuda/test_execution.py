"""CUDA graphs, threads and devices: calls share no state through which they could disturb each
other."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.ops import registry

pytestmark = pytest.mark.gpu

IMPLEMENTATIONS = ("cusparselt", "hopper")


def need(implementation):
    if reason := registry.get(implementation).available():
        pytest.skip(reason)
    if implementation == "hopper" and jax.devices()[0].compute_capability != "9.0":
        pytest.skip("needs a Hopper GPU")


def model(implementation, out=256, seed=0):
    rng = np.random.default_rng(seed)
    w = sj.pack(
        jnp.asarray(rng.standard_normal((256, out)) / 16, jnp.float32), "6:8", dtype=jnp.int8
    )
    w = sj.prepare(w, implementation=implementation)
    return (
        w,
        jnp.asarray(rng.standard_normal((48, 256)), jnp.bfloat16),
        lambda x, w: sj.linear(x, w, implementation=implementation),
    )


def loop(implementation):
    """A layer applied 16 times in a scan, as decoding does it."""
    w, x, layer = model(implementation)
    step = lambda x, w: jnp.tanh(layer(x, w))  # noqa: E731

    @jax.jit
    def run(x, w):
        return jax.lax.scan(lambda x, _: (step(x, w), None), x, None, length=16)[0]

    one = jax.jit(step)
    want = x
    for _ in range(16):
        want = one(want, w)
    for _ in range(3):  # graphs are captured in one run, replayed in another
        got = run(x, w)
    return np.asarray(got), np.asarray(want)


_CAPTURED = """
import sys, numpy as np
from test_execution import loop
got, want = loop(sys.argv[1])
np.testing.assert_array_equal(got, want)
"""


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_loop_is_captured_in_a_cuda_graph(implementation, tmp_path):
    need(implementation)
    flags = [
        "--xla_gpu_enable_command_buffer=+FUSION,+CUSTOM_CALL,+WHILE",
        "--xla_gpu_graph_min_graph_size=1",
        f"--xla_dump_to={tmp_path}",
        "--xla_dump_hlo_as_text",
    ]
    env = {**os.environ, "XLA_FLAGS": " ".join(flags), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", _CAPTURED, implementation],
        env=env,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    thunks = [path.read_text() for path in tmp_path.glob("*thunk_sequence*.txt")]
    captured = [
        text
        for text in thunks
        if "slidejax" in text or "custom-call" in text or "ommandBuffer" in text
    ]
    assert any("ommandBuffer" in text for text in captured), sorted(
        path.name for path in tmp_path.iterdir()
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_loop_equals_its_steps(implementation):
    need(implementation)
    np.testing.assert_array_equal(*loop(implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_threads_do_not_disturb_each_other(implementation):
    need(implementation)
    failures = []

    def work(out, seed):
        w, x, layer = model(implementation, out, seed)
        compiled = jax.jit(layer)
        want = np.asarray(compiled(x, w))
        for _ in range(50):
            if not np.array_equal(np.asarray(compiled(x, w)), want):
                failures.append(out)

    # The last two have the same shapes and other values.
    threads = [
        threading.Thread(target=work, args=arguments)
        for arguments in ((256, 0), (96, 1), (512, 2), (512, 3))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_program_on_two_devices(implementation):
    need(implementation)
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    w, x, layer = model(implementation)
    want = np.asarray(jax.jit(layer)(x, w))
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    compiled = jax.jit(layer, out_shardings=rows)
    both = (jax.device_put(x, rows), jax.device_put(w, everywhere))
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(compiled(*both)), want)
    second = jax.jit(layer)(
        jax.device_put(x, jax.devices()[1]), jax.device_put(w, jax.devices()[1])
    )
    np.testing.assert_array_equal(np.asarray(second), want)

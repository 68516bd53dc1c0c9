import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.bench import contenders, run
from slidejax.ops.tuning import Variant


def test_the_bounds_of_a_dense_layer_are_the_layer_without_scales():
    kernel = contenders.kernel_of(16, 64)
    x = run.inputs_of(8, 64, 1)[0]
    exact = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
    by_name = {c.name: c for c in contenders.baselines(kernel)}
    assert {*by_name, contenders.BEST_DENSE} == set(contenders.BASELINES)
    for name, dtype in (("dense int8 unscaled", jnp.int32), ("dense fp8 unscaled", jnp.bfloat16)):
        c = by_name[name]
        acc, scale = c.apply(x, c.weights)
        assert acc.dtype == dtype and scale.shape == (8, 1)
        _, scale_w = contenders._quantise(
            kernel.T, 127 if dtype == jnp.int32 else 448, c.weights.dtype, 1
        )
        y = np.asarray(acc, np.float32) * np.asarray(scale) * np.asarray(scale_w)[:, 0]
        assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.05


def relative_error(y, exact):
    return np.linalg.norm(np.asarray(y, np.float32) - exact) / np.linalg.norm(exact)


def test_jax_layers_are_close_to_the_kernel():
    kernel = contenders.kernel_of(16, 64)
    x = run.inputs_of(8, 64, 1)[0]
    exact = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
    by_name = {c.name: c for c in contenders.baselines(kernel)}
    for name, bound in (
        ("jax bf16", 0.005),
        ("jax int8", 0.02),
        (contenders.WEIGHTS_ALONE, 0.01),
        ("jax fp8", 0.05),
    ):
        y = by_name[name].apply(x, by_name[name].weights)
        assert y.dtype == jnp.bfloat16 and relative_error(y, exact) < bound
    # x is not quantised: two inputs with the same codes give different results
    alone = by_name[contenders.WEIGHTS_ALONE]
    assert alone.weights[0].dtype == jnp.int8
    nudged = x.at[0, 0].add(x[0, 0] / 64)
    assert (alone.apply(x, alone.weights) != alone.apply(nudged, alone.weights)).any()


@pytest.mark.parametrize("form", [None, "dense"])
def test_behind_a_norm_every_layer_sees_the_normed_rows(form):
    kernel = contenders.kernel_of(16, 64)
    x = run.inputs_of(8, 64, 1)[0] * 7
    v = np.asarray(x, np.float32)
    normed = v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-6)
    exact = normed @ np.asarray(kernel, np.float32)
    for c in contenders.baselines(kernel):
        if c.name in contenders.NORMED:
            behind = contenders.behind_norm(c, 64)
            assert behind.name == c.name
            assert relative_error(behind.apply(x, behind.weights), exact) < 0.05

    w = sj.pack(kernel, "6:8", dtype="int8")
    slow, fast, broken = Variant("reference"), Variant("dense", form), Variant("hopper")
    times = {slow: 3.0, fast: 2.0, broken: None}
    variant, ours = contenders.fastest_behind_norm(w, 8, times, "ours")
    assert variant == fast and ours.name == "ours"
    assert {*ours.weights[1].prepared} == ({form} - {None})
    exact = normed @ np.asarray(sj.unpack(w), np.float32)
    assert relative_error(ours.apply(x, ours.weights), exact) < 0.02
    assert contenders.fastest_behind_norm(w, 8, {broken: None}, "ours") is None


def test_products_of_plain_jax_are_timed_with_both_of_xlas_ways(monkeypatch):
    """With few rows each way is the faster for some layers. A kernel of ours has one."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    kernel, flag = contenders.kernel_of(16, 64), "xla_gpu_enable_triton_gemm"
    for rows, ways in ((1, {False, True}), (64, {False, True}), (65, {False})):
        for c in contenders.for_rows(contenders.baselines(kernel), rows):
            assert {settings[flag] for settings in c.settings} == ways
            assert contenders.behind_norm(c, 64).settings == c.settings
    w = sj.pack(kernel, "6:8", dtype="int8")
    for name, count in (("dense", 2), ("decode", 1)):
        _, ours = contenders.fastest_behind_norm(w, 1, {Variant(name): 1.0}, "ours")
        assert len(ours.settings) == count
    monkeypatch.setenv("XLA_FLAGS", f"--{flag}=true")  # the user's choice
    assert contenders.settings_of_xla(1) == ({},)
